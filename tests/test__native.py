"""Which operators load beside which torch."""

import re
from pathlib import Path

import pytest
import torch

from convai_fast import _native
from convai_fast.errors import UserError

SOURCES = Path(__file__).parents[1] / "csrc" / "ops"


@pytest.mark.parametrize(
    ("here", "cuda", "built_against", "built_for_cuda"),
    [
        ("2.13.0", None, "2.13.0", None),
        ("2.13.1+cu130", "13.0", "2.13.0+cpu", None),
        ("2.13.0", "13.2", "2.13.0+cu130", "13.0"),
        ("2.13.0a0+git1", None, "2.13.0a0+git1", None),
    ],
)
def test_operators_load_beside_their_minor_version(
    here, cuda, built_against, built_for_cuda, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", here)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert _native._mismatch(built_against, built_for_cuda) is None


@pytest.mark.parametrize(
    ("here", "cuda", "built_against", "built_for_cuda", "says"),
    [
        ("2.14.0", None, "2.13.0", None, "against torch 2.13.0 and this is torch 2.14.0"),
        ("2.1.0", None, "2.13.0", None, "against torch 2.13.0 and this is torch 2.1.0"),
        ("2.13.0a0+git2", None, "2.13.0a0+git1", None, "this is torch 2.13.0a0+git2"),
        ("2.13.0+cpu", None, "2.13.0", "13.0", "for CUDA 13.0 and this is one for a CPU"),
        ("2.13.0", "12.8", "2.13.0", "13.0", "for CUDA 13.0 and this is one for CUDA 12.8"),
    ],
)
def test_other_operators_are_left_out_with_the_reason(
    here, cuda, built_against, built_for_cuda, says, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", here)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert says in _native._mismatch(built_against, built_for_cuda)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("CONVAI_FAST_ISA", "sse")
    with pytest.raises(UserError, match="must be portable, avx2, avx512 or avx512_bf16, not 'sse'"):
        _native._load()


def test_a_build_for_cuda_has_every_kernel_of_its_sources():
    texts = [source.read_text(encoding="utf-8") for source in SOURCES.glob("*/*.cu")]
    names = {name for text in texts for name in re.findall(r'm\.impl\("(\w+)"', text)}
    assert {"collate", "collate_shared", "sample"} <= names
    info = _native.native_info()
    is_here = info["loaded"] and info["build"] == "cuda"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    here = {name for name in names if has_kernel(f"convai_fast::{name}", "CUDA")}
    assert here == (names if is_here else set())
