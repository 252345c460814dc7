"""The run folder: options, metrics, TensorBoard events, and two checkpoints.

    runs/<time>_<host>_<model>/
        options.json  metrics.jsonl  events.out.tfevents…
        checkpoints/step-000120/    what `save_pretrained` writes, and metrics.json
        last -> checkpoints/step-000120
        best -> checkpoints/step-000080

A checkpoint is written beside its place and renamed; `last` and `best` are links, replaced in one
step. So at any moment each is complete or absent, and a kill while saving loses nothing.
"""

import dataclasses
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerFast

from convai_fast.errors import UserError
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.options import TrainOptions


def check_output(output: str) -> None:
    """Raise UserError if `output` cannot become a run folder; best known before hours of work."""
    path = Path(output)
    if output and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is not empty: choose another run folder with --output")


class RunFolder:
    """Where a run leaves its traces. See the top of this file."""

    def __init__(self, options: TrainOptions) -> None:
        """Make the folder.

        Raises UserError when `--output` is a folder that already holds a run or anything else.
        """
        name = Path(options.model).name or "model"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        default = Path("runs") / f"{stamp}_{socket.gethostname()}_{name}"
        self.path = Path(options.output) if options.output else default
        check_output(str(self.path))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {self.path}: {error.strerror}") from error
        text = json.dumps(dataclasses.asdict(options), indent=2)
        (self.path / "options.json").write_text(text + "\n", encoding="utf-8")
        self._writer = SummaryWriter(str(self.path))
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Record figures of optimizer step `step` in metrics.jsonl and in TensorBoard."""
        record = {"step": step, "split": split, **values}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def save(
        self,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        step: int,
        metrics: dict[str, Any],
        best: bool,
    ) -> None:
        """Save a checkpoint as `last`, and as `best` too if it is."""
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        if not folder.exists():
            scratch = folder.with_name(f".{folder.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            model.save_pretrained(scratch, tokenizer)
            (scratch / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
            os.rename(scratch, folder)
        for link in ["last", "best"] if best else ["last"]:
            self._point(link, folder)
        self._remove_unused()

    def _point(self, link: str, folder: Path) -> None:
        scratch = self.path / f".{link}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(folder.relative_to(self.path), target_is_directory=True)
        os.replace(scratch, self.path / link)

    def _remove_unused(self) -> None:
        used = {(self.path / link).resolve() for link in ("last", "best")}
        for folder in (self.path / "checkpoints").iterdir():
            if folder.resolve() not in used:
                shutil.rmtree(folder)

    def close(self) -> None:
        """Flush what is still buffered."""
        self._writer.close()
        self._metrics.close()
