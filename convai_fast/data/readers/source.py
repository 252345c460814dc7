"""What a user names as data: a file, a folder, a Hub dataset, a store, or a function that reads."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from convai_fast.data.readers.fields import OWN_READER, Texts, listed
from convai_fast.data.readers.file import FILE_READERS, Splits, read_file, read_value
from convai_fast.data.readers.log import ReadingLog
from convai_fast.data.readers.records import read_records, shape_of
from convai_fast.data.readers.user_function import call_function, is_function, reason_of_code
from convai_fast.data.spool import VALID_NAMES
from convai_fast.data.store import DialogueStore, is_store
from convai_fast.errors import UserError
from convai_fast.extras import require
from convai_fast.options import options_file

_KNOWN = f"{', '.join(FILE_READERS)}, hub or your own package.module:function or file.py:function"
_ARROW_SUFFIXES = (".parquet", ".arrow")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Of ConvAI2's files for one split, the one with the original personas of the speaker alone.
_CONVAI2 = ("self_original", "self_original_no_cands")


@dataclass(frozen=True)
class Source:
    """One set of dialogues, as its user names it.

    Attributes:
        path: a file, a folder, a Hub dataset id, a store, or what the reader's function takes.
        reader: as in `load_dialogues`.
        weight: how often training sees its examples in an epoch.
    """

    path: str
    reader: str = "auto"
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str, reader: str = "auto") -> "Source":
        """`path` or `path=weight`; UserError for a weight that is none."""
        path, equals, weight = text.rpartition("=")
        if not equals or os.path.exists(text):
            return cls(text, reader)
        try:
            value = float(weight)
        except ValueError:
            return cls(text, reader)
        if not 0 < value <= 1000:
            raise UserError(
                f"the weight of {path} is {weight}; it must be above 0, and 1000 at most"
            )
        return cls(path, reader, value)

    @property
    def is_store(self) -> bool:
        """Whether it is a store, whose splits stay as they are."""
        return not is_function(self.reader) and is_store(self.path)

    @cached_property
    def store(self) -> DialogueStore:
        """It, opened once, since that looks at every byte; UserError if it is damaged."""
        return DialogueStore(self.path)

    def read(self, log: ReadingLog) -> Splits:
        """Yield (split, conversation); the split is train, or a name of VALID_NAMES.

        Raises UserError when there is nothing to read, or it is none of the known formats.
        """
        if is_function(self.reader):
            return read_value(call_function(self.reader, self.path), self.reader, log)
        if self.reader not in ("auto", "hub", *FILE_READERS):
            raise UserError(f"there is no reader {self.reader!r}; choose {_KNOWN}")
        files = self.files()
        if files is None:
            return _read_hub(self.path, log)
        if self.is_store:
            return _read_store(self.store, log)
        return _read_files(files, self.reader, log, self.path)

    def files(self) -> dict[str, str] | None:
        """The files that are read, by split; None where only reading can tell what is read.

        Raises UserError when there is nothing at the path, or nothing to read.
        """
        if is_function(self.reader) or self.reader == "hub":
            return None
        if os.path.isfile(self.path):
            return {"": self.path}
        if self.is_store:
            return {"": str(Path(self.path) / "meta.json")}
        if os.path.isdir(self.path):
            return _files_of_folder(self.path, self.reader)
        raise UserError(
            f"{self.path}: there is no such file or folder; mend the path, or choose the reader "
            "hub if it is a Hugging Face dataset"
        )


def _read_files(files: dict[str, str], reader: str, log: ReadingLog, folder: str) -> Splits:
    for split, path in files.items():
        for found, conversation in read_file(path, reader, log):
            if split and found != "train":
                raise UserError(
                    f"{folder}: {Path(path).name} holds both splits itself; give the path of "
                    "that file"
                )
            yield split or found, conversation


def _read_store(store: DialogueStore, log: ReadingLog) -> Splits:
    for split in store.splits:
        for dialogue in store.dialogues(split):
            log.num_records += 1
            yield split, [dialogue]


# ---- folders ----------------------------------------------------------------------------------


def _files_of_folder(folder: str, reader: str) -> dict[str, str] | None:
    """The files of the splits; None where the datasets library reads the folder."""
    try:
        files = [f for f in sorted(Path(folder).iterdir()) if not f.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}); check its permissions"
        ) from None
    names = {f.name for f in files}
    if {"config.json", "tokenizer.json", "model.safetensors"} & names:
        raise UserError(f"{folder} holds a model, not dialogues; give the dialogues as data")
    if options_file(Path(folder)) and "metrics.jsonl" in names:
        raise UserError(f"{folder} is a training run, not dialogues; give the dialogues as data")
    if reader == "auto" and {"dataset_dict.json", "state.json"} & names:
        return None
    train = _file_of_split(files, "train")
    if train is None:
        inside = [*files, *Path(folder).glob("data/*")]
        if reader == "auto" and any(f.suffix in _ARROW_SUFFIXES for f in inside):
            return None
        raise UserError(
            f"{folder}: this folder has no file train.json, train.jsonl, train.csv or train.txt "
            f"(found are {listed(sorted(names))}); give the path of the file itself"
        )
    kind = _split_name(train)[1]
    valid = next((f for n in VALID_NAMES if (f := _file_of_split(files, n, kind))), None)
    return {"train": str(train), **({"valid": str(valid)} if valid else {})}


def _split_name(file: Path) -> tuple[str, str]:
    """Stem and extension, that of a compression aside: train.jsonl.gz is ("train", ".jsonl")."""
    name = file.name
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if stem else (name, "")


def _file_of_split(files: list[Path], split: str, suffix: str | None = None) -> Path | None:
    """The file of a split, with that suffix where there are several."""
    named = [(f, *_split_name(f)) for f in files if f.suffix != ".arrow" and f.is_file()]
    for stem in (split, *(f"{split}_{kind}" for kind in _CONVAI2)):
        found = [f for f, its_stem, _ in named if its_stem == stem]
        found = [f for f in found if _split_name(f)[1] == suffix] or found
        if len(found) > 1:
            raise UserError(
                f"{found[0].parent}: this folder holds both {found[0].name} and {found[1].name}; "
                "give the path of one of them"
            )
        if found:
            return found[0]
    return None


# ---- Hub --------------------------------------------------------------------------------------


def _read_hub(path: str, log: ReadingLog) -> Splits:
    require("datasets", f"reading {path}")
    import datasets

    saved = any(os.path.isfile(f"{path}/{n}") for n in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # the library has many, those of the network among them
        raise UserError(
            f"{path}: the datasets library cannot load it ({reason_of_code(error)}); check the "
            "name and the network"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    if "train" not in loaded:
        raise UserError(
            f"{path}: this dataset has no split train, only {', '.join(map(str, loaded))}; read it "
            "with a function of your own"
        )
    return _rows_of_hub(loaded, path, log)


def _rows_of_hub(loaded: dict, path: str, log: ReadingLog) -> Iterator:
    texts = Texts()
    for split in ("train", *VALID_NAMES):
        if split not in loaded:
            continue
        columns = loaded[split].column_names
        if shape_of(columns) is None:
            raise UserError(
                f"{path}: the columns of {split} are {listed(columns)}, none of which is "
                f"utterances, messages, conversations or prompt; rename them, {OWN_READER}"
            )
        rows = loaded[split].with_format(None)
        records = ((f"{path}: {split}[{i}].", row) for i, row in enumerate(rows))
        for conversation in read_records(records, None, texts, log):
            yield split, conversation
