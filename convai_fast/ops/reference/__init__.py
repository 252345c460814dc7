"""Every operator in plain Python and PyTorch: the specification, written to be read.

The compiled kernels are tested against these functions, which also serve where nothing is compiled.
"""

from convai_fast.ops.reference.add_norm import add_norm
from convai_fast.ops.reference.branch_attention import branch_attention, branch_attention_backward
from convai_fast.ops.reference.cached_attention import cached_attention
from convai_fast.ops.reference.collate import collate, collate_shared
from convai_fast.ops.reference.decode_attention import decode_attention
from convai_fast.ops.reference.decoder_step import decoder_step
from convai_fast.ops.reference.dropout import dropout
from convai_fast.ops.reference.gelu import gelu, gelu_backward
from convai_fast.ops.reference.linear import linear, linear_backward
from convai_fast.ops.reference.packed_linear import ACTIVATIONS, packed_linear
from convai_fast.ops.reference.philox import philox, philox_words
from convai_fast.ops.reference.rms_norm import rms_norm, rms_norm_backward
from convai_fast.ops.reference.rotate import rotate, rotation
from convai_fast.ops.reference.sample import filter_probabilities, sample
from convai_fast.ops.reference.swiglu import swiglu, swiglu_backward

__all__ = [
    "ACTIVATIONS",
    "add_norm",
    "branch_attention",
    "branch_attention_backward",
    "cached_attention",
    "collate",
    "collate_shared",
    "decode_attention",
    "decoder_step",
    "dropout",
    "filter_probabilities",
    "gelu",
    "gelu_backward",
    "linear",
    "linear_backward",
    "packed_linear",
    "philox",
    "philox_words",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "rotation",
    "sample",
    "swiglu",
    "swiglu_backward",
]
