"""GPT-2: a GPT whose LayerNorms stand before the sub-layers, and one more after the last.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from convai_fast.model.config import NormPosition, TransformerConfig
from convai_fast.model.families.family import ACTIVATIONS
from convai_fast.model.families.gpt import GPT

if TYPE_CHECKING:
    from convai_fast.model.transformer import Transformer

_END_OF_TEXT = 50256  # transformers' default for bos and eos


class GPT2(GPT):
    """GPT-2, and those of its make, such as DistilGPT2 and DialoGPT."""

    name = "gpt2"
    title = "GPT-2"
    config_class = "GPT2Config"
    model_class = "GPT2DoubleHeadsModel"
    tensors = GPT.tensors | {
        "transformer.token_embedding.weight": "transformer.wte.weight",
        "transformer.position_embedding.weight": "transformer.wpe.weight",
        "transformer.final_norm": "transformer.ln_f",
    }
    activation_field = "activation_function"
    activations = ACTIVATIONS
    norm_position: NormPosition = "pre"
    final_norm = True

    def recognises(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """As of OpenAI GPT, or by 1024 positions, which the oldest configs call n_ctx."""
        return super().recognises(config, tensor_names) or config.get("n_ctx") == 1024

    def read_config(self, settings: Mapping[str, Any]) -> TransformerConfig:
        """As of OpenAI GPT, but the MLP may have any width."""
        config, n_inner = super().read_config(settings), settings["n_inner"]
        return config if n_inner is None else dataclasses.replace(config, n_inner=n_inner)

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """As of OpenAI GPT, with n_inner, and no bos or eos outside the vocabulary."""
        content = super().write_config(config) | {"n_inner": config.n_inner}
        if config.vocab_size <= _END_OF_TEXT:
            content |= {"bos_token_id": None, "eos_token_id": None}
        return content

    def initialise(self, transformer: "Transformer") -> None:
        """The last layer before each residual sum is scaled down by sqrt(2 · n_layer)."""
        super().initialise(transformer)
        config = transformer.config
        std = config.initializer_range / math.sqrt(2 * config.n_layer)
        for name, parameter in transformer.blocks.named_parameters():
            if name.endswith((".attention.out.weight", ".mlp.down.weight")):
                nn.init.normal_(parameter, std=std)
