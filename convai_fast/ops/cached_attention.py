"""`cached_attention`: new tokens attend to those of their sequence that a cache holds."""

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

PANEL = 16  # positions whose keys lie side by side

library.impl("cached_attention", reference.cached_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::cached_attention")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    offsets: Tensor,
    lengths: Tensor,
) -> Tensor:
    return q.new_empty(q.shape)


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
        keys: [slots, num_kv_heads, capacity / 16, head_dim, 16], contiguous; positions are the last
            dimension and the third from the left. Written to, in their own dtype: on a CPU float32
            or bfloat16.
        values: [slots, num_kv_heads, capacity, value_dim], of which head_dim are used, contiguous;
            capacity and value_dim are multiples of 64. Written to.
        slots, lengths: int64 [sequences], on the CPU; each slot at most once.
        offsets: int64 [sequences + 1], on the CPU.

    Returns:
        [tokens, num_heads, head_dim].

    Raises:
        ValueError, IndexError: shapes do not fit, or a sequence does not fit its slot.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); several sequences in one call without padding as
    in Yu et al., "Orca" (OSDI 2022).
    """
    return torch.ops.convai_fast.cached_attention(q, k, v, keys, values, slots, offsets, lengths)
