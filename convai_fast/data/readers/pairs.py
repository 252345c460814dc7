"""Plain pairs: what is said and the reply to it, a record each.

    {"prompt": "Hello!", "completion": "Hi, some tea?"}

Also `instruction` (and `input`) with `output`, `question` with `answer`, `response` for the reply;
`persona` or `system` and `distractors` or `rejected` where there are any. A pair whose `label` is
false, 0, no or bad holds a bad reply: it becomes a distractor of the good ones to the same prompt.
"""

from collections.abc import Collection, Iterable, Iterator

from convai_fast.data.readers.fields import Texts, fields_of, flag_says_no, get, is_absent
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
    dialogue = Dialogue(persona, [Utterance([prompt], [*distractors, reply])])
    is_bad = flag_says_no(fields, "label", log)
    return [dialogue if is_bad is None else LabelledPair(dialogue, is_bad)]


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
        pair.utterances[0].candidates[:0] = bad.get(pair.prompt, [])
        yield [pair]
