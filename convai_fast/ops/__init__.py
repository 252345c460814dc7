"""The custom operators, usable as functions and under `torch.compile`."""

from convai_fast import _native  # noqa: F401  (loads the compiled kernels)
from convai_fast.ops.add_norm import add_norm
from convai_fast.ops.branch_attention import branch_attention
from convai_fast.ops.cached_attention import cached_attention, make_cache
from convai_fast.ops.collate import collate, collate_shared
from convai_fast.ops.decode_attention import decode_attention
from convai_fast.ops.decoder_step import PackedDecoder, PackedLayers, decoder_step
from convai_fast.ops.dropout import draw_seed, dropout
from convai_fast.ops.gelu import ACTIVATIONS, gelu
from convai_fast.ops.key_index import KeyIndex, index_keys, index_prefixes
from convai_fast.ops.linear import linear
from convai_fast.ops.packed_linear import (
    BLOCK,
    PackedWeight,
    pack_weight,
    packed_bytes,
    packed_linear,
    product_instructions,
)
from convai_fast.ops.plan import LAYOUT_NUMBERS, PLAN_COLUMNS
from convai_fast.ops.rms_norm import rms_norm
from convai_fast.ops.rotate import rotate, rotation
from convai_fast.ops.sample import sample
from convai_fast.ops.swiglu import swiglu

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "LAYOUT_NUMBERS",
    "PLAN_COLUMNS",
    "KeyIndex",
    "PackedDecoder",
    "PackedLayers",
    "PackedWeight",
    "add_norm",
    "branch_attention",
    "cached_attention",
    "collate",
    "collate_shared",
    "decode_attention",
    "decoder_step",
    "draw_seed",
    "dropout",
    "gelu",
    "index_keys",
    "index_prefixes",
    "linear",
    "make_cache",
    "pack_weight",
    "packed_bytes",
    "packed_linear",
    "product_instructions",
    "rms_norm",
    "rotate",
    "rotation",
    "sample",
    "swiglu",
]
