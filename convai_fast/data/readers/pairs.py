"""Plain pairs: what is said and the reply to it, a record each.

    {"prompt": "Hello!", "completion": "Hi, some tea?"}

Also `instruction` (and `input`) with `output`, `question` with `answer`, `response` for the reply;
`persona` or `system`, `history` (texts, or pairs of them) and `distractors` or `rejected` where
there are any. A pair whose `label` is false, 0, no or bad holds a bad reply: it becomes a
distractor of the good ones to the same prompt. One whose `weight`, `loss` or `train` says no is
left out.
"""

from collections.abc import Collection, Iterable, Iterator

from convai_fast.data.readers.fields import (
    Texts,
    as_list,
    fields_of,
    flag_says_no,
    get,
    is_absent,
)
from convai_fast.data.readers.log import ReadingLog
from convai_fast.dialogue.dialogue import Conversation, Dialogue, Utterance
from convai_fast.errors import UserError

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


class LabelledPair(Dialogue):
    """A dialogue of one utterance, whose reply is said to be a good or a bad one."""

    __slots__ = ("is_bad",)

    def __init__(self, dialogue: Dialogue, is_bad: bool) -> None:
        super().__init__(dialogue.personality, dialogue.utterances)
        self.is_bad = is_bad

    @property
    def prompt(self) -> tuple[str, ...]:
        """Persona and history: what the reply answers."""
        return (*self.personality, *self.utterances[0].history)


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
    if prompt_name == "instruction" and not is_absent(fields.get("input")):
        prompt = texts.check(f"{prompt}\n{fields['input']}".strip(), f"{where}input")
    reply = texts.check(get(fields, reply_name, where), f"{where}{reply_name}").strip()
    distractors = [
        text for name in _DISTRACTORS for text in texts.persona(fields.get(name), f"{where}{name}")
    ]
    distractors = _without_reply(distractors, reply, log)
    history = [*_history(fields.get("history"), f"{where}history", texts), prompt]
    dialogue = Dialogue(persona, [Utterance(history, [*distractors, reply])])
    is_bad = flag_says_no(fields, "label", log)
    return [dialogue if is_bad is None else LabelledPair(dialogue, is_bad)]


def _history(value: object, where: str, texts: Texts) -> list[str]:
    """What was said before the prompt: texts, or pairs of what was said and the reply to it."""
    if is_absent(value):
        return []
    turns = as_list(value, where)
    if not all(isinstance(turn, str) for turn in turns):
        if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
            raise UserError(
                f"{where} must be a list of texts, or of pairs of texts; mend it, or write messages"
            )
        return [
            text.strip()
            for i, turn in enumerate(turns)
            for text in texts.check_all(turn, f"{where}[{i}]")
        ]
    return [text.strip() for text in texts.check_all(turns, where)]


def _without_reply(distractors: list[str], reply: str, log: ReadingLog) -> list[str]:
    """The distractors that are not the true reply in other case or with other white space."""
    key = reply.lower().split()
    others = [text for text in distractors if text.lower().split() != key]
    for _ in distractors[len(others) :]:
        log.note("distractors that equal the true reply are left out")
    return others


def join_labels(conversations: Iterable[Conversation], log: ReadingLog) -> Iterator[Conversation]:
    """Of labelled pairs yield the good ones, with bad replies to their prompt as distractors.

    Others pass at once; labelled ones are kept until the last is read.
    """
    bad: dict[tuple[str, ...], list[str]] = {}
    good: list[LabelledPair] = []
    for conversation in conversations:
        first = conversation[0]
        if not isinstance(first, LabelledPair):
            yield conversation
        elif first.is_bad:
            bad.setdefault(first.prompt, []).append(first.utterances[0].candidates[-1])
        else:
            good.append(first)
    prompts = {pair.prompt for pair in good}
    for prompt, replies in bad.items():
        for _ in replies:
            log.note(
                "replies labelled as bad are distractors"
                if prompt in prompts
                else "replies labelled as bad have no good one to their prompt and are left out"
            )
    for pair in good:
        candidates = pair.utterances[0].candidates
        candidates[:0] = _without_reply(bad.get(pair.prompt, []), candidates[-1], log)
        yield [pair]
