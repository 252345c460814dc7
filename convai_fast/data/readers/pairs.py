"""Plain pairs: what is said and the reply to it, a record each.

    {"prompt": "Hello!", "completion": "Hi, some tea?"}

Also `instruction` (and `input`) with `output`, `question` with `answer`, `response` for the reply;
`persona` or `system` and `distractors` or `rejected` where there are any. A pair whose `label` is
false or 0 holds a bad reply: it becomes a distractor of the good ones to the same prompt.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from convai_fast.data.readers.fields import Texts, fields_of, get, is_blank
from convai_fast.data.readers.log import ReadingLog
from convai_fast.dialogue.dialogue import Conversation, Dialogue, Utterance

_SHAPES = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("prompt", "chosen"),
)
_PERSONAS = ("persona", "personality", "personas", "system", "system_prompt")
_DISTRACTORS = ("distractors", "rejected")


def pair_fields(names: Collection[str]) -> tuple[str, str] | None:
    """The fields of prompt and reply among `names`, or None."""
    return next((shape for shape in _SHAPES if set(shape) <= set(names)), None)


def read_pair(record: object, where: str, texts: Texts, log: ReadingLog) -> Conversation:
    """A pair as a dialogue of one utterance; see `join_labels` for bad replies."""
    fields = fields_of(record, where)
    prompt_name, reply_name = pair_fields(fields) or ("prompt", "completion")
    persona = [
        sentence
        for name in _PERSONAS
        for sentence in texts.persona(fields.get(name), f"{where}{name}")
    ]
    prompt = texts.check(get(fields, prompt_name, where), f"{where}{prompt_name}").strip()
    if prompt_name == "instruction" and not _is_absent(fields.get("input")):
        prompt = texts.check(f"{prompt}\n{fields['input']}".strip(), f"{where}input")
    reply = texts.check(get(fields, reply_name, where), f"{where}{reply_name}").strip()
    distractors = [
        text for name in _DISTRACTORS for text in texts.persona(fields.get(name), f"{where}{name}")
    ]
    return [Dialogue(persona, [Utterance([prompt], [*distractors, reply])])]


def is_bad(fields: dict[str, Any]) -> bool | None:
    """Whether the pair's label says that its reply is a bad one; None without a label."""
    label = fields.get("label")
    if isinstance(label, str):
        return label.strip().lower() in ("0", "false", "no")
    return None if label is None else label in (0, False)


def join_labels(
    pairs: Iterable[tuple[bool | None, Conversation]], log: ReadingLog
) -> Iterator[Conversation]:
    """Yield the good ones of (is bad, pair), with bad replies to their prompt as distractors.

    Only pairs with a label are kept until the last is read.
    """
    bad: dict[tuple[str, ...], list[str]] = {}
    labelled: list[Conversation] = []
    for pair_is_bad, conversation in pairs:
        if pair_is_bad is None:
            yield conversation
        elif pair_is_bad:
            bad.setdefault(_prompt_of(conversation), []).append(
                _utterance_of(conversation).candidates[-1]
            )
        else:
            labelled.append(conversation)
    prompts = {_prompt_of(conversation) for conversation in labelled}
    for prompt, replies in bad.items():
        for _ in replies:
            log.note(
                "replies labelled as bad are distractors"
                if prompt in prompts
                else "replies labelled as bad have no good one to their prompt and are left out"
            )
    for conversation in labelled:
        _utterance_of(conversation).candidates[:0] = bad.get(_prompt_of(conversation), [])
        yield conversation


def _utterance_of(conversation: Conversation) -> Utterance:
    (dialogue,) = conversation
    (utterance,) = dialogue.utterances
    return utterance


def _prompt_of(conversation: Conversation) -> tuple[str, ...]:
    return (*conversation[0].personality, *_utterance_of(conversation).history)


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, str) and is_blank(value))
