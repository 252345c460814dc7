"""How a dialogue is laid out for a model: what stands around persona, turns and reply, as tokens.

    begin  persona  turn … turn  reply_open reply eos

A persona is `persona_open sentence … sentence persona_close`, a turn is its speaker's `turn_open`,
its text and `turn_close`. In the format of the predecessor, `classic`, that is

    [bos] sentence …  [speaker] turn …  [speaker1] reply [eos]

and a model that has learnt to chat reads what its tokenizer's chat template writes, here ChatML:

    <|im_start|>system\\n sentence … <|im_end|>\\n  <|im_start|>user\\n turn <|im_end|>\\n …
    <|im_start|>assistant\\n reply <|im_end|>
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from itertools import chain
from typing import Any, Literal, NamedTuple

from convai_fast.dialogue.format import IGNORED, SpecialIds

Ids = tuple[int, ...]
PersonaTurn = Literal["none", "first", "last"]


class Place(IntEnum):
    """Where a text stands; there, what is around it may change its tokens."""

    ONLY_SENTENCE = 0  # of the persona
    FIRST_SENTENCE = 1
    LAST_SENTENCE = 2
    MIDDLE_SENTENCE = 3
    SPEAKER1 = 4  # a turn of the one who replies
    SPEAKER2 = 5  # a turn of the partner
    PERSONA_TURN = 6  # one that the persona is a part of
    REPLY = 7


def sentence_place(index: int, num_sentences: int) -> Place:
    """The place of a persona's sentence, of which `num_sentences` are read."""
    return Place(2 * (index > 0) + (index + 1 < num_sentences))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a text is encoded with: its tokens are those of `leading + text + trailing` where
    `before` precedes it, whose own tokens do not count.

    `Surroundings(trailing="\\n")` makes `["i", " like", " tea", ".\\n"]` of "i like tea.", for a
    tokenizer that has a token for a line that ends with a full stop.

    `trims` tells that the text comes without the white space around it.
    """

    before: str = ""
    leading: str = ""
    trailing: str = ""
    trims: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What stands around the texts of a dialogue, as token ids; see the top of this file.

    Attributes:
        begin: before everything.
        persona_open, persona_close: around the sentences of a persona.
        persona_turn: the turn that the persona is a part of, whose text then follows
            `persona_close`, and whose `turn_open` is left out since `persona_open` includes it;
            "none" where it stands by itself, before the turns. It is the partner's: without "none",
            `partner_begins`.
        no_persona: instead of a persona that stands by itself, where there is none, or nothing is
            left of it.
        turn_open, turn_close: around a turn, of speaker1 (who replies) and of speaker2.
        partner_begins: whether the first turn must be speaker2's. Where it is not, or where there
            is none, an empty turn of speaker2's precedes it.
        reply_open: before a reply, at least one token.
        eos: the token after a reply, which is learnt and which ends it.
        ends: tokens that end a reply that is being written, `eos` among them.
        pad: fills rows.
        speaker1, speaker2: segments of speaker1's part and of speaker2's; a persona is speaker1's.
        surroundings: of a text, by its `Place`.

    Raises ValueError for an empty `reply_open`, and for a persona within a turn where the partner
    need not begin.
    """

    begin: Ids
    persona_open: Ids = ()
    persona_close: Ids = ()
    persona_turn: PersonaTurn = "none"
    no_persona: Ids = ()
    turn_open: tuple[Ids, Ids]
    turn_close: tuple[Ids, Ids] = ((), ())
    partner_begins: bool = False
    reply_open: Ids
    eos: int
    ends: Ids
    pad: int
    speaker1: int
    speaker2: int
    surroundings: tuple[Surroundings, ...] = (Surroundings(),) * len(Place)

    def __post_init__(self) -> None:
        if not self.reply_open or (self.persona_turn != "none" and not self.partner_begins):
            raise ValueError(f"a layout's reply_open is empty, or its persona has no turn: {self}")

    @property
    def empty_prompt(self) -> int:
        """Tokens of the prompt of a dialogue of which nothing is left."""
        return len(build_sequence([], [], [], self, with_eos=False)[0])

    def first_turn(self, num_turns: int) -> int:
        """The first of so many turns: 0, or -1 for an empty one of speaker2's before them."""
        return -1 if self.partner_begins and num_turns % 2 == 0 else 0

    def turn_of_persona(self, num_turns: int) -> int | None:
        """Which of so many turns a persona is a part of, counted from 0, if it is of one; -1 is the
        empty one before them."""
        if self.persona_turn == "none":
            return None
        return self.first_turn(num_turns) if self.persona_turn == "first" else num_turns - 1

    def places_of_turns(self, num_turns: int, has_persona: bool) -> list[Place]:
        """The place of each turn, oldest first: speakers alternate, and speaker2 is the last."""
        left = range(num_turns, 0, -1)
        places = [Place.SPEAKER2 if count % 2 else Place.SPEAKER1 for count in left]
        at = self.turn_of_persona(num_turns) if has_persona else None
        if at is not None and at >= 0:
            places[at] = Place.PERSONA_TURN
        return places

    def to_json(self) -> dict[str, Any]:
        """What `json` writes of it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Layout":
        """The layout that `to_json` gave; KeyError or TypeError for something else."""
        surroundings = tuple(Surroundings(**each) for each in content["surroundings"])
        rest = {name: _tuples(value) for name, value in content.items() if name != "surroundings"}
        return cls(**rest, surroundings=surroundings)


def classic(ids: SpecialIds) -> Layout:
    """The predecessor's layout, between five special tokens."""
    return Layout(
        begin=(ids.bos,),
        turn_open=((ids.speaker1,), (ids.speaker2,)),
        reply_open=(ids.speaker1,),
        eos=ids.eos,
        ends=tuple(ids),
        pad=ids.pad,
        speaker1=ids.speaker1,
        speaker2=ids.speaker2,
    )


class Part(NamedTuple):
    """A part of a sequence: "persona" (what stands before it included), "turn" or "reply"."""

    name: str
    segment: int
    ids: list[int]


def parts_of(
    persona: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    reply: Sequence[int],
    layout: Layout,
) -> Iterator[Part]:
    """Yield the parts of a candidate's sequence up to its reply, of texts encoded for their places.

    A persona that is a part of a turn comes as a part before the rest of that turn.
    """
    around = [*layout.persona_open, *chain(*persona), *layout.persona_close]
    first = [*layout.begin]
    if layout.persona_turn == "none":
        first += around if persona else layout.no_persona
    yield Part("persona", layout.speaker1, first)
    count = len(history)
    persona_turn = layout.turn_of_persona(count) if persona else None
    for i in range(layout.first_turn(count), count):
        number, segment = 0, layout.speaker1
        if (count - i) % 2:
            number, segment = 1, layout.speaker2
        before = layout.turn_open[number]
        if i == persona_turn:
            yield Part("persona", layout.speaker1, around)
            before = ()
        turn = history[i] if i >= 0 else ()
        yield Part("turn", segment, [*before, *turn, *layout.turn_close[number]])
    yield Part("reply", layout.speaker1, [*layout.reply_open, *reply])


def build_sequence(
    persona: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    reply: Sequence[int],
    layout: Layout,
    with_eos: bool = True,
) -> tuple[list[int], list[int], list[int]]:
    """Input ids, segment ids and labels of one candidate, of texts encoded for their places.

    With persona [[7]], history [[8], [9]] and reply [5, 6], in the classic layout:

        input_ids       bos 7   s1 8    s2 9    s1 5 6 eos
        token_type_ids  s1  s1  s1 s1   s2 s2   s1 s1 s1 s1
        labels           .  .    .  .    .  .    . 5 6 eos
    """
    answer = [*reply, layout.eos] if with_eos else list(reply)
    input_ids: list[int] = []
    token_type_ids: list[int] = []
    for _, segment, ids in parts_of(persona, history, answer, layout):
        input_ids += ids
        token_type_ids += [segment] * len(ids)
    labels = [IGNORED] * (len(input_ids) - len(answer)) + answer
    return input_ids, token_type_ids, labels


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
