"""`decoder_step`: new tokens of several sequences through a whole decoder on a CPU."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.packed_linear import PackedWeight
from convai_fast.ops.schemas import library

library.impl("decoder_step", reference.decoder_step, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::decoder_step")
def _fake(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    slots: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: list[Tensor | None],
    *_: object,
) -> Tensor:
    assert weights[0] is not None
    return weights[0].new_empty(slots.shape[0], weights[0].shape[1])


@dataclass(frozen=True, kw_only=True)
class PackedLayers:
    """The layers' weights, stacked: each tensor has the layers as its first dimension.

    So that a step takes a few tensors, not some for each layer, which would be checked each time.

    Attributes:
        attention_norm, mlp_norm: (weight, bias or None).
        qk_norm: weights [head_dim] of the norms of queries and keys, or None.
        qkv, out, up, down: linear layers, (weight, bias or None).
        gate: as these, of a gated MLP, else None.
    """

    attention_norm: tuple[Tensor, Tensor | None]
    mlp_norm: tuple[Tensor, Tensor | None]
    qk_norm: tuple[Tensor, Tensor] | None
    qkv: tuple[PackedWeight, Tensor | None]
    out: tuple[PackedWeight, Tensor | None]
    gate: tuple[PackedWeight, Tensor | None] | None
    up: tuple[PackedWeight, Tensor | None]
    down: tuple[PackedWeight, Tensor | None]

    def tensors(self) -> list[Tensor | None]:
        """In the order in which `decoder_step` takes them."""
        tensors = [*self.attention_norm, *self.mlp_norm, *(self.qk_norm or (None, None))]
        for linear in (self.qkv, self.out, self.gate, self.up, self.down):
            if linear is None:
                tensors += [None] * 4
            else:
                (data, scales, column_sums, _), bias = linear
                tensors += [data, scales, column_sums, bias]
        return tensors


@dataclass(frozen=True, kw_only=True)
class PackedDecoder:
    """A decoder as `decoder_step` reads it; float32 but for the packed weights.

    Attributes:
        token_embedding: [vocab_size, n_embd], of tokens and of their segments.
        position_embedding: [n_positions, n_embd], or None.
        rope_frequencies: [head_dim / 2], of rotary positions, or None.
        final_norm: (weight, bias or None), or None.
        layers: all of them.
        num_heads: of queries.
        head_dim: width of one head.
        n_inner: width of the MLP's middle.
        pre_norm: whether norms come before a sub-layer, not after its residual sum.
        rms_norm: RMSNorm instead of LayerNorm.
        norm_eps: of every norm.
        activation: "gelu_new", "gelu", "relu" or "silu".
        rope_scale: of the cosines and sines of rotary positions.
    """

    token_embedding: Tensor
    position_embedding: Tensor | None
    rope_frequencies: Tensor | None
    final_norm: tuple[Tensor, Tensor | None] | None
    layers: PackedLayers
    num_heads: int
    head_dim: int
    n_inner: int
    pre_norm: bool
    rms_norm: bool
    norm_eps: float
    activation: str
    rope_scale: float

    @cached_property
    def tensors(self) -> list[Tensor | None]:
        """In the order in which `decoder_step` takes them, gathered once, not at every step."""
        final_norm = self.final_norm or (None, None)
        return [
            self.token_embedding,
            self.position_embedding,
            self.rope_frequencies,
            *final_norm,
            *self.layers.tensors(),
        ]


def decoder_step(
    decoder: PackedDecoder,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    slots: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Hidden states of the last new token of each sequence, float32 [sequences, n_embd].

    All layers in one call, from the embeddings to the last norm; the last layer is computed for
    those tokens alone. Sequences and cache are those of `cached_attention`, of which `keys` and
    `values` have one for each layer: [layers, slots, ...]. Keys and values are written to. A
    sequence's result does not depend on the others where the compiled operator runs.

    Args:
        decoder: the weights.
        input_ids: int64 [tokens], at least one of each sequence.
        token_type_ids: int64 [tokens], segments, looked up in the token embedding; or None.
        slots, lengths: int64 [sequences].
        offsets: int64 [sequences + 1].

    Raises:
        ValueError, TypeError, IndexError: shapes or dtypes do not fit, ids are out of range, or a
            sequence does not fit its slot or the positions.

    Sources: Vaswani et al. 2017 (arXiv 1706.03762); those of the parts stand beside them.
    """
    return torch.ops.convai_fast.decoder_step(
        input_ids,
        token_type_ids,
        slots,
        offsets,
        lengths,
        keys,
        values,
        decoder.tensors,
        decoder.num_heads,
        decoder.head_dim,
        decoder.n_inner,
        decoder.pre_norm,
        decoder.rms_norm,
        decoder.norm_eps,
        decoder.activation,
        decoder.rope_scale,
    )
