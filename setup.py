"""Builds the compiled modules: `_C` (operators, needs torch) and `_host` (pybind11).

    CONVAI_FAST_BUILD=auto   CUDA operators if torch has CUDA and a toolkit of the same major
                             version is there, else CPU operators; nothing without a compiler
    CONVAI_FAST_BUILD=cuda   CUDA operators, or fail
    CONVAI_FAST_BUILD=cpu    CPU operators, or fail
    CONVAI_FAST_BUILD=none   nothing: every operator runs as plain PyTorch

Which of them rests on torch and the toolkit, never on a GPU being present. CUDA operators are
compiled for TORCH_CUDA_ARCH_LIST; where it is not set, for the visible GPUs, and else for ARCHS.

Compiled operators load beside the minor version of torch that they were built against, and so what
is installed asks for that one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Named like the modules, so that several Pythons can build in one clone.
BUILD_INFO = f"_build_info.{sysconfig.get_config_var('SOABI')}.json"
DEPENDENCIES = [
    "jinja2>=3.1.6",  # transformers' condition for chat templates
    "numpy>=2.0",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.0",
    "zstandard>=0.23",
]
TORCH = "torch>=2.11"
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
ARCHS = ["7.5", "8.0", "9.0+PTX"]  # newer GPUs compile the PTX themselves
USUAL_TOOLKIT = "/usr/local/cuda"

OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
CUDA_PROGRAM = "#include <cuda_runtime.h>\nint main() { return cudaGetLastError(); }\n"


def output_of(*command: str) -> str:
    """What a command prints; nothing if it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout + result.stderr


def cxx() -> list[str]:
    """The C++ compiler that the build takes, as a command."""
    return shlex.split(os.environ.get("CXX") or "c++")


def links(program: str, *flags: str) -> bool:
    """Whether the C++ compiler makes an executable of this program."""
    names = ("CPPFLAGS", "CXXFLAGS", "LDFLAGS")  # the build takes them too
    given = [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "program.cpp"
        source.write_text(program)
        executable = source.with_suffix("")
        output_of(*cxx(), str(source), "-o", str(executable), *given, *flags)
        return executable.exists()


def toolkit_home() -> str:
    """The folder of the CUDA toolkit, looked for where torch looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if home or not nvcc:
        return home or USUAL_TOOLKIT
    # The nvcc on the PATH may be a script that calls the toolkit's, which knows where it is.
    top = re.search(r"TOP=(.+)", output_of(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))
    return os.path.realpath(top[1].strip() if top else Path(nvcc).resolve().parents[1])


def toolkit_version(home: str) -> str | None:
    """The version of the CUDA toolkit in this folder, such as "13.0"; None if none is there."""
    release = re.search(r"release ([\d.]+)", output_of(f"{home}/bin/nvcc", "--version"))
    return release[1] if release else None


def has_cuda_runtime(home: str) -> bool:
    """Whether the header and the library that every CUDA extension needs are in the toolkit."""
    lib = "lib64" if Path(home, "lib64").exists() else "lib"  # as torch chooses
    return links(CUDA_PROGRAM, f"-I{home}/include", f"-L{home}/{lib}", "-lcudart")


def default_archs(home: str, num_gpus: int) -> str | None:
    """The ARCHS this toolkit knows, where neither the user nor a visible GPU says which."""
    if num_gpus or os.environ.get("TORCH_CUDA_ARCH_LIST", "") not in ("", "native"):
        return None
    known = output_of(f"{home}/bin/nvcc", "--list-gpu-arch").split()
    return ";".join(a for a in ARCHS if "compute_" + re.sub(r"\D", "", a) in known)


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
            "convai_fast builds its operators against your torch, which this build does not see: "
            "run `pip install -c constraints.txt 'setuptools>=77' pybind11 ninja numpy torch`, "
            "then `pip install --no-build-isolation .`"
        )

    if shutil.which(cxx()[0]) is None:
        reason = f"there is no C++ compiler {cxx()[0]!r} (install g++, or set CXX)"
        return ("none", reason) if wanted == "auto" else sys.exit(reason)
    if wanted == "cpu":
        return "cpu", "CONVAI_FAST_BUILD=cpu"

    home, torch_cuda = toolkit_home(), torch.version.cuda
    toolkit = toolkit_version(home)
    if torch_cuda is None:
        no_cuda = f"torch {torch.__version__} is built without CUDA"
    elif toolkit is None:
        no_cuda = f"there is no CUDA toolkit in {home} (put its nvcc on the PATH, or set CUDA_HOME)"
    elif toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        no_cuda = f"the CUDA toolkit in {home} is {toolkit} and torch is built for {torch_cuda}"
    elif not has_cuda_runtime(home):
        no_cuda = f"the CUDA toolkit in {home} lacks cuda_runtime.h or libcudart.so"
    else:
        os.environ["CUDA_HOME"] = home  # read when torch.utils.cpp_extension is imported
        reason = f"torch is built for CUDA {torch_cuda} and the toolkit in {home} is {toolkit}"
        if archs := default_archs(home, torch.cuda.device_count()):
            os.environ["TORCH_CUDA_ARCH_LIST"] = archs
            reason += f"; for {archs}, as no GPU is visible and TORCH_CUDA_ARCH_LIST is not set"
        return "cuda", reason
    return ("cpu", no_cuda) if wanted == "auto" else sys.exit(f"CONVAI_FAST_BUILD=cuda: {no_cuda}")


def openmp(kind: str, reason: str) -> tuple[list[str], str]:
    """The flags for OpenMP, if the compiler has it, and the reason with a word on it if not."""
    if kind == "none" or links(OPENMP_PROGRAM, "-fopenmp"):
        return ["-fopenmp"], reason
    return [], f"{reason}; on one thread, as {cxx()[0]} does not build with -fopenmp"


def extensions(kind: str, openmp_flags: list[str]) -> tuple[list[Extension], type]:
    """The extension modules for this kind of build, and the command that builds them."""
    if kind == "none":
        return [], build_ext
    try:
        import pybind11
    except ImportError:
        sys.exit("convai_fast builds its host module with pybind11: run `pip install pybind11`")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    def sources(*patterns: str) -> list[str]:
        paths = (
            path for pattern in patterns for path in glob(pattern, root_dir=ROOT, recursive=True)
        )
        return sorted(paths)

    include = str(ROOT / "csrc")
    headers = sources("csrc/**/*.h", "csrc/**/*.cuh")
    operators = sources("csrc/ops/*.cpp", "csrc/ops/*/*.cpp")
    extension = CppExtension
    if kind == "cuda":
        extension = CUDAExtension
        operators += sources("csrc/ops/*/*.cu")
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
            "cxx": [*CXX_FLAGS, *openmp_flags],
            "nvcc": ["-O3", "-std=c++20", "--extended-lambda"],
        },
        extra_link_args=openmp_flags,
    )
    return [native, host], BuildExtension


def built_against(kind: str) -> dict[str, str | None]:
    """The versions of torch and of its CUDA that compiled operators need."""
    if kind == "none":
        return {"torch": None, "cuda": None}
    import torch

    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if kind == "cuda" else None,
    }


def torch_requirement(version: str | None) -> str:
    """What an installation asks pip for, with operators built against this version of torch."""
    return f"torch=={'.'.join(version.split('.')[:2])}.*" if version else TORCH


def commands(build_modules: type, info: dict[str, str | None]) -> dict[str, type]:
    """Commands that leave what was built, and why, beside what they build: `convai-fast info`."""

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BUILD_INFO).write_text(json.dumps(info) + "\n")

    class BuildModules(build_modules):
        def run(self) -> None:
            super().run()
            write(Path(self.get_ext_fullpath("convai_fast._C")).parent)

    class BuildPython(build_py):
        def run(self) -> None:
            super().run()
            write((ROOT if self.editable_mode else Path(self.build_lib)) / "convai_fast")

    return {"build_ext": BuildModules, "build_py": BuildPython}


def main() -> None:
    """Decide, say so, and build."""
    kind, reason = decide()
    openmp_flags, reason = openmp(kind, reason)
    modules, build_modules = extensions(kind, openmp_flags)
    versions = built_against(kind)
    if {"build_ext", "build_py", "bdist_wheel", "editable_wheel", "develop"} & set(sys.argv[1:]):
        print(f"convai_fast: building {kind} operators: {reason}")
    setup(
        ext_modules=modules,
        cmdclass=commands(build_modules, {"build": kind, "reason": reason, **versions}),
        install_requires=[*DEPENDENCIES, torch_requirement(versions["torch"])],
        # Through the hook that setuptools would install, type checkers and editors see nothing.
        options={"editable_wheel": {"mode": "compat"}},
    )


if __name__ == "__main__":  # pip runs this file under that name too
    main()
