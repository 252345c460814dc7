"""How a dialogue is laid out for a model: what stands around persona, turns and reply, as tokens.

    begin  persona  turn … turn  reply_open reply eos

A persona is `persona_open sentence … sentence persona_close`, a turn is its speaker's `turn_open`,
its text and `turn_close`. In the format of the predecessor, `classic`, that is

    [bos] sentence …  [speaker] turn …  [speaker1] reply [eos]

and a model that has learnt to chat reads what its tokenizer's chat template writes, here ChatML:

    <|im_start|>system\\n sentence … <|im_end|>\\n  <|im_start|>user\\n turn <|im_end|>\\n …
    <|im_start|>assistant\\n reply <|im_end|>
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from convai_fast.dialogue.format import SpecialIds

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
