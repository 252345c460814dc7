"""The custom operators, usable as functions and under `torch.compile`."""

from convai_fast import _native  # noqa: F401  (loads the compiled kernels)
from convai_fast.ops.branch_attention import branch_attention
from convai_fast.ops.cached_attention import cached_attention
from convai_fast.ops.collate import PLAN_COLUMNS, collate, collate_shared
from convai_fast.ops.dropout import dropout
from convai_fast.ops.packed_linear import PackedWeight, pack_weight, packed_linear
from convai_fast.ops.sample import sample

__all__ = [
    "PLAN_COLUMNS",
    "PackedWeight",
    "branch_attention",
    "cached_attention",
    "collate",
    "collate_shared",
    "dropout",
    "pack_weight",
    "packed_linear",
    "sample",
]
