"""What `collate` reads beside tokens: the plan of a batch, and the layout of its sequences.

Of a text there are as many utterances as its tokens depend on where it stands. Places that have the
same surroundings share one, so there are as many classes of utterances as a layout has different
surroundings, which is one for the classic layout. Of each class there is an utterance for each
text, and after all of them one for each piece of the layout:

    text 0 … text n - 1 of class 0 | text 0 … text n - 1 of class 1 | begin, persona_open, …
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from convai_fast.dialogue.layout import (
    Ids,
    Layout,
    Place,
    Surroundings,
    build_sequence,
    sentence_place,
)

PLAN_COLUMNS = (
    "persona_first",  # where the row's persona begins in persona_ids
    "persona_count",  # how many sentences it has
    "persona_rotation",  # how many of them move from the end to the front
    "persona_kept",  # how many are kept, after the rotation
    "history_first",  # where the row's history begins in history_ids
    "history_count",  # how many turns it has
    "history_skip",  # how many tokens are left out at the beginning of the first of them
    "candidate_first",  # where the row's candidates begin in candidate_ids
    "candidate_count",  # how many it has; the last is the true reply
)

LAYOUT_NUMBERS = (
    "eos",  # the token after a reply
    "reply_begin",  # the token before it
    "pad",
    "speaker1",  # segments
    "speaker2",
    "persona_turn",  # the turn that the persona is a part of: 0 none, 1 the first, 2 the last
    "partner_begins",  # whether an empty turn of speaker2's precedes an even number of turns
    # What stands around texts, as utterance ids:
    "begin",
    "persona_open",
    "persona_close",
    "no_persona",
    "speaker1_open",
    "speaker1_close",
    "speaker2_open",
    "speaker2_close",
    "reply_open",  # but for its last token, which is reply_begin
    # The utterance id of a text in each place, less its id in persona_ids and the other tables:
    "only_sentence",
    "first_sentence",
    "last_sentence",
    "middle_sentence",
    "speaker1_turn",
    "speaker2_turn",
    "turn_with_persona",
    "reply",
)

_PERSONA_TURNS: tuple[Literal["none", "first", "last"], ...] = ("none", "first", "last")
_FIRST_PIECE, _FIRST_PLACE = map(LAYOUT_NUMBERS.index, ("begin", "only_sentence"))


def classes_of(layout: Layout) -> list[Surroundings]:
    """The different surroundings of a layout, in the order of their first places."""
    return list(dict.fromkeys(layout.surroundings))


def class_of_places(layout: Layout) -> list[int]:
    """The number of each place's class."""
    classes = classes_of(layout)
    return [classes.index(each) for each in layout.surroundings]


def pieces_of(layout: Layout) -> list[Ids]:
    """What stands around texts, in the order of `LAYOUT_NUMBERS`."""
    around_turns = zip(layout.turn_open, layout.turn_close, strict=True)
    return [
        layout.begin,
        layout.persona_open,
        layout.persona_close,
        layout.no_persona,
        *(piece for around in around_turns for piece in around),
        layout.reply_open[:-1],
    ]


def layout_numbers(layout: Layout, num_texts: int) -> Tensor:
    """The layout of a store of `num_texts` texts as `collate` reads it, int64; see
    `LAYOUT_NUMBERS`."""
    first_piece = len(classes_of(layout)) * num_texts
    numbers = [
        layout.eos,
        layout.reply_open[-1],
        layout.pad,
        layout.speaker1,
        layout.speaker2,
        _PERSONA_TURNS.index(layout.persona_turn),
        int(layout.partner_begins),
        *range(first_piece, first_piece + len(pieces_of(layout))),
        *(number * num_texts for number in class_of_places(layout)),
    ]
    return torch.tensor(numbers)


def layout_of(numbers: Sequence[int], utterance: Callable[[int], list[int]]) -> Layout:
    """What `LAYOUT_NUMBERS` tell of a layout, given the tokens of each utterance."""
    eos, reply_begin, pad, speaker1, speaker2, persona_turn, partner_begins, *_ = numbers
    pieces = [tuple(utterance(id)) for id in numbers[_FIRST_PIECE:_FIRST_PLACE]]
    begin, persona_open, persona_close, no_persona, open1, close1, open2, close2, reply = pieces
    return Layout(
        begin=begin,
        persona_open=persona_open,
        persona_close=persona_close,
        persona_turn=_PERSONA_TURNS[persona_turn],
        no_persona=no_persona,
        turn_open=(open1, open2),
        turn_close=(close1, close2),
        partner_begins=bool(partner_begins),
        reply_open=(*reply, reply_begin),
        eos=eos,
        ends=(eos,),
        pad=pad,
        speaker1=speaker1,
        speaker2=speaker2,
    )


def first_of_places(numbers: Sequence[int]) -> Sequence[int]:
    """Of `LAYOUT_NUMBERS` those that make a text's id an utterance's, by its place."""
    return numbers[_FIRST_PLACE:]


class PlanTexts(NamedTuple):
    """The texts of a row, each as in its place, and whether the true reply lost its end, since what
    is too long is cut."""

    persona: list[list[int]]
    history: list[list[int]]
    candidates: list[list[int]]
    is_cut: bool


def read_plan(
    tokens: Tensor,
    utterance_offsets: Tensor,
    persona_ids: Tensor,
    history_ids: Tensor,
    candidate_ids: Tensor,
    plan: Tensor,
    layout_numbers: Tensor,
    max_length: int,
) -> tuple[Layout, Iterator[PlanTexts]]:
    """The layout, and the texts of each row of the plan, cut to fit `max_length`."""
    offsets, arena = utterance_offsets.cpu(), tokens.cpu()

    def utterance(id: int) -> list[int]:
        begin, end = offsets[id : id + 2].tolist()
        return arena[begin:end].tolist()

    numbers = layout_numbers.tolist()
    layout, firsts = layout_of(numbers, utterance), first_of_places(numbers)

    def in_places(ids: list[int], places: Sequence[Place]) -> list[list[int]]:
        return [utterance(id + firsts[at]) for id, at in zip(ids, places, strict=True)]

    def rows() -> Iterator[PlanTexts]:
        for row, columns in enumerate(plan.tolist()):
            first, count, rotation, kept, turn, num_turns, skipped, candidate, num_replies = columns
            sentences = persona_ids[first : first + count].tolist()
            # A rotation moves the last sentence to the front: [a, b, c] by 1 is [c, a, b].
            sentences = [*sentences[count - rotation :], *sentences[: count - rotation]][:kept]
            persona = in_places(sentences, [sentence_place(i, kept) for i in range(kept)])
            turns = history_ids[turn : turn + num_turns].tolist()
            history = in_places(turns, layout.places_of_turns(num_turns, kept > 0))
            history[:1] = [each[skipped:] for each in history[:1]]
            replies = candidate_ids[candidate : candidate + num_replies].tolist()
            candidates = in_places(replies, [Place.REPLY] * num_replies)
            prefix, *_ = build_sequence(persona, history, [], layout, with_eos=False)
            room = max_length - len(prefix) - 1  # beside eos
            if candidates and room < 0:
                raise ValueError(f"collate: row {row} does not fit max_length {max_length}")
            is_cut = bool(candidates) and len(candidates[-1]) > room
            yield PlanTexts(persona, history, [reply[:room] for reply in candidates], is_cut)

    return layout, rows()
