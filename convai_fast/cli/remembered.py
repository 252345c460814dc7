"""Options whose defaults are what the model was trained with."""

import os
from collections.abc import Iterable, Sequence

from convai_fast.cli.options.common import RememberedOptions
from convai_fast.data.readers import Source, tell
from convai_fast.data.readers.user_function import is_function
from convai_fast.data.store import Origin
from convai_fast.data.trained_with import TrainedWith
from convai_fast.errors import UserError
from convai_fast.training.options import TrainOptions

# Where neither the command line nor the model says.
_REMEMBERED = ("max_history", "fill_candidates", "valid_fraction", "data_seed")
_DEFAULTS = {name: getattr(TrainOptions, name) for name in _REMEMBERED}


def recall(options: RememberedOptions) -> TrainedWith | None:
    """Put what the model was trained with in place of options that were not given, telling
    what it is, and where one that was given is another; returns all that it remembers.

    Raises UserError for a model that cannot be opened.
    """
    trained = TrainedWith.read(options.model)
    taken, others = [], []
    for name, default in _DEFAULTS.items():
        value, known = getattr(options, name), getattr(trained, name, None)
        if value is None:
            setattr(options, name, default if known is None else known)
            if known not in (None, default):
                taken.append(f"{name} {known}")
        elif known not in (None, value):
            others.append(f"{name} {value} (trained with {known})")
    _recall_readers(options, trained, taken)
    for path in options.dataset_path:
        if Source.parse(path).weight != 1:
            tell(f"{path}: a weight is for training, and does nothing here")
    if taken:
        tell(f"as the model was trained: {', '.join(taken)}")
    if others:
        tell(f"not as the model was trained: {', '.join(others)}")
    return trained


def _recall_readers(
    options: RememberedOptions, trained: TrainedWith | None, taken: list[str]
) -> None:
    if options.reader:
        return
    known = {os.path.abspath(s.path): s.reader for s in trained.sources} if trained else {}
    paths = [path for path in options.dataset_path]
    readers = [known.get(os.path.abspath(path), "auto") for path in paths]
    for i, reader in enumerate(readers):
        if is_function(reader):
            # Code is run only if this command names it.
            tell(f"{paths[i]} was read with --reader {reader} in training: name it to use it")
            readers[i] = "auto"
        elif reader != "auto":
            taken.append(f"reader {reader}")
    options.reader = tuple(readers) or ("auto",)


def check_not_trained_on(
    trained: TrainedWith | None, data: Iterable[tuple[str, Sequence[Origin]]]
) -> None:
    """Raise UserError where a validation split of (path, what was read there) holds what the model
    has learnt; see `TrainedWith.overlap`."""
    if trained and (overlap := trained.overlap(data)):
        raise UserError(f"{overlap}; leave it out, or insist with --allow_trained_on")
