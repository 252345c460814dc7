"""The run folder: options, metrics, TensorBoard events, and two checkpoints.

    runs/<time>_<host>_<model>/
        options.json  metrics.jsonl  events.out.tfevents…
        checkpoints/step-000120/    what `save_pretrained` writes, metrics.json, training_state.pt
        last -> checkpoints/step-000120
        best -> checkpoints/step-000080

A checkpoint is written beside its place, flushed to the disk and renamed; `last` and `best` are
links, replaced in one step. So at any moment each is complete or absent, and a kill while saving
loses nothing.
"""

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import socket
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter

from convai_fast.errors import UserError
from convai_fast.training.options import TrainOptions

STATE_FILE = "training_state.pt"
STATE_FORMAT = 1


def check_output(output: str) -> None:
    """Raise UserError if `output` cannot become a run folder; best known before hours of work."""
    path = Path(output)
    if output and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"{path} is not empty: choose another run folder with --output, or continue the run "
            f"that it holds with --resume"
        )


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
                f"{way_out}, and --resume restores the link"
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
    numbers = ((p.name.removeprefix("step-"), p) for p in (run / "checkpoints").glob("step-*"))
    return {int(number): path for number, path in numbers if number.isdecimal()}


class RunFolder:
    """Where a run leaves its traces. See the top of this file."""

    def __init__(self, options: TrainOptions, state: dict[str, Any] | None = None) -> None:
        """Make the folder, or with `options.resume` open that one as `state` describes it.

        Records and checkpoints of steps after `state` (without one: of all steps) are dropped, so
        that they are not there twice when those steps have been taken again.

        Raises UserError when `--output` is a folder that already holds a run or anything else, or
        when another process trains in the folder.
        """
        state = state or {"step": 0, "metrics_bytes": 0, "checksums": {}}
        self._checksums = state["checksums"]  # of the newest checkpoint
        self.path = Path(options.resume) if options.resume else _new_folder(options)
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if not _lock(self._metrics.fileno()):
            raise UserError(f"another process is training in {self.path}: stop that one first")
        if options.resume:
            _write_file(self.path / "options.json", _options_json(options))
            self._metrics.truncate(state["metrics_bytes"])
            # A kill may have come before both links named the checkpoint, or a copy lost them.
            for link, step in (("last", state["step"]), ("best", state.get("best_step"))):
                if step is not None and self._checkpoint(step).is_dir():
                    self._point(link, self._checkpoint(step))
                elif not (self.path / link).exists():
                    (self.path / link).unlink(missing_ok=True)
            self._remove_unused()
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self._writer = SummaryWriter(str(self.path), purge_step=state["step"] + 1)

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Record figures of optimizer step `step` in metrics.jsonl and in TensorBoard."""
        record = {"step": step, "split": split, **values}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def save(
        self,
        write_model: Callable[[Path], None],
        metrics: dict[str, Any],
        state: dict[str, Any],
        best: bool,
    ) -> None:
        """Save a checkpoint of step `state["step"]` as `last`, and as `best` too if it is.

        Args:
            write_model: writes model and tokenizer into a folder, which it makes.
            metrics: what metrics.json says.
            state: `Trainer.state_dict()`.

        Raises UserError when it cannot be written, as on a full disk; those before it stay.
        """
        try:
            folder = self._write_checkpoint(write_model, metrics, state)
            for link in ["last", "best"] if best else ["last"]:
                self._point(link, folder)
        # torch, safetensors and tokenizers turn the operating system's errors into their own.
        except Exception as error:
            cause = _cause(error)
            full = any(os.strerror(n) in str(cause) for n in (errno.ENOSPC, errno.EDQUOT))
            if not full and not isinstance(cause, (OSError, SafetensorError, UserError)):
                raise
            raise UserError(
                f"step {state['step']:,} cannot be saved in {self.path} ({cause}): "
                f"{'make room, then ' if full else ''}continue from the checkpoint before it with "
                f"--resume"
            ) from error
        self._remove_unused()

    def _write_checkpoint(
        self, write_model: Callable[[Path], None], metrics: dict[str, Any], state: dict[str, Any]
    ) -> Path:
        os.fsync(self._metrics.fileno())
        state = {**state, "metrics_bytes": os.fstat(self._metrics.fileno()).st_size}
        folder = self._checkpoint(state["step"])
        if folder.exists():
            # Saved before it was evaluated: the weights are those of the same step. A kill between
            # the two files does no harm, since it is the state that says what is still to do.
            # Their checksums too: those of now would bless a file that was damaged in between.
            state["checksums"] = self._checksums
            _write_file(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
            _write_state(folder / f".{STATE_FILE}", state)
            os.replace(folder / f".{STATE_FILE}", folder / STATE_FILE)
            _flush(folder)
        else:
            scratch = folder.with_name(f".{folder.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            write_model(scratch)
            (scratch / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
            state["checksums"] = self._checksums = _checksums(scratch)
            _write_state(scratch / STATE_FILE, state)
            for path in [*scratch.iterdir(), scratch]:
                _flush(path)
            os.rename(scratch, folder)
            _flush(folder.parent)
        return folder

    def set_aside(self, record: dict[str, Any]) -> Path:
        """Write `record`, of a step that ended the run, to bad_batch.json; returns its path.

        Numbers that JSON does not have are written as text: "nan", "inf".
        """
        path = self.path / "bad_batch.json"
        _write_file(path, json.dumps(_finite_or_text(record)) + "\n")
        return path

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def _point(self, link: str, folder: Path) -> None:
        scratch = self.path / f".{link}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(folder.relative_to(self.path), target_is_directory=True)
        os.replace(scratch, self.path / link)
        _flush(self.path)

    def _remove_unused(self) -> None:
        used = {(self.path / link).resolve() for link in ("last", "best")}
        for folder in (self.path / "checkpoints").glob("*"):
            if folder.resolve() not in used:
                shutil.rmtree(folder)

    def close(self) -> None:
        """Flush what is still buffered."""
        self._writer.close()
        self._metrics.close()


def is_busy(run: Path) -> bool:
    """Whether a process is training in the run folder `run` at this moment."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            return not _lock(file.fileno())
    except FileNotFoundError:
        return False


def read_training_state(folder: Path) -> dict[str, Any]:
    """What `RunFolder.save` wrote to continue from the checkpoint `folder`; executes nothing.

    Raises UserError when it is missing, damaged, or does not belong to the weights beside it.
    """
    path = folder / STATE_FILE
    way_out = f"start a new run from these weights with --model {folder}"
    checkpoint = folder.resolve()
    run = checkpoint.parents[1]
    saved = _saved_checkpoints(run)
    own_step = next((step for step, other in saved.items() if other.name == checkpoint.name), 0)
    older = [step for step in saved if step < own_step]
    if older:
        link = f"ln -sfn checkpoints/{saved[max(older)].name} {run / 'last'}"
        way_out = f"go on from an older checkpoint after `{link}`, or {way_out}"
    if not path.is_file():
        raise UserError(f"there is no {path}, without which a run cannot continue: {way_out}")
    try:
        # torch does not look at the checksums that its archives hold.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can raise nearly anything.
    except Exception as error:
        raise UserError(
            f"{path} is damaged or of another version of torch than {torch.__version__}: {way_out}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise UserError(
            f"{path} was not written by this version of convai-fast train (format "
            f"{STATE_FORMAT}): {way_out}"
        )
    for name, checksum in state["checksums"].items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise UserError(
                f"{folder / name} is missing or is not the file that was saved: get it back, or "
                f"{way_out}"
            )
    size, metrics = state["metrics_bytes"], folder.resolve().parents[1] / "metrics.jsonl"
    if not metrics.is_file() or metrics.stat().st_size < size:
        raise UserError(
            f"{metrics} is missing or has lost records that were saved: get it back, or {way_out}"
        )
    return state


def _new_folder(options: TrainOptions) -> Path:
    """The folder of a new run, which if it is new appears together with its options.json."""
    name = Path(options.model).name or "model"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    default = Path("runs") / f"{stamp}_{socket.gethostname()}_{name}"
    path = Path(options.output) if options.output else default
    check_output(str(path))
    # A folder that is there may be the one the command runs in: it is filled, not replaced.
    place = path.resolve()
    try:
        if place.is_dir():
            _write_file(place / "options.json", _options_json(options))
            return path
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".new-") as scratch:
            run = Path(scratch) / place.name
            run.mkdir()
            _write_file(run / "options.json", _options_json(options))
            os.rename(run, place)
    except OSError as error:
        raise UserError(f"cannot make the run folder {path}: {error.strerror}") from error
    return path


def _finite_or_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_or_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _options_json(options: TrainOptions) -> str:
    values = dataclasses.asdict(options)
    del values["resume"]
    return json.dumps(values, indent=2) + "\n"


def _lock(descriptor: int) -> bool:
    """Take the lock that a process holds on a run until it ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _write_file(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text, encoding="utf-8")
    _flush(scratch)
    os.replace(scratch, path)
    _flush(path.parent)


def _write_state(path: Path, state: dict[str, Any]) -> None:
    # Given a path instead of a file, torch keeps the operating system's reason to itself.
    with open(path, "wb") as file:
        torch.save(state, file)
    _flush(path)


def _cause(error: BaseException) -> BaseException:
    """The operating system's error that `error` came of; `error` itself if it came of none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def _flush(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of every file of weights in `folder`: safetensors has none of its own."""
    return {path.name: _checksum(path) for path in sorted(folder.glob("*.safetensors"))}


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value
