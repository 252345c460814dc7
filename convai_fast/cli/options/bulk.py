"""The options of the commands that answer many requests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from convai_fast.cli.options.common import DeviceOption, RememberedOptions


@dataclass
class RequestOptions:
    """Requests: what is answered, unless all turns of --data are."""

    input: Path | None = None
    """JSONL file with the requests; it may be gzip, bzip2, xz or zstd, or Parquet with a request a
    row."""
    split: Literal["train", "valid"] = "valid"
    """Split of the dialogues to answer; the ids are SPLIT/DIALOGUE/TURN, counted from 0."""
    shard: str = "1/1"
    """Part of the requests to answer, such as 3/16 for the third of 16, for an array of jobs: the
    files of all parts, one after another, are that of one run."""


@dataclass
class AnswerOptions:
    """Output: where the answers go."""

    output: Path | None = None
    """JSONL file for the answers."""
    overwrite: bool = False
    """Replace OUTPUT, once all answers are there."""


@dataclass
class BulkOptions(AnswerOptions, DeviceOption, RequestOptions, RememberedOptions):
    """A file of requests, or the turns of a dataset, and the file for what comes of them."""

    def missing(self) -> dict[str, str]:
        """What has to be given yet."""
        lacks = super().missing()
        if not self.input and not self.dataset_path:
            lacks["input"] = "a file of requests (or with --data dialogues)"
        return lacks if self.output else lacks | {"output": "the file to write"}
