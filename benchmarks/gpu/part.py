"""The process of one part: `python -m benchmarks.gpu.part NAME NOTES DEVICE SECONDS smoke|full`."""

import importlib
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.notes import Notes, Setting
from benchmarks.gpu.parts import PARTS


def main() -> None:
    """Run the part, or note which package it lacks."""
    name, path, device, seconds, size = sys.argv[1:]
    part, notes = PARTS[name], Notes(Path(path))
    missing = [package for package in part.packages if find_spec(package) is None]
    if missing:
        notes.not_run(name, f"not installed: {', '.join(missing)}")
        return
    setting = Setting(
        torch.device(device), smoke=size == "smoke", deadline=time.monotonic() + float(seconds)
    )
    if setting.is_gpu:
        torch.cuda.set_device(setting.device)
    importlib.import_module(f"benchmarks.gpu.{name}").run(notes, setting)


if __name__ == "__main__":
    main()
