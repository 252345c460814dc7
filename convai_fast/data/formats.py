"""The dialogue formats: one function per kind of record, and one per kind of file.

A record (a JSON object, a CSV row, a row of a Hugging Face dataset) becomes a `Conversation`. Every
function gets `where`, the beginning of an error message that leads to the record: "chat.json:
train[3]." or "chat.jsonl, line 7: "; what it adds is the field. What each format looks like to its
user is written in `load_dialogues`.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.errors import UserError

Conversation = list[Dialogue]
"""The sides of one conversation. They share their texts, so they must land in the same split."""

VALID_NAMES = ("valid", "validation", "val", "dev", "test")
"""What a validation split may be called, the preferred name first."""

PERSONA_COLUMNS = ("user 1 personas", "user 2 personas")
CONVERSATION_COLUMN = "Best Generated Conversation"
SILENCE = "__SILENCE__"


class Texts:
    """Checks every text once and keeps one copy of it: histories and candidates repeat the same."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def check(self, value: object, where: str) -> str:
        """Return the shared copy of `value`; UserError if it is not text, blank or unreadable."""
        if not isinstance(value, str):
            raise UserError(
                f"{where} must be text, not {_kind(value)}; put it in quotes or mend it"
            )
        known = self._known.get(value)
        if known is not None:
            return known
        if not value.strip():
            raise UserError(f"{where} is blank; give it text, or delete it")
        if "\0" in value:
            raise UserError(f"{where} holds a NUL character; delete that character")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where} holds half of a surrogate pair, which is no character; write the file "
                "again as UTF-8"
            ) from None
        self._known[value] = value
        return value

    def check_all(self, values: object, where: str, *, drop_blank: bool = False) -> list[str]:
        """Check a list of texts, leaving blank ones out if `drop_blank`."""
        known = self._known
        texts = []
        for i, value in enumerate(_list(values, where)):
            text = known.get(value) if isinstance(value, str) else None
            if text is None:
                if drop_blank and isinstance(value, str) and not value.strip():
                    continue
                text = self.check(value, f"{where}[{i}]")
            texts.append(text)
        return texts

    def check_lines(self, value: object, where: str) -> list[str]:
        """Check a text that holds a sentence a line; it may be blank."""
        if not isinstance(value, str):
            self.check(value, where)
        return [self.check(line.strip(), where) for line in value.split("\n") if line.strip()]


# ---- records ----------------------------------------------------------------------------------


def from_dialogue(record: object, where: str, texts: Texts) -> Conversation:
    """The predecessor's JSON, or a `Dialogue`: personality, and utterances with candidates."""
    fields = _fields(record, where)
    dialogue = Dialogue([], [])
    if fields.get("personality") is not None:
        dialogue.personality = texts.check_all(
            fields["personality"], f"{where}personality", drop_blank=True
        )
    for i, item in enumerate(_list(_get(fields, "utterances", where), f"{where}utterances")):
        place = f"{where}utterances[{i}]."
        utterance = _fields(item, place)
        history = texts.check_all(_get(utterance, "history", place), f"{place}history")
        candidates = _list(_get(utterance, "candidates", place), f"{place}candidates")
        if not candidates:
            raise UserError(f"{place}candidates is empty; its last text must be the true reply")
        texts.check(candidates[-1], f"{place}candidates[{len(candidates) - 1}], the true reply,")
        candidates = texts.check_all(candidates, f"{place}candidates", drop_blank=True)
        dialogue.utterances.append(Utterance(history, candidates))
    return [dialogue]


def from_messages(record: object, where: str, texts: Texts) -> Conversation:
    """Chat messages: the system is the persona, the assistant's turns are the replies."""
    roles = {"system": "system", "user": "user", "assistant": "assistant"}
    return _from_roles(record, where, texts, ("messages", "role", "content"), roles)


def from_sharegpt(record: object, where: str, texts: Texts) -> Conversation:
    """ShareGPT: as messages, under other names."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    roles |= {"user": "user", "chatgpt": "assistant", "assistant": "assistant"}
    return _from_roles(record, where, texts, ("conversations", "from", "value"), roles)


def _from_roles(
    record: object, where: str, texts: Texts, names: tuple[str, str, str], roles: dict[str, str]
) -> Conversation:
    turns_name, role_name, text_name = names
    persona: list[str] = []
    turns: list[tuple[str, str]] = []
    items = _get(_fields(record, where), turns_name, where)
    for i, item in enumerate(_list(items, f"{where}{turns_name}")):
        place = f"{where}{turns_name}[{i}]."
        message = _fields(item, place)
        role = texts.check(_get(message, role_name, place), f"{place}{role_name}")
        text = _get(message, text_name, place)
        if role not in roles:
            raise UserError(
                f"{place}{role_name} is {_quote(role)}; it must be one of {', '.join(roles)}"
            )
        if roles[role] == "system":
            persona += texts.check_lines(text, f"{place}{text_name}")
        else:
            turns.append((roles[role], texts.check(text, f"{place}{text_name}").strip()))
    return [_side(persona, _join_turns(turns, texts), "assistant")]


def from_persona_chat(record: object, where: str, texts: Texts) -> Conversation:
    """A row of Synthetic-Persona-Chat: both personas and the conversation, a turn a line."""
    fields = _fields(record, where)
    personas = [
        texts.check_lines(_get(fields, name, where), f"{where}{name}") for name in PERSONA_COLUMNS
    ]
    place = f"{where}{CONVERSATION_COLUMN}"
    turns: list[tuple[str, str]] = []
    for line in texts.check(_get(fields, CONVERSATION_COLUMN, where), place).split("\n"):
        line = line.strip()
        if turn := _TURN.fullmatch(line):
            starred, speaker, text = turn.groups()
            # Some conversations are in Markdown: "*User 1:* Hi!" and "* User 1: Hi! *".
            if starred:
                text = text.lstrip("*") if text.startswith("*") else text.rstrip("*")
            turns.append((speaker, text.strip()))
        elif turns and not _STAGE_DIRECTION.fullmatch(line):
            speaker, text = turns[-1]
            turns[-1] = (speaker, f"{text} {line}".strip())
    if not turns:
        raise UserError(f"{place} has no turn; a turn begins with 'User 1: ' or 'User 2: '")
    turns = _join_turns([(speaker, text) for speaker, text in turns if text], texts)
    return [_side(persona, turns, speaker) for persona, speaker in zip(personas, "12", strict=True)]


_TURN = re.compile(r"(\*+\s*)?user\s*([12])\s*:(.*)", re.IGNORECASE)
# Nobody says such a line: "", "* * *", "[A few minutes later]", "(They eat.)", "*At the bar*".
_STAGE_DIRECTION = re.compile(r"[*_=~-]*|\*.*\*|\[.*\]|\(.*\)")


def _join_turns(turns: list[tuple[str, str]], texts: Texts) -> list[tuple[str, str]]:
    """Join consecutive turns of one speaker, because segment ids alternate from turn to turn."""
    joined: list[tuple[str, str]] = []
    for speaker, text in turns:
        if joined and joined[-1][0] == speaker:
            text = f"{joined.pop()[1]} {text}"
        joined.append((speaker, text))
    return [(speaker, texts.check(text, "the turn")) for speaker, text in joined]


def _side(persona: list[str], turns: list[tuple[str, str]], speaker: str) -> Dialogue:
    """One speaker's view of alternating turns: each of their turns that answers something."""
    said = [text for _, text in turns]
    return Dialogue(
        persona,
        [
            Utterance(said[:i], [said[i]])
            for i, (who, _) in enumerate(turns)
            if who == speaker and i > 0
        ],
    )


class Shape(NamedTuple):
    """A kind of record: the names it is recognised by, and the function that reads it."""

    keys: tuple[str, ...]
    read: Callable[[object, str, Texts], Conversation]


SHAPES = {
    "json": Shape(("utterances",), from_dialogue),
    "messages": Shape(("messages",), from_messages),
    "sharegpt": Shape(("conversations",), from_sharegpt),
    "csv": Shape((*PERSONA_COLUMNS, CONVERSATION_COLUMN), from_persona_chat),
}


def shape_of(names: Collection[str]) -> str | None:
    """The shape whose keys are all among `names`, or None."""
    return next((name for name, shape in SHAPES.items() if set(shape.keys) <= set(names)), None)


def read_records(
    records: Iterable[tuple[str, object]], shape: str, texts: Texts
) -> list[Conversation]:
    """Read (where, record) pairs, leaving out sides on which nothing is answered."""
    conversations = (SHAPES[shape].read(record, where, texts) for where, record in records)
    answered = ([side for side in sides if side.utterances] for sides in conversations)
    return [sides for sides in answered if sides]


def split_records(data: object, where: str) -> dict[str, list[tuple[str, object]]]:
    """Name the records of parsed JSON: {"train": [...], "valid": [...]}, a list, or one record.

    Returns a list of (where, record) for "train", and for "valid" where there is one.
    """
    if isinstance(data, dict) and shape_of(data):
        return {"train": [(where, data)]}
    if isinstance(data, dict):
        splits = {"train": _numbered(_get(data, "train", where), f"{where}train")}
        for name in VALID_NAMES:
            if "valid" not in splits and data.get(name) is not None:
                splits["valid"] = _numbered(data[name], f"{where}{name}")
        return splits
    if isinstance(data, list | tuple):
        return {"train": _numbered(data, where)}
    raise UserError(
        f"{where.rstrip(': ')} holds {_kind(data)}; give a list of dialogues, or an object with "
        '"train" and "valid"'
    )


def _numbered(records: object, where: str) -> list[tuple[str, object]]:
    return [(f"{where}[{i}].", record) for i, record in enumerate(_list(records, where))]


# ---- files ------------------------------------------------------------------------------------


def read_json(
    text: str, name: str, shape: str | None, texts: Texts
) -> dict[str, list[Conversation]]:
    """Read one JSON document or JSON lines, whose records have `shape` (None: as they look)."""
    first, _, rest = text.strip().partition("\n")
    if rest and _is_json(first):
        lines = enumerate(text.split("\n"), 1)
        data = {
            "train": [
                (f"{name}, line {number}: ", _parse_json(line, name, number))
                for number, line in lines
                if line.strip()
            ]
        }
    else:
        data = split_records(_parse_json(text, name), f"{name}: ")
    splits = {}
    for split, records in data.items():
        record = records[0][1] if records else None
        found = shape_of(record) if isinstance(record, dict) else None
        splits[split] = read_records(records, shape or found or "json", texts)
    return splits


def _parse_json(text: str, name: str, line: int = 1) -> Any:
    try:
        # No number is used, and int refuses those of more than 4,300 digits.
        return json.loads(text, parse_int=float)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}, line {line + error.lineno - 1}: this is not valid JSON ({error.msg}: column "
            f"{error.colno}); mend it, or write the file again if it was cut short"
        ) from None
    except RecursionError:
        raise UserError(
            f"{name}, line {line}: the JSON is nested too deeply to be a dialogue; mend it"
        ) from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        return False
    return True


def read_csv(text: str, name: str, texts: Texts) -> list[Conversation]:
    """Read Synthetic-Persona-Chat CSV."""
    # A conversation may be longer than the csv module's default for a cell, 131,072 characters.
    limit = csv.field_size_limit(len(text) + 1)
    try:
        return read_records(_csv_rows(text, name), "csv", texts)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    # strict: a quote that is never closed is an error, not one cell with the rest of the file.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}, line {rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{where}: the record that begins here is not valid CSV ({error}); check that its "
                "quotes are closed"
            ) from None
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [cell.strip().lower() for cell in row]
            for column in SHAPES["csv"].keys:
                if column.lower() not in header:
                    raise UserError(
                        f"{where}: the column {_quote(column)} is missing from the header; name "
                        "the columns as Synthetic-Persona-Chat does"
                    )
        elif len(row) != len(header):
            raise UserError(
                f"{where}: the record that begins here has {len(row)} cells where the header has "
                f"{len(header)}; put quotes around cells that hold commas"
            )
        else:
            yield (
                f"{where}: ",
                {column: row[header.index(column.lower())] for column in SHAPES["csv"].keys},
            )


_PARLAI_LINE = re.compile(r"([0-9]{1,9}) (.*)", re.DOTALL)


def read_parlai(text: str, name: str, texts: Texts) -> list[Conversation]:
    """Read ParlAI text."""
    dialogues: list[Dialogue] = []
    history: list[str] = []
    last_number = 0
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {line_number}"
        # ParlAI writes a line break inside a text as the two characters \n.
        match = _PARLAI_LINE.fullmatch(line.replace("\\n", "\n"))
        if match is None:
            raise UserError(
                f"{where}: a ParlAI line begins with its number in the dialogue and a space; "
                "number the lines from 1"
            )
        number, fields = int(match[1]), match[2].split("\t")
        if not dialogues or number <= last_number:
            dialogues.append(Dialogue([], []))
            history = []
        last_number = number
        if len(fields) > 4:
            raise UserError(
                f"{where}: {len(fields)} fields where ParlAI has at most four (text, reply, "
                "reward, candidates); delete the tabs inside the texts"
            )
        said = []
        for part in fields[0].split("\n"):
            if part.startswith("your persona:"):
                sentence = part.removeprefix("your persona:").strip()
                dialogues[-1].personality += texts.check_all(
                    [sentence], f"{where}: your persona", drop_blank=True
                )
            elif not part.startswith("partner's persona:"):
                said.append(part)
        if len(fields) == 1:
            if said:
                raise UserError(
                    f"{where}: there is no tab, so there is no reply; write 'N text<TAB>reply' or "
                    "'N your persona: ...'"
                )
            continue
        # Said later, silence has to stay in the history, where the speakers alternate.
        if not history and (not said or said == [SILENCE]):
            pass
        else:
            history.append(texts.check("\n".join(said).strip(), f"{where}: the text"))
        reply = texts.check(fields[1].strip(), f"{where}: the reply")
        others = [c.strip() for c in fields[3].split("|")] if len(fields) == 4 else []
        others = texts.check_all(others, f"{where}: candidates", drop_blank=True)
        candidates = [*(other for other in others if other != reply), reply]
        dialogues[-1].utterances.append(Utterance(history.copy(), candidates))
        history.append(reply)
    return [[dialogue] for dialogue in dialogues if dialogue.utterances]


# ---- fields -----------------------------------------------------------------------------------


def _fields(record: object, where: str) -> dict[str, Any]:
    if isinstance(record, Dialogue | Utterance):
        return {name: getattr(record, name) for name in record.__slots__}
    if not isinstance(record, dict):
        raise UserError(f"{where.rstrip('.: ')} must be an object, not {_kind(record)}; mend it")
    return record


def _get(fields: dict[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        raise UserError(f"{where}{name} is missing; add it, or choose the reader that fits")
    return fields[name]


def _list(values: object, where: str) -> list | tuple:
    if not isinstance(values, list | tuple):
        raise UserError(f"{where} must be a list, not {_kind(values)}; put it in brackets")
    return values


def _kind(value: object) -> str:
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


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
