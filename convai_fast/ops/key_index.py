"""The rows of a batch in the shared-prefix layout, as attention of variable length reads them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def check_layout(offsets: Tensor, branch_ids: Tensor) -> None:
    """Raise ValueError unless `offsets` lead from 0 to the number of tokens and never decrease.

    The order of `branch_ids` is not looked at: on a GPU the host would wait for it.
    """
    bounds, tokens = offsets.tolist(), len(branch_ids)
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ValueError(
            "branch_attention: offsets must lead from 0 to the number of tokens, "
            f"{tokens}, without decreasing"
        )


class KeyIndex(NamedTuple):
    """The keys of each segment, a prefix or a branch, for attention of variable length.

    A segment of queries looks at its prefix, if it is a branch, and at itself. With a prefix of two
    tokens and branches of one and two:

        cu_queries 0 2 3 5        key_ids 0 1 | 0 1 2 | 0 1 3 4        cu_keys 0 2 5 9

    So a prefix's keys stand there once for each of its branches. An index of prefixes
    (`index_prefixes`) has them once: a segment looks at itself, and the branches of a row, as one
    segment, look at its prefix. Of the same row:

        cu_queries 0 2 3 5        key_ids 0 1        cu_keys 0 2 5 (queries) and 0 0 2 (keys)

    Attributes:
        key_ids: int64 [num_keys], the tokens whose keys and values they are.
        cu_queries, cu_keys: int32 [num_segments + 1], where each segment's queries and keys begin
            (FlashAttention's cu_seqlens_q and cu_seqlens_k). In an index of prefixes `cu_keys` is
            [2, 2 * rows + 1]: where the queries of each prefix, which has no keys, and of the
            branches after it begin, and where their keys do.
        max_queries, max_keys: the most that a segment has of them.
    """

    key_ids: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


def index_keys(offsets: Tensor, branch_ids: Tensor) -> KeyIndex:
    """What attention on a GPU needs to know of a batch, in tensors on the CPU.

    Args:
        offsets, branch_ids: as for `branch_attention`, on the CPU.

    Raises:
        ValueError: they are not.
    """
    bounds, branch, row, first, prefix_counts = _segments(offsets, branch_ids)
    counts = np.diff(first, append=len(branch))
    shared = np.where(branch[first] > 0, prefix_counts[row[first]], 0)
    num_keys = shared + counts
    begins = np.cumsum(num_keys) - num_keys
    place = np.arange(num_keys.sum()) - np.repeat(begins, num_keys)
    prefix, own = (np.repeat(x, num_keys) for x in (bounds[row[first]], first - shared))
    key_ids = np.where(place < np.repeat(shared, num_keys), prefix + place, own + place)
    cu_queries, cu_keys = (np.append(0, np.cumsum(x)).astype(np.int32) for x in (counts, num_keys))
    return KeyIndex(
        torch.from_numpy(key_ids),
        torch.from_numpy(cu_queries),
        torch.from_numpy(cu_keys),
        int(counts.max(initial=0)),
        int(num_keys.max(initial=0)),
    )


def index_prefixes(offsets: Tensor, branch_ids: Tensor) -> KeyIndex:
    """`index_keys` without repeated keys, for many branches; attention by it has no gradient.

    Raises:
        ValueError: the arguments are not as for `branch_attention`, on the CPU.
    """
    bounds, branch, _, first, prefix_counts = _segments(offsets, branch_ids)
    prefix_ends = bounds[:-1] + prefix_counts
    queries, keys = (np.zeros(2 * len(prefix_counts) + 1, np.int32) for _ in range(2))
    queries[1::2], queries[2::2] = prefix_ends, bounds[1:]
    keys[2::2] = prefix_counts.cumsum()
    keys[1::2] = keys[:-1:2]
    return KeyIndex(
        torch.from_numpy(np.flatnonzero(branch == 0)),
        torch.from_numpy(np.append(first, len(branch)).astype(np.int32)),
        torch.from_numpy(np.stack([queries, keys])),
        int(np.append(np.diff(first, append=len(branch)), np.diff(queries)).max(initial=0)),
        int(prefix_counts.max(initial=0)),
    )


def _segments(offsets: Tensor, branch_ids: Tensor) -> tuple[np.ndarray, ...]:
    """`offsets` and `branch_ids`, the row of each token, where segments begin, and the tokens of
    each row's prefix."""
    check_layout(offsets, branch_ids)
    bounds, branch = offsets.numpy(), branch_ids.numpy()
    row = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    is_first = np.ones(len(branch), bool)
    is_first[1:] = (row[1:] != row[:-1]) | (branch[1:] != branch[:-1])
    prefix_counts = np.bincount(row[branch == 0], minlength=len(bounds) - 1)
    return bounds, branch, row, np.flatnonzero(is_first), prefix_counts
