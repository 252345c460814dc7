"""The one rule of what is cut from a dialogue that is too long, told on lengths alone.

Training, evaluation, ranking and generation all ask it; `csrc/host/index.h` is its C++ twin.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from convai_fast.dialogue.layout import Layout, Place


class Fit(NamedTuple):
    """What is kept of a persona and a history.

    Attributes:
        num_sentences: how many persona sentences, the first ones.
        num_turns: how many turns of history, the last ones.
        num_skipped_tokens: how many tokens are left out at the beginning of the first kept turn.
        num_tokens: of what is kept and all that stands around it, up to the last token before the
            reply, which is not counted.
    """

    num_sentences: int
    num_turns: int
    num_skipped_tokens: int
    num_tokens: int


def fit(
    sentence_lengths: Sequence[int],
    turn_lengths: Sequence[int],
    layout: Layout,
    room: int,
    elsewhere: Mapping[Place, Sequence[int]] = {},
) -> Fit:
    """Cut a persona and a history to the `room` tokens that a reply leaves them.

    The oldest turns go first, down to the one that is answered, then persona sentences from the
    end, then the beginning of the turn that is answered, which goes altogether, with what stands
    around it, where not one token of it fits. What the layout has in any case always stays, and so
    does the first sentence where what stands instead of a persona would take as much.

    Args:
        sentence_lengths: tokens of each persona sentence.
        turn_lengths: tokens of each turn, oldest first, without what stands around it.
        room: positions for all that comes before the last token of `layout.reply_open`.
        elsewhere: the lengths of all sentences, or turns, in places where they differ from those:
            where a sentence is not in the middle, or where the persona is a part of the turn.

    Example:
        >>> fit([2, 1], [2, 1, 3], layout, room=13)  # <bos>, persona 3, history 3 + 2 + 4: all
        Fit(num_sentences=2, num_turns=3, num_skipped_tokens=0, num_tokens=13)
        >>> fit([2, 1], [2, 1, 3], layout, room=7)  # <bos>, a sentence and the last turn
        Fit(num_sentences=1, num_turns=1, num_skipped_tokens=0, num_tokens=7)
        >>> fit([2, 1], [2, 1, 3], layout, room=4)  # <bos>, a speaker, the turn's last two tokens
        Fit(num_sentences=0, num_turns=1, num_skipped_tokens=1, num_tokens=4)
    """
    frame = len(layout.begin) + len(layout.reply_open) - 1
    personas = _lengths_of_personas(sentence_lengths, elsewhere, layout)
    bare = _lengths_of_histories(turn_lengths, layout)
    with_persona = list(bare)
    for count in range(len(bare) if Place.PERSONA_TURN in elsewhere else 0):
        at = layout.turn_of_persona(count)
        if at is not None and at >= 0:
            turn = at - count
            with_persona[count] += elsewhere[Place.PERSONA_TURN][turn] - turn_lengths[turn]
    num_sentences, num_turns = len(sentence_lengths), len(turn_lengths)

    def excess() -> int:
        history = (with_persona if num_sentences else bare)[num_turns]
        return frame + personas[num_sentences] + history - room

    while excess() > 0 and num_turns > 1:
        num_turns -= 1
    least = 1 if num_sentences and 0 < personas[1] <= personas[0] else 0
    while excess() > 0 and num_sentences > least:
        num_sentences -= 1
    if excess() <= 0 or num_turns == 0:
        return Fit(num_sentences, num_turns, 0, room + excess())
    # Only the turn that is answered is left.
    if excess() < turn_lengths[-1]:
        return Fit(num_sentences, 1, excess(), room)
    return Fit(num_sentences, 0, 0, frame + personas[num_sentences] + bare[0])


def _lengths_of_personas(
    sentences: Sequence[int], elsewhere: Mapping[Place, Sequence[int]], layout: Layout
) -> list[int]:
    """Tokens of the first 0, 1, … sentences with what stands around them."""
    around = len(layout.persona_open) + len(layout.persona_close)
    nothing = len(layout.no_persona)
    if layout.persona_turn != "none":
        around -= len(layout.turn_open[1])  # whose place it takes
        nothing = 0
    only, first, last = (
        elsewhere.get(place, sentences)
        for place in (Place.ONLY_SENTENCE, Place.FIRST_SENTENCE, Place.LAST_SENTENCE)
    )
    lengths = [nothing, *(around + length for length in only[:1])]
    before = accumulate(sentences[1:], initial=around + sum(first[:1]))
    return lengths + [a + b for a, b in zip(before, last[1:], strict=False)]


def _lengths_of_histories(turns: Sequence[int], layout: Layout) -> list[int]:
    """Tokens of the last 0, 1, … turns with what stands around them."""
    around = [len(a) + len(b) for a, b in zip(layout.turn_open, layout.turn_close, strict=True)]
    lengths = [0]
    for number, turn in enumerate(reversed(turns), start=1):
        lengths.append(lengths[-1] + around[number % 2] + turn)  # the last turn is speaker2's
    if layout.partner_begins:  # with an empty turn
        lengths[::2] = [length + around[1] for length in lengths[::2]]
    return lengths
