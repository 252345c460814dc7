"""Chat messages as persona and history."""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from convai_fast.data.readers.chat import ROLES, text_of
from convai_fast.data.readers.fields import is_blank
from convai_fast.errors import UserError

# What a message may hold beside its text that a reply would have to heed.
_BESIDE_TEXT = ("tool_calls", "function_call", "tool_call_id", "audio", "images", "refusal")


def read_messages(messages: Sequence[Any]) -> tuple[list[str], list[str], list[str]]:
    """Persona and history of a list of messages, and the names of their fields that are not used.

    A message is {"role": …, "content": …}, or {"from": …, "value": …}. Each line of what the system
    says is a sentence of the persona; turns of one speaker that follow one another are joined with
    a space. The last turn is the user's.

    Raises UserError naming the message and the field that cannot be read.
    """
    persona: list[str] = []
    turns: list[tuple[str, str]] = []
    unused: dict[str, None] = {}
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{where} is {quoted(message)}, but must be an object with a role")
        given = {name: value for name, value in message.items() if value not in (None, [], {}, "")}
        if beside := next((name for name in _BESIDE_TEXT if name in given), None):
            raise UserError(f"{where} has {beside}, but only text can be read: leave it out")
        role = _role(message.get("role", message.get("from")), where)
        text = text_of(message.get("content", message.get("value")), f"{where}.content")
        if role == "system":
            persona += sentences(text)
        else:
            turns.append((role, "" if is_blank(text) else text.strip()))  # as in training data
        names = given.keys() - {"role", "from", "content", "value"}
        unused |= dict.fromkeys(f"messages.{name}" for name in sorted(names))
    if not turns or turns[-1][0] != "user":
        raise UserError("the last turn of messages must be the user's, which is what is answered")
    history = [
        " ".join(text for _, text in group if text)
        for _, group in groupby(turns, key=lambda turn: turn[0])
    ]
    return persona, history, list(unused)


def sentences(text: str) -> list[str]:
    """The sentences of a persona that is one text, a sentence a line."""
    return [line.strip() for line in text.splitlines() if not is_blank(line)]


def quoted(value: object) -> str:
    """A value as a sentence about it quotes it: in JSON, and not too long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _role(given: object, where: str) -> str:
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        others = ", ".join(name for name, role in ROLES.items() if name != role)
        raise UserError(
            f"{where}.role is {quoted(given)}, but must be system, user or assistant (or {others})"
        )
    return role
