"""Which dialogues to use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Layout = Literal["shared", "padded"]


@dataclass
class DataOptions:
    """Dialogues: which ones, and how they are completed."""

    dataset_path: tuple[str, ...] = ()
    """Files, folders, Hub dataset ids, or stores made by `prepare`; several are mixed, and
    `train` sees the examples of a=2 twice."""
    reader: tuple[str, ...] = ("auto",)
    """auto, json, parlai, csv, messages, sharegpt, pairs, hub, or your own package.module:function
    or file.py:function; one for all data, or one for each."""
    fill_candidates: int = 20
    """Where the data has no distractors: draw other dialogues' replies up to so many candidates."""
    valid_fraction: float = 0.1
    """Where the data has no validation split: cut off this share of its dialogues."""
    data_seed: int = 42
    """Seed of the drawn distractors and of the validation split."""
    skip_bad_records: bool = False
    """Leave out records that cannot be read, and tell how many; otherwise they are an error."""

    def __post_init__(self) -> None:
        """Take one path or reader for a tuple of one, and a list, as JSON has it, for a tuple."""
        self.dataset_path, self.reader = texts(self.dataset_path), texts(self.reader)


def texts(value: str | Sequence[str]) -> tuple[str, ...]:
    """Several texts, or one."""
    return ((value,) if value else ()) if isinstance(value, str) else tuple(value)
