"""What all readers of records share: checked access to fields and texts.

A record (a JSON object, a CSV row, a row of a Hugging Face dataset) becomes a `Conversation`. Every
function gets `where`, the beginning of an error message that leads to the record: "chat.json:
train[3]." or "chat.jsonl, line 7: "; what it adds is the field.
"""

import ast
import json
import math
import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

from convai_fast.data.readers.log import ReadingLog
from convai_fast.dialogue.dialogue import Dialogue, History, Utterance
from convai_fast.errors import UserError

SILENCE = "__SILENCE__"  # ParlAI's text of a speaker who says nothing

OWN_READER = "or read it with a function of your own, reader my_module:load or my_file.py:load"

_PLAIN = re.compile(r"[!-~]")
# Letters by their category, but empty; and what stands for a character that could not be read.
_FILLERS = frozenset("\u2800\u3164\u115f\u1160\uffa0\ufffd")
_MAX_KNOWN_BYTES = 1 << 24
_BYTES_OF_ANY = 100  # of a text in memory, whatever its length
_LEARNT = ("weight", "loss_weight", "loss", "train", "trainable")
_YES_AND_NO = {
    **dict.fromkeys(("false", "no", "bad"), True),
    **dict.fromkeys(("true", "yes", "good"), False),
}


def is_blank(text: str) -> bool:
    """Whether nothing of `text` can be seen, so that a tokenizer may find no token in it: spaces,
    control characters, zero-width ones, direction marks, and marks without a letter to stand on.
    Private characters, and those that are newer than this Python, can be seen."""
    if _PLAIN.search(text):
        return False
    return all(c in _FILLERS or _is_unseen(c) for c in text)


def _is_unseen(character: str) -> bool:
    category, code = unicodedata.category(character), ord(character)
    if category == "Cn":  # a character newer than this Python, or one that will never be
        return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return category[0] in "CZM" and category != "Co"


class Texts:
    """Checks texts, and keeps one copy of those met lately: histories repeat the same ones."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._known_bytes = 0

    def check(self, value: object, where: str) -> str:
        """Return the shared copy of `value`; UserError if it is not text, blank or unreadable."""
        if not isinstance(value, str):
            raise UserError(f"{where} must be text, not {kind(value)}; put it in quotes or mend it")
        known = self._known.get(value)
        if known is not None:
            return known
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where} holds half of a surrogate pair, which is no character; write the file "
                "again as UTF-8"
            ) from None
        if is_blank(value):
            raise UserError(f"{where} is blank; give it text, or delete it")
        if "\0" in value:
            raise UserError(f"{where} holds a NUL character; delete that character")
        self._known_bytes += len(value) + _BYTES_OF_ANY
        if self._known_bytes > _MAX_KNOWN_BYTES:
            self._known.clear()
            self._known_bytes = 0
        self._known[value] = value
        return value

    def check_all(self, values: object, where: str, *, drop_blank: bool = False) -> list[str]:
        """Check a list of texts, leaving blank ones out if `drop_blank`."""
        known = self._known
        texts = []
        for i, value in enumerate(as_list(values, where)):
            text = known.get(value) if isinstance(value, str) else None
            if text is None:
                if drop_blank and isinstance(value, str) and is_blank(value):
                    continue
                text = self.check(value, f"{where}[{i}]")
            texts.append(text)
        return texts

    def check_lines(self, value: object, where: str) -> list[str]:
        """Check a text that holds a sentence a line; it may be blank."""
        if not isinstance(value, str):
            value = self.check(value, where)  # which raises
        return [self.check(line.strip(), where) for line in value.split("\n") if not is_blank(line)]

    def persona(self, value: object, where: str) -> list[str]:
        """Check a persona: a list of sentences, a text with one a line, or nothing at all.

        The text may be a list as JSON or Python write it, since a cell of a table holds no other.
        """
        if value is None:
            return []
        value = _list_in(value)
        if isinstance(value, str):
            return self.check_lines(value, where)
        return self.check_all(value, where, drop_blank=True)


def _list_in(value: object) -> object:
    """The list of texts that a text holds, or `value` as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = parse(value.strip())
                if isinstance(found, list) and all(isinstance(text, str) for text in found):
                    return found
    return value


class Turns:
    """Collects what is said in a conversation, turn after turn, and who answers what.

    Consecutive turns of one speaker are joined with a space, because segment ids alternate from
    turn to turn.
    """

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.speakers: list[str] = []
        self.is_learnt: list[bool] = []
        self._parts: list[list[str]] = []

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, speaker: str, text: str, learnt: bool = True) -> None:
        """Add what `speaker` says; a turn is learnt only where all that is joined in it is."""
        if self.speakers and self.speakers[-1] == speaker:
            self._parts[-1].append(text)
            self.is_learnt[-1] &= learnt
        else:
            self.speakers.append(speaker)
            self._parts.append([text])
            self.is_learnt.append(learnt)

    @cached_property
    def said(self) -> list[str]:
        """The turns, when all are added."""
        return [self.texts.check(" ".join(parts), "the turn") for parts in self._parts]

    def side(
        self, persona: list[str], speaker: str, begin: int = 1, end: int | None = None
    ) -> Dialogue:
        """What `speaker` answers in the turns from `begin` up to `end`, knowing `persona`.

        The first turn of all answers nobody.
        """
        end = len(self) if end is None else end
        return Dialogue(
            persona,
            [
                Utterance(History(self.said, i), [self.said[i]])
                for i in range(begin, end)
                if self.speakers[i] == speaker and self.is_learnt[i]
            ],
        )


def fields_of(record: object, where: str) -> dict[str, Any]:
    """The fields of a record that must be an object; UserError otherwise."""
    if isinstance(record, Dialogue | Utterance):
        return {name: getattr(record, name) for name in record.__slots__}
    if not isinstance(record, dict):
        raise UserError(f"{where.rstrip('.: ')} must be an object, not {kind(record)}; mend it")
    return record


def get(fields: dict[str, Any], name: str, where: str) -> Any:
    """The value of the field `name`; UserError where it is missing."""
    if name not in fields:
        raise UserError(
            f"{where}{name} is missing (found are {listed(fields)}); add it, {OWN_READER}"
        )
    return fields[name]


def says_no(value: object) -> bool | None:
    """Whether a field that says yes or no says no; None where it says nothing that is known.

    `False`, 0, "0.0" (as tables have numbers) and "no" do; null and an empty cell say nothing.
    """
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _YES_AND_NO:
            return _YES_AND_NO[word]
    number = _number(value)
    return None if number is None else number == 0


def _number(value: object) -> float | None:
    """The number that a field holds, be it as text, as tables have it; or None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, int) or (isinstance(value, float) and not math.isnan(value)):
        return value
    return None


def flag_says_no(fields: dict[str, Any], name: str, log: ReadingLog) -> bool | None:
    """`says_no` of a field that decides what is learnt; one that is not understood is told."""
    value = fields.get(name)
    answer = says_no(value)
    if answer is None and not is_absent(value):
        log.note(f"the field {name!r} says neither yes nor no and is not used")
    return answer


def is_unlearnt(fields: dict[str, Any], log: ReadingLog) -> bool:
    """Whether a field such as `weight` says that a record, or a part of it, is not to be learnt."""
    for name in ("weight", "loss_weight"):
        if _number(fields.get(name)) not in (None, 0, 1):
            log.note("a weight that is neither 0 nor 1 counts as 1")
    return any([flag_says_no(fields, name, log) for name in _LEARNT if name in fields])


def is_absent(value: object) -> bool:
    """Whether a field says nothing: null, not a number, or blank."""
    if isinstance(value, str):
        return is_blank(value)
    return value is None or (isinstance(value, float) and math.isnan(value))


def listed(names: Iterable[str]) -> str:
    """Names out of a file as a sentence lists them, however many there are."""
    names = list(map(str, names))
    shown = ", ".join(map(quote, names[:6]))
    return f"{shown}, …" if len(names) > 6 else shown or "none"


def as_list(values: object, where: str) -> list | tuple:
    """`values`, which must be a list; UserError otherwise."""
    if isinstance(values, History):
        return values[:]
    if isinstance(values, str) and values.lstrip()[:1] in ("[", "{"):
        raise UserError(
            f"{where} must be a list, not text that holds JSON; parse that text (json.loads) and "
            "write the file again"
        )
    if not isinstance(values, list | tuple):
        raise UserError(f"{where} must be a list, not {kind(values)}; put it in brackets")
    return values


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    kinds = {
        str: "text",
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def quote(text: str) -> str:
    """A text out of a file as a sentence quotes it, however long it is."""
    return repr(text if len(text) <= 30 else f"{text[:27]}...")
