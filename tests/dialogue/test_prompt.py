"""The prompt of a dialogue: its layout, and what is left of one that does not fit."""

import pytest

from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.layout import classic
from convai_fast.dialogue.prompt import fit_prompt, shortest_prompt

BOS, EOS, S1, S2, PAD = SPECIAL = SpecialIds(bos=90, eos=91, speaker1=92, speaker2=93, pad=94)
CLASSIC = classic(SPECIAL)
PERSONA, HISTORY = [[1, 2], [3]], [[4, 5], [6], [7, 8, 9]]


def test_a_prompt_is_persona_and_turns_with_alternating_speakers():
    prompt = fit_prompt(PERSONA, HISTORY[1:], CLASSIC, 50)
    assert prompt.input_ids == [BOS, 1, 2, 3, S1, 6, S2, 7, 8, 9, S1]
    assert prompt.token_type_ids == [S1] * 6 + [S2] * 4 + [S1]


@pytest.mark.parametrize(
    ("room", "input_ids"),
    [
        (14, [BOS, 1, 2, 3, S2, 4, 5, S1, 6, S2, 7, 8, 9, S1]),
        (13, [BOS, 1, 2, 3, S1, 6, S2, 7, 8, 9, S1]),
        (10, [BOS, 1, 2, 3, S2, 7, 8, 9, S1]),
        (8, [BOS, 1, 2, S2, 7, 8, 9, S1]),
        (5, [BOS, S2, 8, 9, S1]),
        (shortest_prompt(CLASSIC), [BOS, S2, 9, S1]),
        (3, [BOS, S1]),
        (2, [BOS, S1]),
    ],
)
def test_what_does_not_fit_is_left_out(room, input_ids):
    prompt = fit_prompt(PERSONA, HISTORY, CLASSIC, room)
    assert prompt.input_ids == input_ids
    assert len(prompt.token_type_ids) == len(input_ids) <= room
    assert PERSONA + HISTORY == [[1, 2], [3], [4, 5], [6], [7, 8, 9]]  # the caller's stay whole


def test_a_hundred_thousand_turns_are_cut_in_one_pass():
    history = [[i % 90] for i in range(100_000)]
    assert fit_prompt([], history, CLASSIC, 6).input_ids == [BOS, S1, 8, S2, 9, S1]
    assert fit_prompt([[1]] * 100_000, history, CLASSIC, 5).input_ids == [BOS, 1, S2, 9, S1]


def test_tuples_will_do():
    as_tuples = fit_prompt(tuple(map(tuple, PERSONA)), tuple(map(tuple, HISTORY)), CLASSIC, 5)
    assert as_tuples == fit_prompt(PERSONA, HISTORY, CLASSIC, 5)
