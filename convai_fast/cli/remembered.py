"""Options whose defaults are what the model was trained with."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from convai_fast.data.dataset import DataOptions
from convai_fast.data.readers import Source, tell
from convai_fast.data.readers.user_function import is_function
from convai_fast.data.store import Origin
from convai_fast.data.trained_with import TrainedWith
from convai_fast.errors import UserError

# Where neither the command line nor the model says.
_DEFAULTS = {"max_history": 2, "fill_candidates": 20, "valid_fraction": 0.1, "data_seed": 42}


@dataclass
class RememberedOptions:
    """Which dialogues to use, and how much of them the model sees: by default as in training."""

    model: Annotated[str, tyro.conf.arg(aliases=["--model_checkpoint"])] = ""
    """Folder, run, .tar.gz or Hub id of a fine-tuned model with its tokenizer."""
    dataset_path: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    """Files, folders, Hub dataset ids, or stores made by `prepare` (also --data)."""
    reader: tuple[str, ...] = ()
    """auto, json, parlai, csv, messages, sharegpt, pairs, hub, or your own package.module:function
    or file.py:function; one for all data, or one for each. By default that of the training, if
    these are its dialogues, else auto."""
    fill_candidates: int | None = None
    """Where the data has no distractors: draw other dialogues' replies up to so many candidates.
    By default as in training, else 20."""
    valid_fraction: float | None = None
    """Where the data has no validation split: the share that is cut off. By default as in training,
    else 0.1."""
    data_seed: int | None = None
    """Seed of the validation split and of drawn distractors. By default as in training, else 42."""
    skip_bad_records: bool = False
    """Leave out records that cannot be read, and tell how many; otherwise they are an error."""
    max_history: int | None = None
    """Exchanges of history that the model sees (2 * max_history + 1 turns). By default as in
    training, else 2."""

    def recall(self) -> TrainedWith | None:
        """Put what the model was trained with in place of options that were not given, telling
        what it is, and where one that was given is another; returns all that it remembers.

        Raises UserError when no model is given, or none that can be opened.
        """
        if not self.model:
            raise UserError("no model given: name a folder or Hub id with --model")
        trained = TrainedWith.read(self.model)
        taken, others = [], []
        for name, default in _DEFAULTS.items():
            value, known = getattr(self, name), getattr(trained, name, None)
            if value is None:
                setattr(self, name, default if known is None else known)
                if known not in (None, default):
                    taken.append(f"{name} {known}")
            elif known not in (None, value):
                others.append(f"{name} {value} (trained with {known})")
        self._recall_readers(trained, taken)
        for path in self.dataset_path:
            if Source.parse(path).weight != 1:
                tell(f"{path}: a weight is for training, and does nothing here")
        if taken:
            tell(f"as the model was trained: {', '.join(taken)}")
        if others:
            tell(f"not as the model was trained: {', '.join(others)}")
        return trained

    def _recall_readers(self, trained: TrainedWith | None, taken: list[str]) -> None:
        if self.reader:
            return
        known = {os.path.abspath(s.path): s.reader for s in trained.sources} if trained else {}
        paths = [path for path in self.dataset_path]
        readers = [known.get(os.path.abspath(path), "auto") for path in paths]
        for i, reader in enumerate(readers):
            if is_function(reader):
                # Code is run only if this command names it.
                tell(f"{paths[i]} was read with --reader {reader} in training: name it to use it")
                readers[i] = "auto"
            elif reader != "auto":
                taken.append(f"reader {reader}")
        self.reader = tuple(readers) or ("auto",)

    @property
    def data(self) -> DataOptions:
        """The options of the data alone, once recalled."""
        assert self.fill_candidates is not None
        assert self.valid_fraction is not None and self.data_seed is not None
        return DataOptions(
            dataset_path=self.dataset_path,
            reader=self.reader,
            fill_candidates=self.fill_candidates,
            valid_fraction=self.valid_fraction,
            data_seed=self.data_seed,
            skip_bad_records=self.skip_bad_records,
        )


def check_not_trained_on(
    trained: TrainedWith | None, data: Iterable[tuple[str, Sequence[Origin]]]
) -> None:
    """Raise UserError where a validation split of (path, what was read there) holds what the model
    has learnt; see `TrainedWith.overlap`."""
    if trained and (overlap := trained.overlap(data)):
        raise UserError(f"{overlap}; leave it out, or insist with --allow_trained_on")
