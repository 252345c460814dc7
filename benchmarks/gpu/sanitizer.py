"""The kernels under `compute-sanitizer`: memory, races, barriers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.notes import Notes, Setting

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck")


def run(notes: Notes, setting: Setting) -> None:
    """Run `small_shapes` under each tool; by itself where there is no GPU."""
    program = [sys.executable, "-m", "benchmarks.gpu.small_shapes", str(setting.device)]
    if not setting.is_gpu:
        subprocess.run(program, cwd=ROOT, check=True)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or not setting.is_gpu:
        why = "there is no GPU" if sanitizer else "compute-sanitizer is not on the PATH"
        notes.not_run("sanitizer", why)
        return
    # Each tensor in memory of its own, so that what lies beyond it is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *program]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(done.stdout + done.stderr)
        found = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
        if done.returncode:
            notes.fail(tool, "; ".join(found) or f"exit code {done.returncode}")
        else:
            notes.figure(tool, errors=0)
