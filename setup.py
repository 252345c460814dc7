"""Builds the compiled modules: `_C` (operators, needs torch) and `_host` (pybind11).

    CONVAI_FAST_BUILD=auto   CUDA operators if torch has CUDA and a toolkit of the same major
                             version is there, else CPU operators; nothing without a compiler
    CONVAI_FAST_BUILD=cuda   CUDA operators, or fail
    CONVAI_FAST_BUILD=cpu    CPU operators, or fail
    CONVAI_FAST_BUILD=none   nothing: every operator runs as plain PyTorch

The decision rests on the toolkit and TORCH_CUDA_ARCH_LIST, never on a GPU being present.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
# Named like the modules, so that several Pythons can build in one clone.
BUILD_INFO = ROOT / "convai_fast" / f"_build_info.{sysconfig.get_config_var('SOABI')}.json"
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]


def toolkit_version() -> str | None:
    """The version of the CUDA toolkit whose nvcc would be used, such as "13.0"."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if not nvcc or not Path(nvcc).is_file():
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return output.split("release ")[1].split(",")[0] if "release " in output else None


def decide() -> tuple[str, str]:
    """What to build ("cuda", "cpu" or "none") and why."""
    wanted = os.environ.get("CONVAI_FAST_BUILD", "auto")
    if wanted not in ("auto", "cuda", "cpu", "none"):
        sys.exit(f"CONVAI_FAST_BUILD must be auto, cuda, cpu or none, not {wanted!r}")
    if wanted == "none":
        return "none", "CONVAI_FAST_BUILD=none"
    try:
        import torch
    except ImportError:
        sys.exit(
            "convai_fast builds its operators against your torch, which is not installed: run "
            "`pip install -c constraints.txt setuptools wheel pybind11 ninja numpy torch`, then "
            "`pip install --no-build-isolation .`"
        )

    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        reason = f"there is no C++ compiler {compiler!r} (install g++, or set CXX)"
        return ("none", reason) if wanted == "auto" else sys.exit(reason)
    if wanted == "cpu":
        return "cpu", "CONVAI_FAST_BUILD=cpu"

    toolkit, torch_cuda = toolkit_version(), torch.version.cuda
    if torch_cuda is None:
        no_cuda = f"torch {torch.__version__} is built without CUDA"
    elif toolkit is None:
        no_cuda = "there is no CUDA toolkit (no nvcc on the PATH or in CUDA_HOME)"
    elif toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        no_cuda = f"the CUDA toolkit is {toolkit} and torch is built for {torch_cuda}"
    else:
        return "cuda", f"torch is built for CUDA {torch_cuda} and the toolkit is {toolkit}"
    return ("cpu", no_cuda) if wanted == "auto" else sys.exit(f"CONVAI_FAST_BUILD=cuda: {no_cuda}")


def extensions(kind: str) -> tuple[list[Extension], dict]:
    """The extension modules for this kind of build, and the commands that build them."""
    if kind == "none":
        return [], {}
    try:
        import pybind11
    except ImportError:
        sys.exit("convai_fast builds its host module with pybind11: run `pip install pybind11`")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    def sources(*patterns: str) -> list[str]:
        paths = (path for pattern in patterns for path in glob(pattern, root_dir=ROOT))
        return sorted(paths)

    include = str(ROOT / "csrc" / "include")
    headers = sources(
        "csrc/*.h",
        "csrc/host/*.h",
        "csrc/include/convai_fast/*.h",
        "csrc/include/convai_fast/*.cuh",
    )
    operators = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    extension = CppExtension
    if kind == "cuda":
        extension = CUDAExtension
        operators += sources("csrc/cuda/*.cu")
    host = Extension(
        "convai_fast._host",
        sources("csrc/host/*.cpp"),
        depends=headers,
        include_dirs=[include, pybind11.get_include()],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )
    native = extension(
        "convai_fast._C",
        operators,
        depends=headers,
        include_dirs=[include],
        extra_compile_args={
            # With OpenMP, at::parallel_for uses the threads torch already has.
            "cxx": [*CXX_FLAGS, "-fopenmp"],
            "nvcc": ["-O3", "-std=c++20", "--extended-lambda"],
        },
        extra_link_args=["-fopenmp"],
    )
    return [native, host], {"build_ext": BuildExtension}


def write_build_info(kind: str, reason: str) -> None:
    """Leave beside the package what was built and why, for `convai-fast info`."""
    info = {"build": kind, "reason": reason, "torch": None, "cuda": None}
    if kind != "none":
        import torch

        info["torch"] = torch.__version__
        info["cuda"] = torch.version.cuda if kind == "cuda" else None
    BUILD_INFO.write_text(json.dumps(info) + "\n")


kind, reason = decide()
modules, commands = extensions(kind)
if {"build_ext", "build_py", "bdist_wheel", "editable_wheel", "develop"} & set(sys.argv[1:]):
    write_build_info(kind, reason)
    print(f"convai_fast: building {kind} operators: {reason}")

setup(
    ext_modules=modules,
    cmdclass=commands,
    package_data={"convai_fast": [BUILD_INFO.name]},
)
