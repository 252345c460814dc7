"""The run folder: options, metrics, what TensorBoard reads, and two checkpoints.

    runs/<time>_<host>_<model>/
        options.yaml  metrics.jsonl
        events.out.tfevents…  run_id    see `recorders.py`
        checkpoints/step-000120/    see `checkpoints.py`
        last -> checkpoints/step-000120
        best -> checkpoints/step-000080
        base/                       what a LoRA adapter needs of another run; see `lora.py`

`last` and `best` are links, replaced in one step.
"""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Self, TextIO

from convai_fast.archive import name_of
from convai_fast.errors import UserError
from convai_fast.files import flush, is_free, move_whole, scratch_folder, try_lock
from convai_fast.model.card import CARD, model_card
from convai_fast.options import as_yaml, options_file
from convai_fast.training.checkpoints import (
    STATE_FILE,
    TrainingState,
    checksums,
    explained,
    write_file,
)
from convai_fast.training.options import TrainOptions
from convai_fast.training.recorders import open_recorders

# Folders in checkpoints/ that were made here; all else there is the user's.
_OWN_NAME = re.compile(r"\.?step-\d+")


def check_output(output: str) -> None:
    """Raise UserError if `output` cannot become a run folder; best known before hours of work."""
    path = Path(output)
    with explained(f"{path} cannot become a run folder", "begin again, or name another `output`"):
        can_be_made = not output or is_free(path) or _has_not_begun(path)
    if not can_be_made:
        is_run = options_file(path) is not None
        if is_run and (path / "metrics.jsonl").exists():
            with Claim() as claim:
                claim.take(path)  # raises when another process trains there, as of the same command
        what = "is not empty" if path.is_dir() else "is a file"
        resume = ", or continue the run that it holds with `resume`" if is_run else ""
        raise UserError(f"{path} {what}: choose another run folder with `output`{resume}")


class Claim:
    """The run folder in which this process alone may train. A context manager.

    A run is claimed when it is made or, to be continued, when it is chosen, before what it saved
    is read: of two processes that look for one at the same moment each gets its own.
    """

    def __init__(self) -> None:
        self.metrics: TextIO | None = None  # open, and locked

    def take(self, run: Path) -> None:
        """Raises UserError when another process trains in `run`, or it cannot be written."""
        with _explained(run, "cannot be written"):
            is_free = self.try_take(run)
        if not is_free:
            raise UserError(f"another process is training in {run}: stop that one first")

    def try_take(self, run: Path) -> bool:
        """Whether no other process trains in `run`; raises OSError when it cannot be written."""
        metrics = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if not try_lock(metrics.fileno()):
            metrics.close()
            return False
        self.metrics = metrics
        return True

    def release(self) -> None:
        """Let others train there."""
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be written has been reported
            self.release()


class RunFolder:
    """Where a run leaves its traces. See the top of this file."""

    def __init__(
        self,
        options: TrainOptions,
        state: TrainingState | None = None,
        claim: Claim | None = None,
    ) -> None:
        """Make the folder, or with `options.resume` open that one as `state` describes it.

        `claim` is of that folder, if it is claimed already.

        Records and checkpoints of steps after `state` (without one: of all steps) are dropped, so
        that they are not there twice when those steps have been taken again.

        Raises UserError when `--output` is a folder that already holds a run or anything else, or
        when another process trains in the folder.
        """
        self._checksums = state.checksums if state else {}  # of the newest checkpoint
        claim = claim or Claim()
        self.path = Path(options.resume) if options.resume else _new_folder(options, claim)
        self._check_links()
        if claim.metrics is None:
            claim.take(self.path)
        assert claim.metrics is not None
        self._metrics = claim.metrics
        try:
            with self._explained("cannot be written"):
                self._open(options, state)
        except UserError:
            self._metrics.close()  # and with it the lock
            raise

    def _open(self, options: TrainOptions, state: TrainingState | None) -> None:
        step = state.progress.step if state else 0
        if options.resume:
            write_file(self.path / "options.yaml", _options_yaml(options))
            (self.path / "options.json").unlink(missing_ok=True)  # of an earlier version
            self._metrics.truncate(state.metrics_bytes if state else 0)
            # A kill may have come before both links named the checkpoint, or a copy lost them.
            for link, own_step in (
                ("last", step),
                ("best", state.progress.best_step if state else 0),
            ):
                if self._checkpoint(own_step).is_dir():
                    self._point(link, self._checkpoint(own_step))
                elif not (self.path / link).exists():
                    (self.path / link).unlink(missing_ok=True)
            self._remove_unused()
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self._recorders = open_recorders(options.report_to, self.path, step, _values_of(options))

    def _check_links(self) -> None:
        """Raise UserError on a file system without links, best known before hours of work."""
        probe = self.path / ".link"
        try:
            probe.unlink(missing_ok=True)
            probe.symlink_to("nowhere")
            probe.unlink()
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                return  # what else is wrong is said where it matters
            raise UserError(
                f"no symbolic link can be made in {self.path} ({error.strerror}), as a run needs "
                "for its last and best checkpoint: choose another file system with `output`"
            ) from error

    def _explained(self, what: str) -> AbstractContextManager[None]:
        return _explained(self.path, what)

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Record figures of optimizer step `step` in metrics.jsonl and where `report_to` says.

        Raises UserError when they cannot be written, as on a full disk.
        """
        record = {"step": step, "split": split, **values}
        with self._explained(f"cannot record the figures of step {step:,}"):
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
            for recorder in self._recorders:
                recorder.log(step, split, values)

    def save(
        self,
        write_model: Callable[[Path], None],
        metrics: dict[str, Any],
        state: TrainingState,
        best: bool,
    ) -> None:
        """Save a checkpoint of `state.progress.step` as `last`, and as `best` too if it is.

        Args:
            write_model: writes model and tokenizer into a folder, which it makes.
            metrics: what metrics.json says.
            state: its `metrics_bytes` and `checksums` are filled in here.

        Raises UserError when it cannot be written, as on a full disk; those before it stay.
        """
        saved = (self.path / "last").exists()
        with explained(
            f"step {state.progress.step:,} cannot be saved in {self.path}",
            f"{'continue from the checkpoint before it' if saved else 'begin again'} with `resume`",
        ):
            folder = self._write_checkpoint(write_model, metrics, state)
            for link in ["last", "best"] if best else ["last"]:
                self._point(link, folder)
        self._remove_unused()

    def _write_checkpoint(
        self, write_model: Callable[[Path], None], metrics: dict[str, Any], state: TrainingState
    ) -> Path:
        os.fsync(self._metrics.fileno())
        state.metrics_bytes = os.fstat(self._metrics.fileno()).st_size
        folder = self._checkpoint(state.progress.step)
        if folder.exists():
            # Saved before it was evaluated: the weights are those of the same step. A kill between
            # the two files does no harm, since it is the state that says what is still to do.
            # Their checksums too: those of now would bless a file that was damaged in between.
            state.checksums = self._checksums
            write_file(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
            write_file(folder / CARD, model_card(folder))
            state.write(folder / STATE_FILE)
            return folder
        scratch = folder.with_name(f".{folder.name}")
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            write_model(scratch)
            (scratch / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
            (scratch / CARD).write_text(model_card(scratch), encoding="utf-8")
            state.checksums = self._checksums = checksums(scratch)
            state.write(scratch / STATE_FILE)
            move_whole(scratch, folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)  # or it would keep a full disk full
            raise
        return folder

    def set_aside(self, record: dict[str, Any]) -> Path:
        """Write `record`, of a step that ended the run, to bad_batch.json; returns its path.

        Numbers that JSON does not have are written as text: "nan", "inf".

        Raises UserError when it cannot be written.
        """
        path = self.path / "bad_batch.json"
        with explained(f"{path} cannot be written", "train again to see what was in it"):
            write_file(path, json.dumps(_finite_or_text(record)) + "\n")
        return path

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def _point(self, link: str, folder: Path) -> None:
        scratch = self.path / f".{link}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(folder.relative_to(self.path), target_is_directory=True)
        os.replace(scratch, self.path / link)
        flush(self.path)

    def _remove_unused(self) -> None:
        used = {(self.path / link).resolve() for link in ("last", "best")}
        for folder in (self.path / "checkpoints").glob("*"):
            is_own = _OWN_NAME.fullmatch(folder.name) and not folder.is_symlink()
            if not is_own or not folder.is_dir() or folder.resolve() in used:
                continue
            # Under its own name a checkpoint is complete, also while it is removed.
            doomed = folder.with_name(f".{folder.name.removeprefix('.')}")
            try:
                os.replace(folder, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                print(f"warning: {folder} cannot be removed: {error.strerror}", file=sys.stderr)

    def close(self) -> None:
        """Flush what is still buffered."""
        for close in (*(recorder.close for recorder in self._recorders), self._metrics.close):
            try:
                close()
            except OSError as error:
                print(
                    f"warning: the last figures of {self.path} are lost: {error.strerror}",
                    file=sys.stderr,
                )


def _explained(run: Path, what: str) -> AbstractContextManager[None]:
    return explained(f"the run {run} {what}", f"continue it with `resume` {run}")


def _new_folder(options: TrainOptions, claim: Claim) -> Path:
    """The folder of a new run, which if it is new appears with its options.yaml, and claimed."""
    check_output(options.output)
    name = name_of(options.model)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    default = Path("runs") / f"{stamp}_{socket.gethostname()}_{name}"
    path = Path(options.output or default)
    with explained(
        f"the run folder {path} cannot be made", "begin again, or name another `output`"
    ):
        # A folder that is there may be the one the command runs in: it is filled, not replaced.
        if options.output and path.is_dir():
            claim.take(path)
            check_output(options.output)  # another run may have begun there meanwhile
            try:
                write_file(path / "options.yaml", _options_yaml(options))
                flush(path)
            except BaseException:
                with suppress(OSError):
                    (path / "options.yaml").unlink()
                raise
            return path
        place = path.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(place.parent, ".new-") as scratch:
            run = scratch / place.name
            run.mkdir()
            claim.try_take(run)
            write_file(run / "options.yaml", _options_yaml(options))
            for number in itertools.count(2):
                try:
                    os.rename(run, place)
                    break
                except OSError as error:
                    # Another run has begun in the same second.
                    if options.output or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    path = default.with_name(f"{default.name}-{number}")
                    place = path.resolve()
    return path


def _has_not_begun(run: Path) -> bool:
    """Whether there is only the file by which a run claims its folder, with nothing in it."""
    claim = run / "metrics.jsonl"
    names = [path.name for path in run.iterdir() if not path.name.startswith(".")]
    return names == [claim.name] and claim.stat().st_size == 0


def _finite_or_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_or_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _options_yaml(options: TrainOptions) -> str:
    return as_yaml(_values_of(options))


def _values_of(options: TrainOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    del values["resume"], values["output"]  # so that a run like this one may begin elsewhere
    return values
