"""The JSON of huggingface/transfer-learning-conv-ai, as it and its forks wrote it.

    {"personality": ["i like tea ."],
     "utterances": [{"history": ["hello !"], "candidates": ["no .", "hi , some tea ?"]}]}

or a row a turn: {"personality": […], "history": […], "candidates": […], "conv_id": 3}. Utterances,
rows and dialogues whose `weight`, `loss` or `train` says no are left out.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from convai_fast.data.readers.fields import Texts, as_list, fields_of, get, is_unlearnt
from convai_fast.data.readers.log import ReadingLog
from convai_fast.dialogue.dialogue import Conversation, Dialogue, Utterance
from convai_fast.errors import UserError

PERSONAS = ("personality", "persona", "personas")


def read_dialogue(record: object, where: str, texts: Texts, log: ReadingLog) -> Conversation:
    """The predecessor's dialogue, or a `Dialogue`: personality, and utterances with candidates."""
    fields = fields_of(record, where)
    dialogue = Dialogue(_persona(fields, where, texts), [])
    utterances = as_list(get(fields, "utterances", where), f"{where}utterances")
    for i, item in enumerate(utterances):
        place = f"{where}utterances[{i}]."
        utterance = fields_of(item, place)
        if is_unlearnt(utterance, log):
            log.note("utterances whose weight, loss or train says no are left out")
        else:
            dialogue.utterances.append(_utterance(utterance, place, texts))
    return [dialogue]


def is_row(names: Iterable[str]) -> bool:
    """Whether a record with these fields is one turn of a dialogue."""
    return {"history", "candidates"} <= set(names)


class Row(Dialogue):
    """A dialogue of one utterance, and the id of the conversation it is from, or None."""

    __slots__ = ("conversation_id",)

    def __init__(self, dialogue: Dialogue, conversation_id: object) -> None:
        super().__init__(dialogue.personality, dialogue.utterances)
        self.conversation_id = conversation_id


def read_row(record: object, where: str, texts: Texts, log: ReadingLog) -> Conversation:
    """A row a turn: a dialogue of one utterance; see `join_rows`."""
    fields = fields_of(record, where)
    dialogue = Dialogue(_persona(fields, where, texts), [_utterance(fields, where, texts)])
    return [Row(dialogue, fields.get("conv_id"))]


def join_rows(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """Join the rows that follow one another; other conversations pass as they are.

    Rows do where their ids are equal, or, without ids, where one's history goes on from the other's
    reply.
    """
    current: Row | None = None
    for conversation in conversations:
        row = conversation[0] if isinstance(conversation[0], Row) else None
        if current is not None and row is not None and _follows(current, row):
            current.utterances += row.utterances
            continue
        if current is not None:
            yield [current]
        current = row
        if row is None:
            yield conversation
    if current is not None:
        yield [current]


def _follows(current: Row, row: Row) -> bool:
    ids = current.conversation_id, row.conversation_id
    if ids != (None, None):
        return ids[0] == ids[1] and current.personality == row.personality
    last, (new,) = current.utterances[-1], row.utterances
    before = [*last.history, last.candidates[-1]]
    return len(new.history) > len(before) and list(new.history[: len(before)]) == before


def _persona(fields: dict[str, Any], where: str, texts: Texts) -> list[str]:
    personas = (texts.persona(fields.get(name), f"{where}{name}") for name in PERSONAS)
    return next(filter(None, personas), [])


def _utterance(fields: dict[str, Any], place: str, texts: Texts) -> Utterance:
    history = texts.check_all(get(fields, "history", place), f"{place}history")
    candidates = as_list(get(fields, "candidates", place), f"{place}candidates")
    if not candidates:
        raise UserError(f"{place}candidates is empty; its last text must be the true reply")
    texts.check(candidates[-1], f"{place}candidates[{len(candidates) - 1}], the true reply,")
    return Utterance(history, texts.check_all(candidates, f"{place}candidates", drop_blank=True))
