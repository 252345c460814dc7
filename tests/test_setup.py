"""What setup.py decides: which toolkit, architectures and torch, and whether there is OpenMP."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import Distribution
from setuptools.command.build_ext import build_ext

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

ROOT = Path(__file__).parents[1]
NVCC = """case $1 in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
--dryrun) echo "#$ TOP={home}/bin/.." >&2 ;;
--list-gpu-arch) echo "compute_80 compute_90" ;;
esac
"""


def script(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, beside a torch for CUDA 13 on a machine without a GPU."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("CONVAI_FAST_BUILD", "auto")
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    spec = importlib.util.spec_from_file_location("convai_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit; the nvcc on the PATH is a script in another folder that calls the toolkit's."""
    home = tmp_path / "cuda-13.0"
    script(home / "bin" / "nvcc", NVCC.format(home=home))
    script(tmp_path / "wrapper" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").write_text("inline int cudaGetLastError() { return 0; }")
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.a").write_text("!<arch>\n")  # an empty library
    monkeypatch.setenv("PATH", f"{tmp_path}/wrapper/bin", prepend=":")
    return home


def test_a_toolkit_is_found_behind_a_wrapper_script(setup_py, toolkit):
    kind, reason = setup_py.decide()
    assert (kind, os.environ["CUDA_HOME"]) == ("cuda", str(toolkit))
    assert f"the toolkit in {toolkit} is 13.0; for 8.0;9.0+PTX, as no GPU is visible" in reason
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"


def test_the_toolkit_is_the_one_torch_would_take(setup_py, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_PATH", "/path")
    assert setup_py.toolkit_home() == "/path"
    monkeypatch.setenv("CUDA_HOME", "/home")
    assert setup_py.toolkit_home() == "/home"
    monkeypatch.setattr(setup_py.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("CUDA_PATH", "")
    assert setup_py.toolkit_home() == "/usr/local/cuda"


@pytest.mark.parametrize("part", ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.a"])
def test_a_toolkit_with_a_part_that_does_not_work_is_not_used(setup_py, toolkit, monkeypatch, part):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (toolkit / part).write_text("damaged")
    kind, reason = setup_py.decide()
    assert kind == "cpu" and str(toolkit) in reason
    monkeypatch.setenv("CONVAI_FAST_BUILD", "cuda")
    with pytest.raises(SystemExit, match="CONVAI_FAST_BUILD=cuda: "):
        setup_py.decide()


@pytest.mark.parametrize("given, num_gpus", [("8.6", 0), ("8.6", 1), ("", 1), ("native", 1)])
def test_there_is_no_default_where_the_user_or_a_gpu_says(
    setup_py, toolkit, monkeypatch, given, num_gpus
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert setup_py.default_archs(str(toolkit), num_gpus) is None


def test_without_openmp_the_build_goes_on_and_says_so(setup_py, tmp_path, monkeypatch):
    without = tmp_path / "bin" / "clang++"
    script(without, 'case "$*" in *-fopenmp*) exit 1 ;; *) exec c++ "$@" ;; esac\n')
    monkeypatch.setenv("CXX", str(without))
    assert setup_py.links("int main() {}")
    assert setup_py.openmp("cpu", "why") == (
        [],
        f"why; on one thread, as {without} does not build with -fopenmp",
    )


@pytest.mark.parametrize("version", ["2.13.0", "2.13.1+cpu", "2.13.0a0+gitcf30153"])
def test_operators_ask_for_the_torch_they_were_built_against(setup_py, version):
    assert setup_py.torch_requirement(version) == "torch==2.13.*"
    assert setup_py.torch_requirement(None) == "torch>=2.11"


def test_a_wheel_leaves_what_the_clone_says_of_its_own_build(setup_py, tmp_path):
    distribution = Distribution()
    command = setup_py.commands(build_ext, {"build": "cpu"})["build_py"](distribution)
    command.ensure_finalized()
    command.build_lib = str(tmp_path)
    command.run()
    (written,) = tmp_path.rglob("*.json")
    assert written == tmp_path / "convai_fast" / setup_py.BUILD_INFO
    assert json.loads(written.read_text()) == {"build": "cpu"}


def test_a_source_distribution_holds_every_source(tmp_path):
    environment = {**os.environ, "CONVAI_FAST_BUILD": "none"}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    listed = next(tmp_path.rglob("SOURCES.txt")).read_text().splitlines()
    kinds = {".py", ".typed", ".cpp", ".h", ".cu", ".cuh"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("convai_fast", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    }
    assert sources <= set(listed) and len(sources) > 200
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} <= set(listed)
