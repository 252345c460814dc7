"""One file of dialogues: its format recognised by its content."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from convai_fast.data.readers import parlai, tables
from convai_fast.data.readers.fields import OWN_READER, Texts, as_list, get, kind, listed, quote
from convai_fast.data.readers.json_stream import JsonDocument, goes_on, is_json, parse_line
from convai_fast.data.readers.log import ReadingLog
from convai_fast.data.readers.records import read_records, shape_of
from convai_fast.data.readers.text_file import TextFile
from convai_fast.data.readers.user_function import items_of
from convai_fast.data.spool import VALID_NAMES
from convai_fast.dialogue.dialogue import Conversation, Dialogue
from convai_fast.errors import UserError
from convai_fast.files import is_parquet, parquet_rows

FILE_READERS = ("json", "parlai", "csv", "messages", "sharegpt", "pairs")
_SHAPES = {"json": None, "messages": "messages", "sharegpt": "messages", "pairs": "pairs"}

Splits = Iterator[tuple[str, Conversation]]


def read_file(path: str, reader: str, log: ReadingLog) -> Splits:
    """Yield (split, conversation) of a file; `reader` is auto or one of FILE_READERS.

    Raises UserError when the file is none that is known, naming what was found; records that
    cannot be read are counted in `log`.
    """
    texts = Texts()
    if is_parquet(path):
        yield from _in_train(_read_parquet(path, _SHAPES.get(reader), texts, log))
        return
    file = TextFile(path)
    if reader == "auto":
        reader = _recognise(file)
    if reader == "parlai":
        first = file.first_lines(1)[0]
        read = parlai.read_fields if parlai.FIELDS.match(first) else parlai.read_numbered
        yield from _in_train(read(file.lines(), path, texts, log))
    elif reader == "csv":
        rows = tables.read_rows(file.rows(), path, lambda columns: shape_of(columns) is not None)
        yield from _in_train(read_records(rows, None, texts, log))
    else:
        yield from _read_json(file, _SHAPES[reader], texts, log)


def read_value(data: Any, name: str, log: ReadingLog) -> Splits:
    """Yield (split, conversation) of what a user's own function returned.

    It may be an object with "train" and perhaps "valid", or any iterable of records.
    """
    texts = Texts()
    if isinstance(data, dict) and shape_of(data) is None:
        train = get(data, "train", f"{name}: ")
        splits = {"train": train, **{k: data[k] for k in VALID_NAMES if data.get(k) is not None}}
    elif isinstance(data, dict | Dialogue):
        splits = {"train": [data]}
    else:
        splits = {"": data}
    for split, values in splits.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise UserError(
                f"{name}: {split or 'the result'} holds {kind(values)}; give a list of dialogues, "
                'or an object with "train" and "valid"'
            )
        items = items_of(values, name)
        records = ((f"{name}: {split}[{i}].", record) for i, record in enumerate(items))
        for conversation in read_records(records, None, texts, log):
            yield split or "train", conversation


def _in_train(conversations: Iterable[Conversation]) -> Splits:
    return (("train", conversation) for conversation in conversations)


def _recognise(file: TextFile) -> str:
    """The reader for the content of a file."""
    first = file.first_lines(2)[0]
    if first[0] in "{[":
        return "json"
    if parlai.FIELDS.match(first) or re.match(
        r"[0-9]+ (.*\t|your persona:|partner's persona:|__SILENCE__)", first
    ):
        return "parlai"
    if first.lower().startswith("sep=") or file.suffix in (".csv", ".tsv"):
        return "csv"
    columns, _ = tables.header_of(first)
    if shape_of(columns):
        return "csv"
    if file.suffix in (".json", ".jsonl", ".ndjson"):
        return "json"
    if parlai.NUMBERED.match(first):
        return "parlai"
    raise UserError(
        f"{file.path}: the format is not recognised by its first line, {quote(first)}; choose the "
        f"reader ({', '.join(FILE_READERS)}), {OWN_READER}"
    )


# ---- JSON -------------------------------------------------------------------------------------


def _read_json(file: TextFile, shape: str | None, texts: Texts, log: ReadingLog) -> Splits:
    """One JSON document or JSON lines."""
    if _is_json_lines(file):
        yield from _in_train(read_records(_json_lines(file), shape, texts, log))
        return
    with file.opened(None) as text:
        document = JsonDocument(text, file.path)
        start = document.peek()
        if start == "[":
            records = _numbered(document.elements(), f"{file.path}: ")
            yield from _in_train(read_records(records, shape, texts, log))
        elif start == "{":
            yield from _read_object(document, file.path, shape, texts, log)
        else:
            first = file.first_lines(1)[0]
            raise UserError(
                f"{file.path} holds {quote(first)}; give a list of dialogues, or an object with "
                '"train" and "valid"'
            )
        document.end()


def _is_json_lines(file: TextFile) -> bool:
    """Whether a file holds a record a line, of which the first may be broken.

    A list or an object may be written a record a line, too: `[\\n{…}\\n,{…}\\n]`. The third line
    tells whether the second belongs to it or stands for itself.
    """
    lines = file.first_lines(3)
    first, second = [*lines, ""][:2]
    if not second or first == "[":
        return False
    if is_json(first) or file.suffix in (".jsonl", ".ndjson"):
        return True
    return second[0] == "{" and is_json(second) and not goes_on(lines)


def _read_object(
    document: JsonDocument, name: str, shape: str | None, texts: Texts, log: ReadingLog
) -> Splits:
    """An object with the splits, each of which is streamed; or a lone record."""
    fields: dict[str, Any] = {}
    has_splits = False
    for member in document.members():
        if member in ("train", *VALID_NAMES) and document.peek() == "[":
            has_splits = True
            records = _numbered(document.elements(), f"{name}: {member}")
            for conversation in read_records(records, shape, texts, log):
                yield member, conversation
        else:
            fields[member] = document.value()
    if has_splits or ("train" in fields and shape_of(fields) is None):
        for split in ("train", *VALID_NAMES):
            if fields.get(split) is not None:
                as_list(fields[split], f"{name}: {split}")
    else:
        if shape_of(fields) is None and shape is None:
            raise UserError(
                f"{name}: train is missing (found are {listed(fields)}); give an object with "
                f'"train" and "valid", {OWN_READER}'
            )
        yield from _in_train(read_records([(f"{name}: ", fields)], shape, texts, log))


def _numbered(values: Iterable[Any], where: str) -> Iterator[tuple[str, Any]]:
    return ((f"{where}[{i}].", value) for i, value in enumerate(values))


def _json_lines(file: TextFile) -> Iterator[tuple[str, Any]]:
    for number, line in file.lines():
        if not line.strip():
            continue
        try:
            yield f"{file.path}, line {number}: ", parse_line(line, file.path, number)
        except UserError as error:
            yield "", error


# ---- Parquet ----------------------------------------------------------------------------------


def _read_parquet(
    path: str, shape: str | None, texts: Texts, log: ReadingLog
) -> Iterator[Conversation]:
    names, rows = parquet_rows(path)
    if shape_of(names) is None and shape is None:
        raise UserError(
            f"{path}: the columns are {listed(names)}, none of the layouts that are known; rename "
            f"them, {OWN_READER}"
        )
    yield from read_records(_numbered(rows, f"{path}: "), shape, texts, log)
