"""The custom operators, usable as functions and under `torch.compile`."""

from convai_fast import _native  # noqa: F401  (loads the compiled kernels)
from convai_fast.ops.branch_attention import branch_attention
from convai_fast.ops.cached_attention import PANEL, cached_attention
from convai_fast.ops.collate import PLAN_COLUMNS, collate, collate_shared
from convai_fast.ops.dropout import draw_seed, dropout
from convai_fast.ops.key_index import KeyIndex, index_keys
from convai_fast.ops.packed_linear import (
    BLOCK,
    PackedWeight,
    pack_weight,
    packed_linear,
    product_instructions,
)
from convai_fast.ops.sample import sample

__all__ = [
    "BLOCK",
    "PANEL",
    "PLAN_COLUMNS",
    "KeyIndex",
    "PackedWeight",
    "branch_attention",
    "cached_attention",
    "collate",
    "collate_shared",
    "draw_seed",
    "dropout",
    "index_keys",
    "pack_weight",
    "packed_linear",
    "product_instructions",
    "sample",
]
