"""The only importer of the compiled modules. Keeps the reason when one is missing.

`CONVAI_FAST_BACKEND=auto` (default) uses what is compiled and warns once when nothing is;
`native` raises with the reason instead; `reference` leaves the compiled modules out.
"""

import importlib
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import convai_fast.ops.schemas  # noqa: F401  (a kernel registers against a defined schema)
from convai_fast.errors import UserError

BACKEND = os.environ.get("CONVAI_FAST_BACKEND", "auto")
_BUILD_INFO = Path(__file__).with_name(f"_build_info.{sysconfig.get_config_var('SOABI')}.json")
_REBUILD = "run `make build`, or `pip install --no-build-isolation .`"

host: ModuleType | None = None
_reason: str | None = None  # why the operators run as plain PyTorch; None when they are compiled


def _build_info() -> dict[str, Any]:
    if not _BUILD_INFO.is_file():
        return {"build": "none", "reason": f"nothing has been built ({_REBUILD})"}
    return json.loads(_BUILD_INFO.read_text())


def _mismatch(built_against: str, built_for_cuda: str | None) -> str | None:
    """Why operators cannot be loaded beside this torch; None if they can.

    The binary interface of torch changes from one minor version to the next. It is the same in its
    builds for a CPU and for CUDA, so that operators for a CPU load beside both.
    """
    if _minor(built_against) != _minor(torch.__version__):
        return (
            f"the operators were built against torch {built_against} and this is torch "
            f"{torch.__version__}"
        )
    here = torch.version.cuda
    if built_for_cuda and (not here or here.split(".")[0] != built_for_cuda.split(".")[0]):
        return (
            f"the operators were built against a torch for CUDA {built_for_cuda} and this is one "
            f"for {f'CUDA {here}' if here else 'a CPU'}"
        )
    return None


def _minor(version: str) -> str:
    """2.13 of a release such as 2.13.0+cpu; a torch from between releases is like no other."""
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", version)
    return release[1] if release else version


def _load() -> str | None:
    """Load the compiled modules; the reason why not, if not."""
    global host
    if BACKEND not in ("auto", "native", "reference"):
        raise UserError(f"CONVAI_FAST_BACKEND must be auto, native or reference, not {BACKEND!r}")
    isa = os.environ.get("CONVAI_FAST_ISA", "avx512_bf16")
    if isa not in ("portable", "avx2", "avx512", "avx512_bf16"):
        raise UserError(
            f"CONVAI_FAST_ISA must be portable, avx2, avx512 or avx512_bf16, not {isa!r}"
        )
    if BACKEND == "reference":
        return "CONVAI_FAST_BACKEND=reference"
    info = _build_info()
    if info["build"] == "none":
        return info["reason"]
    if mismatch := _mismatch(info["torch"], info["cuda"]):
        return f"{mismatch}: install that one, or build again ({_REBUILD})"
    try:
        importlib.import_module("convai_fast._C")
        host = importlib.import_module("convai_fast._host")
    except ImportError as error:
        return f"the compiled modules do not load: {error} ({_REBUILD})"
    return None


def native_info() -> dict[str, Any]:
    """What is compiled and in use.

    Returns `build` ("cuda", "cpu" or "none"), `reason` (why that was built), `torch` and `cuda`
    (versions it was built against), `loaded` (bool), `not_loaded_because` (a sentence or None) and
    `isa` ("avx512_bf16", "avx512", "avx2" or "portable": the CPU kernels' instructions; or None).
    """
    return {
        "torch": None,
        "cuda": None,
        **_build_info(),
        "loaded": _reason is None,
        "not_loaded_because": _reason,
        "isa": host.isa() if host else None,
    }


def host_function(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function of that name; `otherwise` where nothing is compiled."""
    return getattr(host, name, otherwise)


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for the next tensor; a CPU trains a quarter faster.

    Without the compiled modules, or with another C library than glibc, it does nothing.
    """
    if host:
        host.keep_freed_memory()


def use_huge_pages(tensor: torch.Tensor) -> None:
    """Have a new tensor on the CPU lie in huge pages, where system and size allow it.

    What is read from front to back, as weights are, then comes from memory up to half again as
    fast. Without the compiled modules it does nothing.
    """
    if host:
        host.use_huge_pages(tensor.data_ptr(), tensor.nbytes)


_reason = _load()
if _reason is not None:
    if BACKEND == "native":
        raise UserError(f"CONVAI_FAST_BACKEND=native: {_reason}")
    if BACKEND == "auto":
        warnings.warn(f"convai_fast runs its operators as plain PyTorch: {_reason}", stacklevel=2)
