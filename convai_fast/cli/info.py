"""`convai-fast info`: what a bug report should begin with; and what a model is."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from convai_fast import ops
from convai_fast._native import BACKEND, native_info
from convai_fast.cli.options.info import InfoOptions
from convai_fast.generation.backends.backend import WEIGHTS
from convai_fast.hardware import cpu_multiplies_bf16, describe_cuda_devices, processor_name

PACKAGES = ("convai-fast", "torch", "transformers", "tokenizers", "numpy")  # named in a report


def run(options: InfoOptions) -> None:
    """Print the table of the machine, or of a model."""
    rows = _of_model(options.model) if options.model else _of_this_machine()
    for name, value in rows.items():
        print(f"{name:<16} {value}")


def _of_model(path: str) -> dict[str, str]:
    from convai_fast.conversion import describe  # a report of this machine should need little

    return dict(describe(path))


def _of_this_machine() -> dict[str, str]:
    native = native_info()
    return {
        "convai_fast": package_version("convai-fast"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "tokenizers": package_version("tokenizers"),
        "built": f"{native['build']} operators ({native['reason']})",
        "built against": f"torch {native['torch']}" if native["torch"] else "nothing",
        "in use": (
            f"compiled operators, instruction set {native['isa']}"
            if native["loaded"]
            else f"plain PyTorch: {native['not_loaded_because']}"
        ),
        "backend": f"{BACKEND} (CONVAI_FAST_BACKEND)",
        "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads and "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "cpu products": ", ".join(
            f"{name} {ops.product_instructions(dtype)}" for name, dtype in WEIGHTS.items()
        ),
        "bf16 on the cpu": "faster than float32"
        if cpu_multiplies_bf16()
        else "no faster than float32",
        "cuda": describe_cuda_devices(),
    }


def machine_of(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where something was measured and in which precision, for a report."""
    native = native_info()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": processor_name(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "operators": native["isa"] if native["loaded"] else "plain PyTorch",
    }


def package_version(package: str) -> str:
    """The version of an installed package; a source tree on the path has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
