"""What the commands that answer many requests have in common: where these come from and go."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.reply_file import check_absent, written_paths
from convai_fast.cli.remembered import RememberedOptions
from convai_fast.data.dataset import DataOptions, check_at_least
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams

_OF_DIALOGUES = ("reader", "fill_candidates", "valid_fraction", "data_seed", "skip_bad_records")


@dataclass
class BulkOptions(RememberedOptions):
    """A file of requests, or the turns of a dataset, and the file for what comes of them."""

    output: Path | None = None
    """JSONL file for the answers."""
    input: Path | None = None
    """JSONL file with the requests; it may be gzip, bzip2, xz or zstd, or Parquet with a request a
    row."""
    split: Literal["train", "valid"] = "valid"
    """Split of the dialogues to answer; the ids are SPLIT/DIALOGUE/TURN, counted from 0."""
    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes cuda where there is one."""
    overwrite: bool = False
    """Replace OUTPUT, once all answers are there."""

    def check_given(self) -> None:
        """Raise UserError for options of dialogues where requests are given: see `recall`."""
        default = type(self)()
        for name in ("split", *_OF_DIALOGUES) if self.input else ():
            if getattr(self, name) != getattr(default, name):
                raise UserError(f"--{name} is about dialogues (--data), not --input: leave it out")

    def checked_output(self) -> Path:
        """The file to write; UserError at the first option that makes no sense."""
        if bool(self.input) == bool(self.dataset_path):
            given = "both --input and --data" if self.input else "neither --input nor --data"
            raise UserError(f"{given} given: give one, the requests or dialogues to answer")
        if self.output is None:
            raise UserError("no --output given: name the file to write")
        if "-" in (str(self.input), str(self.output)):
            raise UserError("a run that can be continued needs files: - is not one")
        check_at_least(self, {"max_history": 0})
        if self.output.exists() and not self.output.is_file():
            raise UserError(f"{self.output} is not a regular file: name one with --output")
        sources = [self.input] if self.input else map(Path, self.dataset_path)
        for path, source in product(written_paths(self.output), sources):
            if path.exists() and source.exists() and path.samefile(source):
                what = "requests" if self.input else "dialogues"
                raise UserError(f"{path} holds the {what}: choose another --output")
        if not self.overwrite:
            check_absent(self.output)
        return self.output

    def requests_of(self, data: DataOptions, params: SamplingParams) -> DatasetRequests:
        """A request for every turn of the split; UserError where it has none."""
        assert self.max_history is not None  # recalled
        source = DatasetRequests(data.load()[self.split], self.split, self.max_history, params)
        if not source.num_requests:
            raise UserError(f"the {self.split} split of {' and '.join(self.dataset_path)} is empty")
        return source


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
