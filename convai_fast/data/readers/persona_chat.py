"""Synthetic-Persona-Chat: a conversation a row, with the personas of both users.

user 1 personas,user 2 personas,Best Generated Conversation
"I like tea.
I am old.",I have a dog.,"User 1: Hello!
User 2: Hi!"
"""

import re
from collections.abc import Iterable
from typing import Any

from convai_fast.data.readers.fields import Texts, Turns, fields_of, get, is_blank
from convai_fast.data.readers.log import ReadingLog
from convai_fast.dialogue.dialogue import Conversation
from convai_fast.errors import UserError

PERSONA_COLUMNS = ("user 1 personas", "user 2 personas")
CONVERSATION_COLUMN = "best generated conversation"

_TURN = re.compile(r"(\*+\s*)?user\s*([12])\s*:(.*)", re.IGNORECASE)
# Nobody says such a line: "", "* * *", "[A few minutes later]", "(They eat.)", "*At the bar*".
_STAGE_DIRECTION = re.compile(r"[*_=~-]*|\*.*\*|\[.*\]|\(.*\)")


def has_columns(names: Iterable[str]) -> bool:
    """Whether a table with these columns is Synthetic-Persona-Chat's."""
    return {str(name).lower() for name in names} >= {*PERSONA_COLUMNS, CONVERSATION_COLUMN}


def read_persona_chat(record: object, where: str, texts: Texts, log: ReadingLog) -> Conversation:
    """Either user's side becomes a dialogue with that user's persona.

    A line without `User 1: ` or `User 2: ` in front continues the turn before it, unless it is a
    stage direction in brackets, parentheses or asterisks; such lines, those before the first turn,
    and a `User 1:` with nothing behind it are left out.
    """
    fields = {str(name).lower(): value for name, value in fields_of(record, where).items()}
    personas = [
        texts.check_lines(_lines_of(get(fields, name, where)), f"{where}{name}")
        for name in PERSONA_COLUMNS
    ]
    place = f"{where}Best Generated Conversation"
    conversation = _lines_of(texts.check(get(fields, CONVERSATION_COLUMN, where), place))
    turns, speaker = Turns(texts), ""
    for line in conversation.split("\n"):
        line = line.strip()
        if turn := _TURN.fullmatch(line):
            starred, speaker, text = turn.groups()
            # Some conversations are in Markdown: "*User 1:* Hi!" and "* User 1: Hi! *".
            if starred:
                text = text.lstrip("*") if text.startswith("*") else text.rstrip("*")
        else:
            text = "" if _STAGE_DIRECTION.fullmatch(line) else line
        if speaker and not is_blank(text):
            turns.add(speaker, text.strip())
    if not speaker:
        raise UserError(f"{place} has no turn; a turn begins with 'User 1: ' or 'User 2: '")
    return [turns.side(persona, user) for persona, user in zip(personas, "12", strict=True)]


def _lines_of(text: Any) -> Any:
    """`text` with line breaks where a tool has written the two characters \\n for them all."""
    if isinstance(text, str) and "\n" not in text and "\\n" in text:
        return text.replace("\\n", "\n")
    return text
