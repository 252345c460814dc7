"""Records of any known shape, told apart by their fields."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from convai_fast.data.readers import chat, pairs, parlai, persona_chat, predecessor
from convai_fast.data.readers.fields import OWN_READER, Texts, fields_of, is_unlearnt, listed
from convai_fast.data.readers.log import ReadingLog
from convai_fast.dialogue.dialogue import Conversation
from convai_fast.errors import UserError

Read = Callable[[object, str, Texts, ReadingLog], Conversation]


class Shape(NamedTuple):
    """A kind of record: whether fields are its own, and what reads it."""

    fits: Callable[[Collection[str]], bool]
    read: Read


SHAPES = {
    "json": Shape(lambda names: "utterances" in names, predecessor.read_dialogue),
    "row": Shape(predecessor.is_row, predecessor.read_row),
    "messages": Shape(lambda names: chat.turns_field(names) is not None, chat.read_chat),
    "dialog": Shape(lambda names: "dialog" in names, parlai.read_dialog),
    "persona_chat": Shape(persona_chat.has_columns, persona_chat.read_persona_chat),
    "pairs": Shape(lambda names: pairs.pair_fields(names) is not None, pairs.read_pair),
}
_KNOWN = (
    "utterances; history and candidates; messages or conversations; prompt and completion or "
    "response; instruction and output"
)


def shape_of(names: Collection[str]) -> str | None:
    """The shape of a record with these fields, or None."""
    return next((name for name, shape in SHAPES.items() if shape.fits(names)), None)


def read_records(
    records: Iterable[tuple[str, object]], shape: str | None, texts: Texts, log: ReadingLog
) -> Iterator[Conversation]:
    """Read (where, record) pairs of one shape, or each as it looks (None)."""

    def read(record: object, where: str) -> Conversation:
        if isinstance(record, UserError):
            raise record
        found: str | None = "json"
        if isinstance(record, dict):
            if is_unlearnt(record, log):
                log.note("records whose weight, loss or train says no are left out")
                return []
            # A field that is null says nothing about the shape.
            known = {name: value for name, value in record.items() if value is not None}
            if found := shape_of(known):
                record = known
            else:
                found = shape_of(record)
        own = shape or found
        if own is None:
            raise UserError(
                f"{where.rstrip('.: ')}: the fields are {listed(fields_of(record, where))}, none "
                f"of the layouts that are known ({_KNOWN}); rename them, {OWN_READER}"
            )
        return SHAPES[own].read(record, where, texts, log)

    rows_joined = predecessor.join_rows(log.conversations(records, read))
    yield from pairs.join_labels(rows_joined, log)
