"""`cached_attention`: new tokens attend to those of their sequence that a cache holds."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.packed_linear import BLOCK, TOGETHER
from convai_fast.ops.schemas import library

library.impl("cached_attention", reference.cached_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::cached_attention")
def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def make_cache(
    *shape: int, capacity: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values for `capacity` tokens, which is rounded up to a multiple of 64; empty.

    Both are packed in blocks of 64 columns, as `packed_linear`'s weights are, with together 1
    feature of float32 or 2 of bfloat16 innermost: keys have positions for columns, and values
    dimensions.

    Args:
        shape: what comes before: layers, slots, num_kv_heads.
        dtype: float32 or bfloat16.

    Returns:
        keys [*shape, capacity / 64, head_dim / together, 64, together] and
        values [*shape, head_dim / 64, capacity / together, 64, together], rounded up.
    """
    together = TOGETHER[dtype]
    blocks = -(-capacity // BLOCK)
    keys = (blocks, -(-head_dim // together), BLOCK, together)
    values = (-(-head_dim // BLOCK), blocks * BLOCK // together, BLOCK, together)
    # Empty: memory that no token was written to is not taken from the machine.
    return torch.empty(*shape, *keys, dtype=dtype), torch.empty(*shape, *values, dtype=dtype)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    offsets: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Causal attention of the new tokens of several sequences; their keys and values are stored.

    Sequence `i` lives in slot `slots[i]` of the cache, which holds its first `lengths[i]` tokens;
    rows `offsets[i]` to `offsets[i + 1]` of q, k and v are those that follow. On a CPU a token's
    result does not depend on the other sequences, nor on how many tokens came in one call.

    Args:
        q: [tokens, num_heads, head_dim], queries of the new tokens; on a CPU float32.
        k, v: [tokens, num_kv_heads, head_dim], their keys and values, each for num_heads /
            num_kv_heads heads of queries. Read where they are if a token's heads lie side by side.
        keys, values: what `make_cache` makes, but for the layers. Written to.
        slots, lengths: int64 [sequences], on the CPU; each slot at most once.
        offsets: int64 [sequences + 1], on the CPU.

    Returns:
        [tokens, num_heads, head_dim].

    Raises:
        ValueError, IndexError: shapes do not fit, or a sequence does not fit its slot.

    In bfloat16, queries and attention weights are rounded to it before they are multiplied.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); several sequences in one call without padding as
    in Yu et al., "Orca" (OSDI 2022).
    """
    return torch.ops.convai_fast.cached_attention(q, k, v, keys, values, slots, offsets, lengths)
