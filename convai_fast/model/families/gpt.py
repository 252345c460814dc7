"""OpenAI GPT: learned positions, and a LayerNorm after each residual sum.

Source: Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from convai_fast.errors import UserError
from convai_fast.model.config import Activation, NormPosition, TransformerConfig
from convai_fast.model.families.family import Family

# What transformers calls as it is called here.
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout")
# Settings that change what transformers computes, and the only value that is computed here.
_WRITTEN = {
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_proj_to_labels": True,
    "summary_activation": None,
    "tie_word_embeddings": True,
}
_NOT_WRITTEN = {
    "summary_last_dropout": 0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# What a masked attention score was set to.
_MASKED = -1e4


def _is_causal_mask(tensor: Tensor) -> bool:
    """[1, 1, n, n], with 1 where a token looks."""
    size = tensor.shape[-1] if tensor.dim() else 0
    return tensor.shape == (1, 1, size, size) and torch.equal(
        tensor.double(), torch.ones(size, size).double().tril().expand_as(tensor)
    )


def _is_masked_score(tensor: Tensor) -> bool:
    return tensor.numel() == 1 and tensor.item() <= _MASKED


def _is_count(tensor: Tensor) -> bool:
    return torch.equal(tensor.flatten().double(), torch.arange(tensor.numel()).double())


class GPT(Family):
    """OpenAI GPT, from which GPT-2 differs in little."""

    name = "openai-gpt"
    title = "OpenAI GPT"
    config_class = "OpenAIGPTConfig"
    model_class = "OpenAIGPTDoubleHeadsModel"
    supported = _WRITTEN | _NOT_WRITTEN
    prefix = "transformer"
    tensors: ClassVar = {
        "transformer.token_embedding.weight": "transformer.tokens_embed.weight",
        "transformer.position_embedding.weight": "transformer.positions_embed.weight",
        "transformer.blocks.{layer}.attention.qkv": "transformer.h.{layer}.attn.c_attn",
        "transformer.blocks.{layer}.attention.out": "transformer.h.{layer}.attn.c_proj",
        "transformer.blocks.{layer}.attention_norm": "transformer.h.{layer}.ln_1",
        "transformer.blocks.{layer}.mlp.up": "transformer.h.{layer}.mlp.c_fc",
        "transformer.blocks.{layer}.mlp.down": "transformer.h.{layer}.mlp.c_proj",
        "transformer.blocks.{layer}.mlp_norm": "transformer.h.{layer}.ln_2",
        "multiple_choice_head": "multiple_choice_head.summary",
    }
    linear_layers = ("c_attn", "c_proj", "c_fc")
    conv1d = True
    constants: ClassVar = {
        re.compile(r"transformer\.h\.\d+\.attn\.bias"): (
            "the causal mask, which is computed",
            _is_causal_mask,
        ),
        re.compile(r"transformer\.h\.\d+\.attn\.masked_bias"): (
            "a constant of the causal mask",
            _is_masked_score,
        ),
        re.compile(r"transformer\.position_ids"): (
            "the numbers 0, 1, 2, …, which are computed",
            _is_count,
        ),
    }

    activation_field = "afn"
    # OpenAI GPT's "gelu" is the tanh approximation.
    activations: ClassVar[Mapping[str, Activation]] = {
        "gelu": "gelu_new",
        "relu": "relu",
        "silu": "silu",
        "swish": "silu",
    }
    norm_position: NormPosition = "post"
    final_norm = False

    def recognises(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """By the name of the activation's setting, or of the position embedding."""
        position = str(self.tensors["transformer.position_embedding.weight"])
        return config.get(self.activation_field) is not None or any(
            name.endswith(position.removeprefix(f"{self.prefix}.")) for name in tensor_names
        )

    def read_config(self, settings: Mapping[str, Any]) -> TransformerConfig:
        """OpenAI GPT's class knows no n_inner: the MLP is four times as wide as the rest."""
        activation = self.activation(settings)
        n_embd, n_head = settings["n_embd"], settings["n_head"]
        are_numbers = type(n_embd) is int and type(n_head) is int and n_head > 0
        if are_numbers and n_embd % n_head:
            raise UserError(f"n_embd {n_embd} must be a multiple of n_head {n_head}.")
        return TransformerConfig(
            family=self.name,
            **{name: settings[name] for name in (*_SIZES, *_DROPOUTS, "initializer_range")},
            n_kv_head=n_head,
            # What is no number is refused.
            head_dim=n_embd // n_head if are_numbers else n_head,
            n_inner=4 * n_embd if isinstance(n_embd, int) else n_embd,
            activation=activation,
            gated=False,
            norm="layer",
            norm_position=self.norm_position,
            final_norm=self.final_norm,
            norm_eps=settings["layer_norm_epsilon"],
            rope=None,
            qk_norm=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            tied=True,
            segments=self.reads_segments(settings),
        )

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """What is transformers' default is written too."""
        return {
            "architectures": [self.model_class],
            "model_type": self.name,
            **{name: getattr(config, name) for name in _SIZES},
            self.activation_field: self.activation_name(config),
            "layer_norm_epsilon": config.norm_eps,
            **{name: getattr(config, name) for name in _DROPOUTS},
            "initializer_range": config.initializer_range,
            **_WRITTEN,
        }
