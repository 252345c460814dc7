"""What a transformer looks like, read from and written to transformers' `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from convai_fast.errors import UserError, shown


class _Architecture(NamedTuple):
    """What distinguishes one published architecture from the other in transformers."""

    double_heads_class: str
    norm_position: str
    final_norm: bool
    activation_field: str  # the field of config.json that names the activation
    activations: dict[str, str]  # what that field may say -> the function it means there
    defaults: dict[str, Any]  # of transformers' own config class


_COMMON_DEFAULTS = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "summary_first_dropout": 0.1,
    "initializer_range": 0.02,
}

_ARCHITECTURES = {
    "openai-gpt": _Architecture(
        double_heads_class="OpenAIGPTDoubleHeadsModel",
        norm_position="post",
        final_norm=False,
        activation_field="afn",
        # OpenAI GPT's "gelu" is the tanh approximation, which GPT-2 calls "gelu_new".
        activations={"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"},
        defaults={**_COMMON_DEFAULTS, "vocab_size": 40478, "n_positions": 512, "afn": "gelu"},
    ),
    "gpt2": _Architecture(
        double_heads_class="GPT2DoubleHeadsModel",
        norm_position="pre",
        final_norm=True,
        activation_field="activation_function",
        activations={
            "gelu_new": "gelu_new",
            "gelu_pytorch_tanh": "gelu_new",
            "gelu": "gelu",
            "relu": "relu",
            "silu": "silu",
            "swish": "silu",
        },
        defaults={
            **_COMMON_DEFAULTS,
            "vocab_size": 50257,
            "n_positions": 1024,
            "activation_function": "gelu_new",
        },
    ),
}

_GPT2_END_OF_TEXT = 50256  # transformers' default for GPT-2's bos and eos

# Names that transformers' config classes accept for the same thing.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# No model comes near it, and sizes of tensors do not overflow below it.
_MAX_SIZE = 2**24

# Settings that change what transformers computes, and the only value that is computed here.
_FIXED_SETTINGS = {
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_proj_to_labels": True,
    "summary_activation": None,
    "tie_word_embeddings": True,
}
_FIXED_SETTINGS_NOT_WRITTEN = {
    "summary_last_dropout": 0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape and settings of a `Transformer` and the heads on it.

    Sizes are counts; `n_inner` is the width of the MLP's middle layer; the `*_pdrop` fields and
    `summary_first_dropout` (before the multiple-choice head) are dropout probabilities.
    `activation` is "gelu_new" (the tanh approximation), "gelu" (exact), "relu" or "silu".
    `norm_position` says whether a sub-layer's LayerNorm stands before it ("pre", GPT-2) or after
    its residual sum ("post", GPT). `architecture` names the layout of config and weights in
    transformers.

    Raises:
        UserError: a value is not supported, or does not fit the architecture.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation: Literal["gelu_new", "gelu", "relu", "silu"]
    norm_position: Literal["pre", "post"]
    final_norm: bool
    norm_eps: float = 1e-5
    positions: Literal["learned"] = "learned"
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    summary_first_dropout: float = 0.1
    initializer_range: float = 0.02
    architecture: Literal["openai-gpt", "gpt2"]

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_SIZE:
                raise UserError(
                    f"{name} must be a positive whole number up to {_MAX_SIZE:,}, not "
                    f"{shown(value)}."
                )
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(
                    f"{name} must be a probability from 0 to below 1, not {shown(value)}."
                )
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= 1:
                raise UserError(
                    f"{name} must be a number above 0 and at most 1, not {shown(value)}."
                )
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}.")

        known = _ARCHITECTURES.get(self.architecture)
        if known is None:
            raise UserError(
                f"architecture {self.architecture!r} is not supported; "
                f"use one of {', '.join(_ARCHITECTURES)}."
            )
        required = {
            "norm_position": known.norm_position,
            "final_norm": known.final_norm,
            "positions": "learned",
        }
        if self.architecture == "openai-gpt":
            required["n_inner"] = 4 * self.n_embd
        for name, needed in required.items():
            value = getattr(self, name)
            if value != needed:
                raise UserError(
                    f"{name} must be {needed!r} for {self.architecture}, not {value!r}."
                )
        if self.activation not in known.activations.values():
            supported = ", ".join(sorted(set(known.activations.values())))
            raise UserError(
                f"activation {self.activation!r} is not supported for {self.architecture}; "
                f"use one of {supported}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read the content of transformers' `config.json`; what it lacks has their default.

        `{"model_type": "gpt2"}` is GPT-2 124M, `{"model_type": "openai-gpt"}` OpenAI GPT.

        Raises:
            UserError: the architecture is neither, or a setting would change the results in a way
                that is not supported.
        """
        settings = {
            _ALIASES.get(key, key): value for key, value in config.items() if value is not None
        }
        architecture = _detect_architecture(settings)
        known = _ARCHITECTURES[architecture]
        settings = {**known.defaults, **settings}

        for name, supported in (_FIXED_SETTINGS | _FIXED_SETTINGS_NOT_WRITTEN).items():
            value = settings.get(name, supported)
            # An empty or false value means "none" to transformers just as null does.
            if (value or None) != (supported or None):
                raise UserError(f"{name} {shown(value)} is not supported; only {supported!r} is.")
        activation = settings[known.activation_field]
        if activation not in list(known.activations):  # which may be no string
            raise UserError(
                f"{known.activation_field} {shown(activation)} is not supported for "
                f"{architecture}; use one of {', '.join(known.activations)}."
            )

        # OpenAI GPT's class knows no n_inner.
        n_embd = settings["n_embd"]
        n_inner = settings.get("n_inner") if architecture == "gpt2" else None
        return cls(
            vocab_size=settings["vocab_size"],
            n_positions=settings["n_positions"],
            n_embd=n_embd,
            n_layer=settings["n_layer"],
            n_head=settings["n_head"],
            # What is no number is refused as n_embd.
            n_inner=4 * n_embd if n_inner is None and isinstance(n_embd, int) else n_inner,
            activation=known.activations[activation],
            norm_position=known.norm_position,
            final_norm=known.final_norm,
            norm_eps=settings["layer_norm_epsilon"],
            embd_pdrop=settings["embd_pdrop"],
            attn_pdrop=settings["attn_pdrop"],
            resid_pdrop=settings["resid_pdrop"],
            summary_first_dropout=settings["summary_first_dropout"],
            initializer_range=settings["initializer_range"],
            architecture=architecture,
        )

    def to_transformers(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers' own classes load to the same model."""
        known = _ARCHITECTURES[self.architecture]
        activation = next(
            name for name, function in known.activations.items() if function == self.activation
        )
        config = {
            "architectures": [known.double_heads_class],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "n_positions": self.n_positions,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            known.activation_field: activation,
            "layer_norm_epsilon": self.norm_eps,
            "embd_pdrop": self.embd_pdrop,
            "attn_pdrop": self.attn_pdrop,
            "resid_pdrop": self.resid_pdrop,
            "summary_first_dropout": self.summary_first_dropout,
            "initializer_range": self.initializer_range,
            **_FIXED_SETTINGS,
        }
        if self.architecture == "gpt2":
            config["n_inner"] = self.n_inner
            if self.vocab_size <= _GPT2_END_OF_TEXT:
                # transformers' default would name a token that does not exist.
                config |= {"bos_token_id": None, "eos_token_id": None}
        return config


def _detect_architecture(settings: Mapping[str, Any]) -> str:
    model_type = settings.get("model_type")
    if model_type is not None:
        if model_type not in list(_ARCHITECTURES):  # which may be no string
            raise UserError(
                f"model_type {shown(model_type)} is not supported; "
                f"use one of {', '.join(_ARCHITECTURES)}."
            )
        return model_type
    classes = settings.get("architectures")
    if classes:
        first = classes[0] if isinstance(classes, list) else classes
        for architecture, known in _ARCHITECTURES.items():
            if str(first).startswith(known.double_heads_class.removesuffix("DoubleHeadsModel")):
                return architecture
        raise UserError(
            f"architectures {shown(classes)} is not supported; "
            "only the classes of OpenAI GPT and GPT-2 are."
        )
    # Configs older than `model_type` are told apart by a field that only one of the two had.
    if "afn" in settings:
        return "openai-gpt"
    if "activation_function" in settings or settings.get("n_ctx") == 1024:
        return "gpt2"
    raise UserError('model_type is missing; set it to "openai-gpt" or "gpt2".')
