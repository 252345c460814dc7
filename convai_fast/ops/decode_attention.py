"""`decode_attention`: one new token a row, in the slots of a cache that stays on the device."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("decode_attention", reference.decode_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::decode_attention")
def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Attention of one new token a row to itself and its past; its key and value are stored.

    Row `i` lives in slot `slots[i]`, which holds its first `lengths[i]` tokens; the new one becomes
    the next. The host reads neither, so that a step can be captured in a CUDA graph and goes on
    from what the tensors hold then. What a slot holds beyond its tokens is not looked at, and a
    row's result does not depend on the other rows.

    Args:
        q: float32, bfloat16 or float16 [rows, num_heads, head_dim]; on CUDA, head_dim <= 256.
        k, v: [rows, num_kv_heads, head_dim], each for num_heads / num_kv_heads heads of queries.
        keys, values: [num_slots, capacity, num_kv_heads, head_dim], one layer's cache, of the dtype
            of q, k and v. Written to. Any strides, but for features that lie side by side.
        slots, lengths: int64 [rows], on the device of q. Rows that share a slot spoil each other's
            results, and no other's: what is not wanted any more may go to a slot for all such rows.

    Returns:
        [rows, num_heads, head_dim], like q; sums are made in float32.

    Raises:
        ValueError, TypeError: on CUDA, shapes, dtypes or devices do not fit.
        IndexError: elsewhere, there is no such slot, or it is full. On CUDA, which nobody waits
            for, nothing is stored then and the row's result is NaN.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); a sequence shared out and put together by
    log-sum-exp as in Dao et al. 2023, "Flash-Decoding".
    """
    return torch.ops.convai_fast.decode_attention(q, k, v, keys, values, slots, lengths)
