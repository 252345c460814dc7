"""Which run `--resume` continues, with which options, and what must be as it was."""

import dataclasses
import shlex
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convai_fast.data.readers.user_function import is_function
from convai_fast.errors import UserError
from convai_fast.files import read_json
from convai_fast.options import options_file, options_of, read_options
from convai_fast.training.checkpoints import last_checkpoint, step_of
from convai_fast.training.options import TrainOptions
from convai_fast.training.run_folder import Claim

if TYPE_CHECKING:
    from convai_fast.training.loop import Trainer

# What may be given anew: how long to train, how often to save and to report, where things are.
CHANGEABLE = (
    "n_epochs",
    "max_steps",
    "patience",
    "eval_every",
    "save_every",
    "log_every",
    "report_to",
    "dataset_path",
    "dataset_cache",
    "device",
)


def resolve_resume(
    options: TrainOptions, given: Collection[str] | None, claim: Claim
) -> TrainOptions:
    """The options to train with: those of the run that `options.resume` names or finds.

    `resume` of the result is the folder of the run, or empty if a new run is to begin.

    Args:
        given: the options that were named on purpose; None: all that differ from the default.
        claim: takes the run that is to be continued.

    A reader that is a function of the user's is code, and a run folder may come from anybody: what
    the folder names is never run unless it was named in `given` too.

    Raises UserError when the folder is no run, its options are not the given ones, or another
    process trains there.
    """
    if given is None:
        default = TrainOptions()
        names = (field.name for field in dataclasses.fields(options))
        given = [name for name in names if getattr(options, name) != getattr(default, name)]
    named = options.output if options.resume == "auto" else options.resume
    if options.resume != "auto" or (named and options_file(Path(named))):
        merged = _merge(options, given, Path(named))
        claim.take(Path(named))
        return merged
    runs = (
        () if named else sorted(filter(None, map(options_file, Path("runs").glob("*"))), key=_age)
    )
    for run in (path.parent for path in runs):
        if _is_finished(run):
            continue
        with suppress(UserError):  # the run of another command, or of a process that trains there
            merged = _merge(options, given, run, changeable=())
            claim.take(run)
            if not _is_finished(run):
                return merged
            claim.release()
    return dataclasses.replace(options, resume="")


def resume_command(options: TrainOptions, run: Path) -> str:
    """The command that continues `run`, which was started with `options`."""
    folder = shlex.quote(str(run))
    if any(map(is_function, options.reader)):
        return f"convai-fast train --resume {folder} --reader {shlex.join(options.reader)}"
    return f"convai-fast train --resume {folder}"


def describe_kept(options: TrainOptions, run: Path) -> Iterator[str]:
    """What there is of `run` when it ends without saving, and how it goes on from there."""
    last = last_checkpoint(run)
    if last is None:
        yield f"stopped without saving: {run} holds nothing"
        return
    yield f"stopped without saving: {run} holds nothing of steps after {step_of(last.resolve()):,}"
    yield f"continue from there: {resume_command(options, run)}"


def identity_of(run: "Trainer") -> dict[str, Any]:
    """What must be the same for the position in the epoch and the tensors to mean the same."""
    options, store = dataclasses.asdict(run.options), run.batches.store
    fixed = options.keys() - {*CHANGEABLE, "resume", "output"}
    return {
        **({"base model": run.lora.base_checksum} if run.lora else {}),
        "model shape (config.json)": run.model.config.to_transformers(),
        "tokenizer": store.meta["tokenizer"],
        "set of dialogues": store.meta["fingerprint"],
        "weighting of data sets": [source.weight for source in run.trained_with.sources],
        **{f"`{name}`": options[name] for name in sorted(fixed)},
    }


def check_identity(run: "Trainer", saved: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint that is `saved` cannot be continued by `run`."""
    # An earlier version named an option after two dashes.
    saved = {
        f"`{name.lstrip('-')}`" if name.startswith("-") else name: value
        for name, value in saved.items()
    }
    # An option that is newer than the checkpoint was as it is by default.
    default = {f"`{field.name}`": field.default for field in dataclasses.fields(run.options)}
    saved = {**default, **saved}
    for name, value in identity_of(run).items():
        if saved.get(name) != value:
            raise UserError(
                f"{run.options.resume} cannot be continued: its checkpoint was made with another "
                f"{name} than there is now; restore it, or start a new run"
            )


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:  # a run that is just being removed
        return 0.0


def _is_finished(run: Path) -> bool:
    try:
        last = last_checkpoint(run)
        return last is not None and read_json(last / "metrics.json")["finished"]
    # What is wrong is said when the run is to be continued.
    except (UserError, OSError, KeyError):
        return False


def _merge(
    options: TrainOptions,
    given: Collection[str],
    run: Path,
    changeable: Collection[str] = CHANGEABLE,
) -> TrainOptions:
    stored = _read_options(run)
    named = "reader" in given and options.reader == stored.reader
    if any(map(is_function, stored.reader)) and not named:
        reader = " ".join(stored.reader)
        raise UserError(
            f"the run {run} was made with the reader {reader}, which is code: give `reader` "
            f"{reader} again to allow it"
        )
    if "output" in given and Path(options.output).resolve() != run.resolve():
        raise UserError(f"`output` {options.output} is not the run {run}: leave it out")
    for name in given:
        value, old = getattr(options, name), getattr(stored, name)
        if name in ("resume", "output") or value == old:
            continue
        if name not in changeable:
            changeable_names = ", ".join(f"`{each}`" for each in CHANGEABLE)
            raise UserError(
                f"`{name}` {value} contradicts the run {run}, which has {old!r}: leave it out, or "
                f"start a new run (`resume` can change only {changeable_names})"
            )
        setattr(stored, name, value)
    stored.resume = stored.output = str(run)
    return stored


def _read_options(run: Path) -> TrainOptions:
    missing = (
        f"{run} is not a run folder (there is no {run / 'options.yaml'}): give `resume` the folder "
        "that `convai-fast train` made, or auto"
    )
    path = options_file(run) or run / "options.yaml"
    return TrainOptions(**read_options(path, options_of(TrainOptions), missing=missing))
