"""What a part tells, and what it is told."""

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KINDS = ("figures", "failed", "not_run")


class Notes:
    """A file to which a part adds a line for each thing it has to tell: a kill loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, kind: str, name: str, value: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([kind, name, value]) + "\n")

    def figure(self, name: str, **values: Any) -> None:
        """What was measured of `name`."""
        self._write("figures", name, values)

    def fail(self, name: str, why: str) -> None:
        """What went wrong."""
        self._write("failed", name, why)

    def not_run(self, name: str, why: str) -> None:
        """What was left out."""
        self._write("not_run", name, why)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Around what may fail without ending the part."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(name, f"{type(error).__name__}: {error}"[:500])

    def read(self) -> dict[str, dict[str, Any]]:
        """All that was told, by kind and name."""
        told: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            kind, name, value = json.loads(line)
            told[kind][name] = value
        return {kind: values for kind, values in told.items() if values}


@dataclass(frozen=True)
class Setting:
    """Where and how much a part measures.

    Attributes:
        smoke: tiny shapes, to see that the part runs.
        deadline: of `time.monotonic`, after which the part is killed.
    """

    device: torch.device
    smoke: bool
    deadline: float

    @property
    def seconds_left(self) -> float:
        """Until the part is killed."""
        return self.deadline - time.monotonic()

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, as it should be."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        if self.is_gpu:
            torch.cuda.synchronize()
