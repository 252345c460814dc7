"""The kernels' own tests, as a processor with fewer instructions would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convai_fast import _native

KERNELS = (
    *("branch_attention", "cached_attention", "collate", "decoder_step", "dropout", "gelu"),
    *("rms_norm", "rotate", "swiglu"),
)
OTHERS = ("branch_attention_grouped_heads", "packed_linear", "sample_kernel")
# For the others AVX-512 with and without BF16 is the same.
PACKED = ("cached_attention", "decoder_step", "packed_linear")
BELOW = {
    "avx512_bf16": ["portable", "avx2", "avx512"],
    "avx512": ["portable", "avx2"],
    "avx2": ["portable"],
}


def test_the_instruction_set_is_the_one_that_is_asked_for():
    if _native.host is not None and "CONVAI_FAST_ISA" in os.environ:
        assert _native.native_info()["isa"] == os.environ["CONVAI_FAST_ISA"]


@pytest.mark.skipif(_native.host is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_lower_instruction_sets_compute_the_same(isa):
    """In a process each, since the set is chosen when the kernels are loaded."""
    if isa not in BELOW.get(_native.native_info()["isa"], []):
        pytest.skip(f"this processor has nothing above {isa}")
    # What torch makes of an operator does not depend on the instructions within.
    others = "not lower and not opcheck and not graph and not emulator"
    names = PACKED if isa == "avx512" else (*KERNELS, *OTHERS)
    files = [Path(__file__).with_name(f"test_{name}.py") for name in names]
    # Other packages' plugins take longer to import than torch, and then nobody knows their options.
    no_plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    environment = {"CONVAI_FAST_ISA": isa, "OMP_NUM_THREADS": "1", **no_plugins}
    options = ["-q", "-x", "-o", "addopts=", "-k", others]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__, *files],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout
