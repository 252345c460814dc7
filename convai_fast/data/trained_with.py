"""What a model was trained with, kept beside its weights: those who use it should see as much.

A model that has learnt with one exchange of history answers worse with three, and one that is
measured on another split of its own dialogues is measured on what it has learnt.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from convai_fast.archive import unpacked
from convai_fast.data.store import Origin
from convai_fast.errors import UserError
from convai_fast.files import read_json

FILE = "trained_with.json"


@dataclass(frozen=True)
class TrainedSource:
    """One set of dialogues of a training run.

    Attributes:
        path, reader, weight: as they were named.
        origins: what was read there: several sets where it is a store of several.
    """

    path: str
    reader: str
    weight: float
    origins: Sequence[Origin]


@dataclass(frozen=True)
class TrainedWith:
    """The settings of a training run that those who use its model should share; see DataOptions.

    `before` is what the model that it began with had been trained on.
    """

    max_history: int
    fill_candidates: int
    valid_fraction: float
    data_seed: int
    sources: Sequence[TrainedSource] = field(default_factory=tuple)
    before: Sequence[TrainedSource] = field(default_factory=tuple)

    @property
    def learnt(self) -> tuple[TrainedSource, ...]:
        """All sets of dialogues that the model has been trained on."""
        return (*self.sources, *self.before)

    def overlap(self, data: Iterable[tuple[str, Sequence[Origin]]]) -> str:
        """What of (path, what was read there) is held out for validation and was learnt, in words.

        It was where it is cut off from dialogues of the training in another way than there. Empty
        where it is not.
        """
        learnt = [origin for source in self.learnt for origin in source.origins if origin.is_cut]
        for path, origins in data:
            for origin in origins:
                for own in (own for own in learnt if own.dialogues == origin.dialogues):
                    for name in ("valid_fraction", "data_seed"):
                        value, known = getattr(origin, name), getattr(own, name)
                        if origin.is_cut and value != known:
                            return (
                                "the model was trained on dialogues that are in this validation "
                                f"split of {path}: {name} is {value} here and was {known} in "
                                "training"
                            )
        return ""

    def shareable(self) -> "TrainedWith":
        """The same without the folders that data lay in, which are nobody else's concern."""

        def named(sources: Sequence[TrainedSource]) -> tuple[TrainedSource, ...]:
            return tuple(
                replace(each, path=Path(each.path).name, reader=_without_folder(each.reader))
                for each in sources
            )

        return replace(self, sources=named(self.sources), before=named(self.before))

    def write(self, folder: Path) -> None:
        """Write the file into a checkpoint's folder."""
        values = asdict(self)
        for source in (*values["sources"], *values["before"]):
            source["origins"] = [origin._asdict() for origin in source["origins"]]
        (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "TrainedWith | None":
        """What the model at `path` was trained with; None where that was not written down.

        Raises UserError when the file is there and holds something else.
        """
        with unpacked(path) as source:
            file = Path(source.path).expanduser() / FILE
            if not file.is_file():
                return None
            try:
                values = read_json(file)
                for name in ("sources", "before"):
                    sources = []
                    for source in values[name]:
                        origins = tuple(_checked(Origin, each) for each in source.pop("origins"))
                        sources.append(_checked(TrainedSource, {**source, "origins": origins}))
                    values[name] = tuple(sources)
                return _checked(cls, values)
            except (UserError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{file} does not say what the model was trained with ({error}): it is damaged "
                    "or of another version; restore it, or delete it and name the settings"
                ) from error


def _without_folder(reader: str) -> str:
    """A reader by name, whose function may lie in a file."""
    file, colon, function = reader.rpartition(":")
    return f"{Path(file).name}{colon}{function}" if colon else reader


def _checked(cls: type, values: dict[str, Any]) -> Any:
    """`cls(**values)`; TypeError for a value that is not of its field's type."""
    for name, kind in get_type_hints(cls).items():
        kinds = (int, float) if kind is float else (kind,)
        if kind in (int, float, str, bool) and type(values[name]) not in kinds:
            raise TypeError(f"{name} is {values[name]!r}, not {kind.__name__}")
    return cls(**values)
