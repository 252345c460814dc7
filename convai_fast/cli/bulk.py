"""What the commands that answer many requests have in common: where these come from and go."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.reply_file import check_absent, written_paths
from convai_fast.bulk.shard import Shard
from convai_fast.cli.options.bulk import BulkOptions
from convai_fast.data.dataset import read_dialogues
from convai_fast.data.options import DataOptions
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams
from convai_fast.options import check_at_least

_OF_DIALOGUES = ("reader", "fill_candidates", "valid_fraction", "data_seed", "skip_bad_records")


def check_given(options: BulkOptions) -> None:
    """Raise UserError for options of dialogues where requests are given: see `recall`."""
    default = type(options)()
    for name in ("split", *_OF_DIALOGUES) if options.input else ():
        if getattr(options, name) != getattr(default, name):
            raise UserError(f"--{name} is about dialogues (--data), not --input: leave it out")


def checked_output(options: BulkOptions) -> Path:
    """The file to write; UserError at the first option that makes no sense."""
    if options.input and options.dataset_path:
        raise UserError(
            "both --input and --data given: give one, the requests or dialogues to answer"
        )
    assert options.output is not None  # or it would be missing
    if "-" in (str(options.input), str(options.output)):
        raise UserError("a run that can be continued needs files: - is not one")
    check_at_least(options, {"max_history": 0})
    Shard.parse(options.shard)  # before anything is read
    if options.output.exists() and not options.output.is_file():
        raise UserError(f"{options.output} is not a regular file: name one with --output")
    sources = [options.input] if options.input else map(Path, options.dataset_path)
    for path, source in product(written_paths(options.output), sources):
        if path.exists() and source.exists() and path.samefile(source):
            what = "requests" if options.input else "dialogues"
            raise UserError(f"{path} holds the {what}: choose another --output")
    if not options.overwrite:
        check_absent(options.output)
    return options.output


def requests_of(options: BulkOptions, data: DataOptions, params: SamplingParams) -> DatasetRequests:
    """A request for every turn of the split, or of a part of it; UserError where it has none."""
    assert options.max_history is not None  # recalled
    dialogues = read_dialogues(data).dialogues[options.split]
    if not any(dialogue.utterances for dialogue in dialogues):
        raise UserError(
            f"the {options.split} split of {' and '.join(options.dataset_path)} is empty"
        )
    shard = Shard.parse(options.shard)
    return DatasetRequests(dialogues, options.split, options.max_history, params, shard)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into SystemExit with the exit code that a shell shows for it."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
