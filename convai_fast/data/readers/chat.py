"""Chat data: messages with roles, in the dialects that people have.

    {"messages": [{"role": "system", "content": "I like tea."},
                  {"role": "user", "content": "Hello!"},
                  {"role": "assistant", "content": "Hi, some tea?"}]}

The turns may be `conversations` (or `conversation`, `thread`), a turn `from` and `value` (or
`text`), or the turns plain texts that alternate, the user's first. A persona may stand beside them
as `system`, `system_prompt` or `persona`. A turn whose `weight`, `loss_weight`, `loss`, `train` or
`trainable` says no (0, false) is seen and never learnt; a record of which one of these, or its
`label`, does so is left out.
"""

from typing import Any

from convai_fast.data.readers.fields import (
    OWN_READER,
    Texts,
    Turns,
    as_list,
    fields_of,
    flag_says_no,
    is_absent,
    is_unlearnt,
    kind,
    listed,
    quote,
    says_no,
)
from convai_fast.data.readers.log import ReadingLog
from convai_fast.dialogue.dialogue import Conversation
from convai_fast.errors import UserError

TURNS = ("messages", "conversations", "conversation", "thread")
_PERSONAS = ("system", "system_prompt", "persona", "personality", "personas")
_ROLES = ("role", "from")
_TEXTS = ("content", "value", "text")
_TEXT_PARTS = ("text", "input_text", "output_text")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
}
_TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")
# Beside a turn or a record, these look as if they changed what is learnt.
_NOT_UNDERSTOOD = ("mask", "masked", "loss_mask", "loss_scale", "ignore", "train_detail")


def turns_field(names: Any) -> str | None:
    """Which of a record's fields holds the turns of a chat, or None."""
    return next((name for name in TURNS if name in names), None)


def read_chat(record: object, where: str, texts: Texts, log: ReadingLog) -> Conversation:
    """One conversation: the lines of the system are the persona, the assistant's turns the replies.

    What the system says in the middle is known only from there on.
    """
    fields = fields_of(record, where)
    name = turns_field(fields)
    if name is None:
        raise UserError(
            f"{where}messages is missing (found are {listed(fields)}); "
            f"name the turns messages or conversations, {OWN_READER}"
        )
    if flag_says_no(fields, "label", log):
        log.note("conversations labelled as bad are left out")
        return []
    persona = [
        sentence
        for beside in _PERSONAS
        if beside in fields
        for sentence in texts.persona(fields[beside], f"{where}{beside}")
    ]
    _note_not_understood(fields, log)
    turns, sides, begin, is_changed = Turns(texts), [], 0, False
    for role, text, place, learnt in _messages(fields[name], f"{where}{name}", texts, log):
        if role == "system":
            if len(turns) > begin:
                sides.append((persona, begin, len(turns)))
                begin = len(turns)
            # It may repeat what stands beside the turns.
            persona = list(dict.fromkeys([*persona, *texts.check_lines(text, place)]))
            is_changed = True
        else:
            # What is said before and after would be joined, and half of it learnt not knowing.
            if is_changed and turns.speakers[-1:] == [role] == ["assistant"]:
                log.note("replies that a system line interrupts are seen and not learnt")
                learnt = False
            turns.add(role, texts.check(text, place).strip(), learnt)
            is_changed = False
    sides.append((persona, begin, len(turns)))
    return [turns.side(known, "assistant", max(first, 1), end) for known, first, end in sides]


def _messages(
    items: object, where: str, texts: Texts, log: ReadingLog
) -> list[tuple[str, object, str, bool]]:
    """Role, text, place and whether it is learnt, of each turn."""
    items = as_list(items, where)
    if items and all(isinstance(item, str) for item in items):
        return [
            (("user", "assistant")[i % 2], item, f"{where}[{i}]", True)
            for i, item in enumerate(items)
        ]
    found = []
    for i, item in enumerate(items):
        place = f"{where}[{i}]"
        message = fields_of(item, f"{place}.")
        if pair := _pair(message):
            found += [(role, message[name], f"{place}.{name}", True) for role, name in pair]
            continue
        role_name = _one_of(message, _ROLES, place)
        role = _role(texts.check(message[role_name], f"{place}.{role_name}"), place, role_name)
        _note_not_understood(message, log)
        learnt = role != "assistant" or not is_unlearnt(message, log)
        if not learnt:
            log.note("turns of weight 0 are seen and not learnt")
        text_name = _one_of(message, _TEXTS, place)
        text = text_of(message[text_name], f"{place}.{text_name}")
        found.append((role, text, f"{place}.{text_name}", learnt))
    return found


def _pair(message: dict[str, Any]) -> list[tuple[str, str]] | None:
    """The two turns of an object such as {"human": …, "assistant": …}."""
    names = {ROLES.get(str(name).lower()): name for name in message}
    if len(message) == 2 and {"user", "assistant"} == names.keys():
        return [(role, names[role]) for role in ("user", "assistant")]
    return None


def _one_of(message: dict[str, Any], names: tuple[str, ...], place: str) -> str:
    name = next((name for name in names if name in message), None)
    if name is None:
        raise UserError(
            f"{place}.{names[0]} is missing (found are {listed(message)}); add it, {OWN_READER}"
        )
    return name


def _role(role: str, place: str, name: str) -> str:
    known = ROLES.get(role.strip().lower())
    if known is None:
        is_tool = role.strip().lower() in _TOOLS
        reason = "a turn of a tool, which no model here reads" if is_tool else "not a known role"
        raise UserError(
            f"{place}.{name} is {quote(role)}, {reason}; it must be one of {', '.join(ROLES)}"
        )
    return known


def text_of(content: object, place: str) -> str:
    """The text of a turn's content, which may be a list of parts: a line each."""
    if content is None:
        raise UserError(f"{place} is null, not text, as in a tool call; give the turn a text")
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserError(f"{place} must be text, not {kind(content)}; put it in quotes or mend it")
    parts = []
    for i, part in enumerate(content):
        part_kind = part.get("type", "text") if isinstance(part, dict) else kind(part)
        if isinstance(part, str):
            parts.append(part)
        elif part_kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise UserError(
                f"{place}[{i}] is {quote(str(part_kind))}, not text; dialogues here are text alone"
            )
    return "\n".join(parts)


def _note_not_understood(fields: dict[str, Any], log: ReadingLog) -> None:
    for name in _NOT_UNDERSTOOD:
        if name in fields and not says_no(fields[name]) and not is_absent(fields[name]):
            log.note(f"the field {name!r} is not understood and not used")
