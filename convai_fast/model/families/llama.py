"""Llama and Mistral: rotary positions, RMSNorm, gated MLPs, groups of heads, no biases.

Sources: Touvron et al., "Llama 2" (arXiv 2307.09288); Jiang et al., "Mistral 7B" (arXiv
2310.06825).
"""

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from convai_fast.errors import UserError, reason_of, shown
from convai_fast.model.config import Rope, TransformerConfig, check_size
from convai_fast.model.families.family import Family
from convai_fast.model.families.two_heads import SEGMENTS, with_two_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Our name of a size -> transformers'.
_SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_inner": "intermediate_size",
}
_NUMBERS = {
    "norm_eps": "rms_norm_eps",
    "attn_pdrop": "attention_dropout",
    "initializer_range": "initializer_range",
    "tied": "tie_word_embeddings",
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def _are_frequencies(tensor: Tensor) -> bool:
    """Of rotary positions without scaling, which began with 1 and fell, in the versions that stored
    them."""
    return tensor.dim() == 1 and tensor[:1].tolist() == [1.0] and bool((tensor.diff() < 0).all())


class Llama(Family):
    """Llama, and those of its make, such as TinyLlama and SmolLM2.

    transformers' class has no multiple-choice head: it is one more tensor in the same file.

    Attributes:
        biases: which linear layers have one -> its setting, or the value where there is none.
        layer_types: what transformers' setting of that name may say, where there is one.
    """

    name = "llama"
    title = "Llama"
    config_class = "LlamaConfig"
    model_class = "LlamaForCausalLM"
    supported: ClassVar = {"pretraining_tp": 1, "num_local_experts": None, "num_experts": None}
    prefix = "model"
    tensors: ClassVar = {
        "transformer.token_embedding.weight": "model.embed_tokens.weight",
        "transformer.blocks.{layer}.attention.qkv": tuple(
            f"model.layers.{{layer}}.self_attn.{part}_proj" for part in "qkv"
        ),
        "transformer.blocks.{layer}.attention.out": "model.layers.{layer}.self_attn.o_proj",
        "transformer.blocks.{layer}.attention_norm": "model.layers.{layer}.input_layernorm",
        "transformer.blocks.{layer}.mlp.gate": "model.layers.{layer}.mlp.gate_proj",
        "transformer.blocks.{layer}.mlp.up": "model.layers.{layer}.mlp.up_proj",
        "transformer.blocks.{layer}.mlp.down": "model.layers.{layer}.mlp.down_proj",
        "transformer.blocks.{layer}.mlp_norm": "model.layers.{layer}.post_attention_layernorm",
        "transformer.final_norm": "model.norm",
        "multiple_choice_head": "multiple_choice_head",
    }
    linear_layers = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    constants: ClassVar = {
        re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"): (
            "the frequencies of rotary positions, which are computed",
            _are_frequencies,
        ),
    }
    activation_field = "hidden_act"
    pads_vocabulary = True
    may_chat = True

    biases: ClassVar[Mapping[str, str | bool]] = {
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    }
    layer_types: ClassVar[tuple[str, ...]] = ("full_attention",)

    def completed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """As transformers' config class does it, which knows several ways to say the same."""
        if given.get("quantization_config"):
            raise UserError(
                "quantization_config is not supported: get the model before it was quantised."
            )
        for name in _SIZES.values():
            if given.get(name) is not None:
                check_size(name, given[name])
        settings = {
            # A null window is none, and not the default.
            name: copy.deepcopy(value)  # since transformers writes into it
            for name, value in given.items()
            if value is not None or name == "sliding_window"
        }
        try:
            completed: dict[str, Any] = self._config_class().from_dict(settings).to_dict()
        except Exception as error:  # transformers checks settings in more than one way
            reason = reason_of(error.__cause__ or error)  # what names the field
            raise UserError(
                f"transformers refuses the settings ({reason}); correct them."
            ) from error
        return completed

    def read_config(self, settings: Mapping[str, Any]) -> TransformerConfig:
        """Dropout is that of attention alone; transformers has no other."""
        head_dim = settings.get("head_dim")
        if head_dim is None:
            head_dim = settings["hidden_size"] // settings["num_attention_heads"]
        check_size("head_dim", head_dim)
        settings = {**settings, "head_dim": head_dim}
        self._check_attention(settings)
        return TransformerConfig(
            family=self.name,
            **{ours: settings[theirs] for ours, theirs in (_SIZES | _NUMBERS).items()},
            **{
                ours: value if isinstance(value, bool) else settings[value]
                for ours, value in self.biases.items()
            },
            activation=self.activation(settings),
            gated=True,
            norm="rms",
            norm_position="pre",
            final_norm=True,
            rope=self._rope(settings),
            qk_norm=any("q_norm" in name for name in self.tensors),
            segments=self.reads_segments(settings),
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            summary_first_dropout=0.0,
        )

    def reads_segments(self, settings: Mapping[str, Any]) -> bool:
        """Where it was trained to."""
        return settings.get(SEGMENTS) is True

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """What is transformers' default is written too."""
        assert config.rope is not None
        return {
            "architectures": [self.model_class],
            "model_type": self.name,
            **{theirs: getattr(config, ours) for ours, theirs in (_SIZES | _NUMBERS).items()},
            **{
                theirs: getattr(config, ours)
                for ours, theirs in self.biases.items()
                if isinstance(theirs, str)
            },
            self.activation_field: self.activation_name(config),
            "rope_parameters": dict(config.rope.parameters),
            **({SEGMENTS: True} if config.segments else {}),
        }

    def peer_class(self) -> type["PreTrainedModel"]:
        """transformers' language model with a multiple-choice head on it."""
        return with_two_heads(super().peer_class())

    def window(self, settings: Mapping[str, Any]) -> int | None:
        """How many tokens one sees in transformers, in any layer; None for all before it."""
        return None

    def _check_attention(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError unless every token sees all before it, in every layer."""
        for kind in settings.get("layer_types") or ():
            if kind not in self.layer_types:
                raise UserError(
                    f"layer_types {shown(kind)} is not supported; only {self.layer_types[0]!r} is."
                )
        window, n_positions = self.window(settings), settings["max_position_embeddings"]
        if window is not None and window < n_positions:
            raise UserError(
                f"sliding_window {window} hides tokens of the {n_positions} in "
                f"max_position_embeddings; set that to {window}."
            )

    def _rope(self, settings: Mapping[str, Any]) -> Rope:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        parameters = settings["rope_parameters"]
        kind, part = parameters.get("rope_type"), parameters.get("partial_rotary_factor", 1.0)
        by_layer = any(isinstance(value, Mapping) for value in parameters.values())
        if by_layer or kind not in _ROPE_TYPES:
            raise UserError(
                f"rope_parameters {shown(parameters)} are not supported; only a rope_type of "
                f"{', '.join(_ROPE_TYPES)} is, for all layers alike."
            )
        if part != 1:
            raise UserError(f"partial_rotary_factor {shown(part)} is not supported; only 1.0 is.")
        scale = 1.0
        try:
            if kind == "default":
                dim = settings["head_dim"]
                exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
                frequencies = 1.0 / parameters["rope_theta"] ** exponents
            else:
                config = self._config_class().from_dict(copy.deepcopy(settings))
                frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        except Exception as error:  # of numbers that are none, or too small
            raise UserError(
                f"rope_parameters {shown(parameters)} cannot be used ({reason_of(error)}); correct "
                "them."
            ) from error
        if not frequencies.isfinite().all():
            raise UserError(f"rope_parameters {shown(parameters)} make no numbers; correct them.")
        return Rope(tuple(frequencies.tolist()), float(scale), parameters)


class Mistral(Llama):
    """Mistral, where a window of attention does not hide any position."""

    name = "mistral"
    title = "Mistral"
    config_class = "MistralConfig"
    model_class = "MistralForCausalLM"
    biases: ClassVar = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """As of Llama, without a window, which transformers has by default."""
        return super().write_config(config) | {"sliding_window": None}

    def window(self, settings: Mapping[str, Any]) -> int | None:
        """Of every layer."""
        window: int | None = settings["sliding_window"]
        return window
