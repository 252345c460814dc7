"""Checkpoints on the disk: how they are written, found, and read to continue a run.

    run/checkpoints/step-000120/    what `save_pretrained` writes, metrics.json, README.md (the
                                    card), training_state.pt

A checkpoint is written beside its place, flushed to the disk and renamed. So at any moment it is
complete or absent, and a kill while saving loses nothing.
"""

import errno
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from convai_fast.errors import UserError
from convai_fast.files import flush
from convai_fast.training.progress import Progress

STATE_FILE = "training_state.pt"
STATE_FORMAT = 2

# What the user can do about an error of the operating system.
_WAYS_OUT = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "get permission for it",
    errno.EPERM: "get permission for it",
    errno.EROFS: "get permission for it",
}


@dataclass
class TrainingState:
    """All but the weights that a run needs to continue, at an optimizer step.

    Tensors, numbers and texts only, so that it is read without executing anything.

    Attributes:
        identity: what must be the same for the rest to make sense.
        progress: how far the run is.
        optimizer: its own, whole where it is sharded.
        scaler, log: of the training step.
        random: of each rank, the state of its generators.
        adapter: what LoRA trains; None without it.
        seconds: how long the run has taken.
        metrics_bytes: the length of metrics.jsonl.
        checksums: of the weights beside it.
    """

    identity: dict[str, Any]
    progress: Progress
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    log: dict[str, Any]
    random: list[dict[str, Tensor]]
    adapter: dict[str, Tensor] | None
    seconds: float = 0.0
    metrics_bytes: int = 0
    checksums: dict[str, int] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write what `read_training_state` reads, complete or not at all."""
        values = {"format": STATE_FORMAT, **vars(self), "progress": vars(self.progress)}
        # Given a path instead of a file, torch keeps the operating system's reason to itself.
        _replace(path, lambda file: torch.save(values, file))


@contextmanager
def explained(what: str, then: str) -> Iterator[None]:
    """Make an error of the operating system, as on a full disk, one sentence.

    Args:
        what: what failed, with which the sentence begins.
        then: what to do once its cause is mended, with which it ends.

    Raises UserError in place of an OSError, however deep another library has buried it.
    """
    try:
        yield
    # torch, safetensors and tokenizers turn the operating system's errors into their own.
    except Exception as error:
        cause = _cause(error)
        code = next((n for n in _WAYS_OUT if os.strerror(n) in str(cause)), None)
        if code is None and not isinstance(cause, (OSError, SafetensorError, UserError)):
            raise
        reason = str(cause)
        if isinstance(cause, OSError) and cause.strerror:
            reason = f"{cause.strerror}{f': {cause.filename}' if cause.filename else ''}"
        way_out = f"{_WAYS_OUT[code]}, then " if code else ""
        raise UserError(f"{what} ({reason}): {way_out}{then}") from error


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `last` names, or where copying lost that link, the newest of `run`.

    None where nothing was saved yet. Every folder named `step-…` is complete: see the top of this
    file.

    Raises UserError when a link was copied as a folder, or when what `last` names is not there.
    """
    saved = _saved_checkpoints(run)
    newest = saved[max(saved)] if saved else None
    last = run / "last"
    for link in (last, run / "best"):
        if link.is_dir() and not link.is_symlink():
            way_out = "move it away"
            if newest is None:
                way_out = f"make it {run / 'checkpoints' / 'step-…'}, with the step in metrics.json"
            raise UserError(
                f"{link} is a folder, but was a link to a checkpoint before it was copied: "
                f"{way_out}, and `resume` restores the link"
            )
    if last.is_dir():
        return last
    if newest is None and last.is_symlink():
        raise UserError(
            f"{last} names a checkpoint that is not there: get {last.readlink()} back, or start a "
            f"new run"
        )
    return newest


def _saved_checkpoints(run: Path) -> dict[int, Path]:
    """Step -> folder of each checkpoint of `run`."""
    folders = (run / "checkpoints").glob("step-*")
    return {step: path for path in folders if (step := step_of(path)) is not None}


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None where it is not named so."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def read_training_state(folder: Path) -> TrainingState:
    """What `RunFolder.save` wrote to continue from the checkpoint `folder`; executes nothing.

    Raises UserError when it is missing, damaged, or does not belong to the weights beside it.
    """
    path = folder / STATE_FILE
    checkpoint = folder.resolve()
    run = checkpoint.parents[1]
    saved = _saved_checkpoints(run)
    own_step = step_of(checkpoint) or 0
    older, go_back = [step for step in saved if step < own_step], ""
    if older:
        link = f"ln -sfn checkpoints/{saved[max(older)].name} {run / 'last'}"
        go_back = f"go on from an older checkpoint after `{link}`, or "
    way_out = f"{go_back}start a new run from these weights with `model` {folder}"
    if not path.is_file():
        raise UserError(f"there is no {path}, without which a run cannot continue: {way_out}")
    try:
        # torch does not look at the checksums that its archives hold.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    # A damaged file can raise nearly anything.
    except Exception as error:
        raise UserError(
            f"{path} is damaged or of another version of torch than {torch.__version__}: {way_out}"
        ) from error
    if not isinstance(values, dict) or values.pop("format", None) != STATE_FORMAT:
        raise UserError(
            f"{path} was not written by this version of convai-fast train (format "
            f"{STATE_FORMAT}): {way_out}"
        )
    state = TrainingState(**{**values, "progress": Progress(**values["progress"])})
    for name, checksum in state.checksums.items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            if Path(name).suffix == ".safetensors":
                way_out = f"{go_back}start a new run"
            raise UserError(
                f"{folder / name} is missing or is not the file that was saved: get it back, or "
                f"{way_out}"
            )
    size, metrics = state.metrics_bytes, folder.resolve().parents[1] / "metrics.jsonl"
    if not metrics.is_file() or metrics.stat().st_size < size:
        raise UserError(
            f"{metrics} is missing or has lost records that were saved: get it back, or {way_out}"
        )
    return state


def write_file(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    _replace(path, lambda file: file.write(text.encode()))


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    scratch = path.with_name(f".{path.name}")
    try:
        with open(scratch, "wb") as file:
            write(file)
        flush(scratch)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)  # or it would keep a full disk full
        raise
    flush(path.parent)


def _cause(error: BaseException) -> BaseException:
    """The operating system's error that `error` came of; `error` itself if it came of none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of every file of weights in `folder`: safetensors has none of its own."""
    return {path.name: _checksum(path) for path in sorted(folder.glob("*.safetensors"))}


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value
