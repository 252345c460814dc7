"""Build for CUDA, and load what was built."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.notes import Notes, Setting

ROOT = Path(__file__).parents[2]


def run(notes: Notes, setting: Setting) -> None:
    """Build in the tree; figures say what the other parts will load."""
    if setting.is_gpu:
        environment = {**os.environ, "CONVAI_FAST_BUILD": "cuda"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    else:
        notes.not_run("build", "only a GPU asks for it; measured is what is built already")
    from convai_fast._native import native_info

    info = native_info()
    notes.figure("native_info", **info)
    if setting.is_gpu and not info["loaded"]:
        raise RuntimeError(info["not_loaded_because"])
