"""`decoder_step`, of the other operators."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.ops.reference.rotate import rotate, rotation


def decoder_step(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    slots: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: list[Tensor | None],
    num_heads: int,
    head_dim: int,
    n_inner: int,
    pre_norm: bool,
    rms_norm: bool,
    norm_eps: float,
    activation: str,
    rope_scale: float,
) -> Tensor:
    """See `convai_fast.ops.decoder_step`."""
    counts, last = offsets.diff(), offsets[1:] - 1
    if (counts < 1).any():
        raise IndexError("decoder_step: a sequence has no new token")
    embedding, position_embedding, rope_frequencies, *final_norm = weights[:5]
    token_embedding = cast(Tensor, embedding)
    n_embd, num_kv_heads = token_embedding.shape[1], keys.shape[2]
    heads = [num_heads, num_kv_heads, num_kv_heads]

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if rms_norm:
            return F.rms_norm(x, (n_embd,), weight, norm_eps) + (0 if bias is None else bias)
        return F.layer_norm(x, (n_embd,), weight, bias, norm_eps)

    x = token_embedding[input_ids]
    if token_type_ids is not None:
        x = x + token_embedding[token_type_ids]
    # 5 and 6 for two tokens after 5, then 0, 1 and 2 for three of a new sequence.
    shifts = (lengths - offsets[:-1]).repeat_interleave(counts)
    position_ids = (torch.arange(len(input_ids)) + shifts).to(input_ids.device)
    if position_embedding is not None:
        x = x + position_embedding[position_ids]
    for layer in range(len(keys)):
        tensors = (None if stack is None else stack[layer] for stack in weights[5:])
        attention_norm = partial(norm, weight=next(tensors), bias=next(tensors))
        mlp_norm = partial(norm, weight=next(tensors), bias=next(tensors))
        q_norm, k_norm = next(tensors), next(tensors)
        qkv = _linear(tensors, sum(heads) * head_dim)
        out, gate, up, down = (
            _linear(tensors, size) for size in (n_embd, n_inner, n_inner, n_embd)
        )
        assert qkv and out and up and down
        q, k, v = (
            qkv(attention_norm(x) if pre_norm else x)
            .unflatten(1, (-1, head_dim))
            .split(heads, dim=1)
        )
        if q_norm is not None and k_norm is not None:
            q, k = (F.rms_norm(x, (head_dim,), w, norm_eps) for x, w in ((q, q_norm), (k, k_norm)))
        if rope_frequencies is not None:
            turn = rotation(position_ids, rope_frequencies, rope_scale)
            q, k = rotate(q, *turn), rotate(k, *turn)
        attended = torch.ops.convai_fast.cached_attention(
            q, k, v, keys[layer], values[layer], slots, offsets, lengths
        ).flatten(1)
        if layer == len(keys) - 1:
            x, attended = x[last], attended[last]
        x = x + out(attended)
        x = x if pre_norm else attention_norm(x)
        inner = mlp_norm(x) if pre_norm else x
        inner = up(inner, activation) if gate is None else gate(inner, activation) * up(inner)
        x = x + down(inner)
        x = x if pre_norm else mlp_norm(x)
    return x if final_norm[0] is None else norm(x, *final_norm)


def _linear(tensors: Iterator[Tensor | None], out_features: int) -> Callable[..., Tensor] | None:
    data, scales, column_sums, bias = (next(tensors) for _ in range(4))
    if data is None:
        return None

    def linear(x: Tensor, activation: str | None = None) -> Tensor:
        return torch.ops.convai_fast.packed_linear(
            x.contiguous(), data, scales, column_sums, bias, out_features, activation
        )

    return linear
