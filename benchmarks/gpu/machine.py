"""The machine that figures are of: `python -m benchmarks.gpu.machine cuda` prints it."""

import json
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

from convai_fast.hardware import processor_name

# Files of the tree that differ from the commit, but for those of results.
_CHANGED = ("git", "status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")


def facts(device: torch.device) -> dict[str, Any]:
    """What tells one machine, driver, torch and tree from another; None where it is not known."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": properties.name if properties else processor_name(),
        "memory_gib": round(properties.total_memory / 2**30) if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _last_word("nvcc", "--version"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "processor": processor_name(),
        "commit": _first_line("git", "rev-parse", "HEAD"),
        "changed": bool(_first_line(*_CHANGED)),
    }


def _lines(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def _first_line(*command: str) -> str | None:
    return next(iter(_lines(*command)), None)


def _last_word(*command: str) -> str | None:
    lines = _lines(*command)
    return lines[-1].split()[-1] if lines else None


if __name__ == "__main__":
    print(json.dumps(facts(torch.device(sys.argv[1]))))
