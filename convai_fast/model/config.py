"""What a decoder looks like; a family of models reads it from transformers' `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from convai_fast.errors import UserError, shown

Activation = Literal["gelu_new", "gelu", "relu", "silu"]
NormPosition = Literal["pre", "post"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (RoPE): the angles by which queries and keys are turned.

    Attributes:
        frequencies: head_dim / 2 of them; at position p an angle is p times its frequency.
        scale: of the cosines and sines.
        parameters: `rope_parameters` of transformers, from which both were computed.
    """

    frequencies: tuple[float, ...]
    scale: float
    parameters: Mapping[str, Any]


# No model comes near it, and sizes of tensors do not overflow below it.
_MAX_SIZE = 2**24
_SIZES = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_kv_head", "head_dim"),
    "n_inner",
)


def check_size(name: str, value: Any) -> None:
    """Raise UserError unless the setting `name` may be a size of a model."""
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise UserError(
            f"{name} must be a positive whole number up to {_MAX_SIZE:,}, not {shown(value)}."
        )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape and settings of a `Transformer` and the heads on it, as a family makes it.

    Attributes:
        family: the family's name, which is `model_type` in transformers.
        n_positions: the most tokens of a sequence.
        n_embd: width of the hidden states.
        n_head: attention heads.
        n_kv_head: heads of keys and values, each for as many of queries (grouped-query attention).
        head_dim: width of one head.
        n_inner: width of the MLP's middle layer.
        activation: of the MLP; "gelu_new" is the tanh approximation.
        gated: whether the MLP multiplies what it activates by another projection (SwiGLU).
        norm: LayerNorm, or RMSNorm, which has no bias and subtracts no mean.
        norm_position: before a sub-layer, or after its residual sum.
        final_norm: whether there is one after the last block.
        norm_eps: of every norm.
        rope: rotary positions; None where positions have an embedding.
        qk_norm: whether an RMSNorm of each head of queries and of keys precedes the rotation.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        out_bias: whether the one after attention has.
        mlp_bias: whether those of the MLP have.
        tied: whether the language-model head is the token embedding.
        segments: whether a token's segment is added to it, from the token embedding.
        embd_pdrop, attn_pdrop, resid_pdrop: dropout of embeddings, attention weights, sub-layers.
        summary_first_dropout: dropout before the multiple-choice head.
        initializer_range: standard deviation of new weights.

    Raises:
        UserError: a value is out of range, or sizes do not fit each other.
    """

    family: str
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_inner: int
    activation: Activation
    gated: bool
    norm: Literal["layer", "rms"]
    norm_position: NormPosition
    final_norm: bool
    norm_eps: float
    rope: Rope | None
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    segments: bool
    embd_pdrop: float
    attn_pdrop: float
    resid_pdrop: float
    summary_first_dropout: float
    initializer_range: float

    def __post_init__(self) -> None:
        for name in _SIZES:
            check_size(name, getattr(self, name))
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
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"the {self.n_head} attention heads must be a multiple of the {self.n_kv_head} of "
                "keys and values."
            )
        if self.rope is not None and len(self.rope.frequencies) * 2 != self.head_dim:
            raise UserError(
                f"rotary positions need heads of an even width, all of which turns, not "
                f"{self.head_dim}."
            )

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read the content of transformers' `config.json`; what it lacks has their default.

        `{"model_type": "gpt2"}` is GPT-2 124M, `{"model_type": "openai-gpt"}` OpenAI GPT.

        Raises:
            UserError: the model is of no family that is supported, or a setting would change the
                results in a way that is not supported.
        """
        from convai_fast.model import families  # which make configs

        return families.find(config).read(config)

    def to_transformers(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers' own classes load to the same model."""
        from convai_fast.model import families

        return families.of(self).write_config(self)
