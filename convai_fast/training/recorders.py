"""Where the figures of a run go beside its metrics.jsonl: TensorBoard, wandb, trackio."""

import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from convai_fast.errors import reason_of
from convai_fast.training.checkpoints import write_file

_ID_FILE = "run_id"


class Recorder(Protocol):
    """What figures are recorded in."""

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Record figures of optimizer step `step`."""

    def close(self) -> None:
        """Write what is still buffered."""


def open_recorders(
    report_to: tuple[str, ...], run: Path, step: int, config: Mapping[str, Any]
) -> list[Recorder]:
    """The recorders of these names, for a run that goes on after `step` with options `config`.

    Raises OSError when `run` cannot be written.
    """
    recorders: list[Recorder] = []
    for name in dict.fromkeys(report_to):
        if name == "tensorboard":
            recorders.append(TensorBoard(run, step))
        elif name != "none":
            recorders.append(Tracker(name, run, config))
    return recorders


class TensorBoard:
    """Its event files, in the run folder."""

    def __init__(self, run: Path, step: int) -> None:
        """Has TensorBoard drop what was recorded after `step`, whose steps are taken again."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run), purge_step=step + 1)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Raises OSError, as on a full disk."""
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Raises OSError, as on a full disk."""
        self._writer.close()


class Tracker:
    """A run of wandb or of trackio, whose functions have the same names.

    What fails there, as without a network, is one warning; nothing more is recorded then.
    """

    def __init__(self, package: str, run: Path, config: Mapping[str, Any]) -> None:
        """Begin there, or go on where a run of this folder began. OSError: it cannot be written."""
        self._package, self._run = package, None
        name = _id_of(run)
        own = {"id": name, "dir": str(run)} if package == "wandb" else {}
        self._run = self._tried(
            lambda: import_module(package).init(
                project=os.environ.get(f"{package.upper()}_PROJECT", "convai-fast"),
                name=name,
                resume="allow",
                config=dict(config),
                **own,
            )
        )

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Never raises."""
        named = {f"{split}/{name}": value for name, value in values.items()}
        if (run := self._run) is not None:
            self._tried(lambda: run.log(named, step=step))

    def close(self) -> None:
        """Never raises."""
        if (run := self._run) is not None:
            self._tried(run.finish)

    def _tried(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # of any of the packages that they are made of
            self._run = None
            print(
                f"warning: from here on nothing is recorded in {self._package} "
                f"({reason_of(error)}); metrics.jsonl has all figures",
                file=sys.stderr,
            )
            return None


def _id_of(run: Path) -> str:
    """The name under which trackers know the run in this folder, kept there for when it goes on."""
    file = run / _ID_FILE
    if not file.is_file():
        name = re.sub(r"[^\w.-]", "-", run.resolve().name)
        write_file(file, f"{name}-{secrets.token_hex(4)}\n")
    return file.read_text(encoding="utf-8").strip()
