"""Which device, and in which number format it computes."""

import platform
from pathlib import Path

import torch

from convai_fast.errors import UserError
from convai_fast.options import Precision


def resolve_device(name: str) -> torch.device:
    """The device called `name`, "auto" being CUDA where there is one; UserError if not there.

    One of several GPUs becomes the current one: what pins memory or compiles looks for it there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("nothing is computed there")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} is not available here: use cpu or auto") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def resolve_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The dtype that autocast computes in; "auto" is bf16 where the device multiplies it fast."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = cpu_multiplies_bf16()
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones.

    So do those with AMX, and AMD's with AVX512-BF16; on Intel's, that instruction takes as long as
    the float32 products that it replaces, and longer.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8")


def processor_name() -> str:
    """The CPU's name, such as "Intel(R) Xeon(R) Processor @ 2.80GHz"."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(": ", 1)[1]
    return platform.processor() or platform.machine()


def describe_cuda_devices() -> str:
    """Name and memory of each CUDA device, or "none"."""
    if not torch.cuda.is_available():
        return "none"
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices)
