"""Layouts: where what stands around texts goes, and how a layout is kept in a file."""

import json
from dataclasses import replace

import pytest
from hypothesis import given

from convai_fast.dialogue.layout import Layout, Place, build_sequence
from tests.helpers.layouts import layouts

S1, S2, EOS = 81, 82, 99
# What a chat template writes, in round numbers: 10 opens and 11 closes the persona, and so on.
CHAT = Layout(
    begin=(1,),
    persona_open=(10,),
    persona_close=(11,),
    no_persona=(12,),
    turn_open=((20,), (30,)),
    turn_close=((21,), (31,)),
    reply_open=(40, 41),
    eos=EOS,
    ends=(EOS,),
    pad=0,
    speaker1=S1,
    speaker2=S2,
)
PARTNER_FIRST = replace(CHAT, partner_begins=True)
PERSONA, TURNS = [[2], [3, 4]], [[5], [6], [7]]


@pytest.mark.parametrize(
    ("layout", "persona", "turns", "input_ids"),
    [
        (CHAT, PERSONA, TURNS[1:], [1, 10, 2, 3, 4, 11, 20, 6, 21, 30, 7, 31]),
        (CHAT, [], TURNS[2:], [1, 12, 30, 7, 31]),
        (CHAT, [], [], [1, 12]),
        (PARTNER_FIRST, [], TURNS[1:], [1, 12, 30, 31, 20, 6, 21, 30, 7, 31]),
        (PARTNER_FIRST, [], [], [1, 12, 30, 31]),
        (
            replace(PARTNER_FIRST, persona_turn="first"),
            PERSONA,
            TURNS,
            [1, 10, 2, 3, 4, 11, 5, 31, 20, 6, 21, 30, 7, 31],
        ),
        (
            replace(PARTNER_FIRST, persona_turn="first"),
            PERSONA,
            TURNS[1:],
            [1, 10, 2, 3, 4, 11, 31, 20, 6, 21, 30, 7, 31],
        ),
        (
            replace(PARTNER_FIRST, persona_turn="last"),
            PERSONA,
            TURNS,
            [1, 30, 5, 31, 20, 6, 21, 10, 2, 3, 4, 11, 7, 31],
        ),
        (replace(PARTNER_FIRST, persona_turn="last"), PERSONA, [], [1, 10, 2, 3, 4, 11, 31]),
        (replace(PARTNER_FIRST, persona_turn="last"), [], TURNS[2:], [1, 30, 7, 31]),
    ],
)
def test_a_sequence_is_laid_out(layout, persona, turns, input_ids):
    ids, segments, labels = build_sequence(persona, turns, [8], layout)
    assert ids == [*input_ids, 40, 41, 8, EOS]
    partners = [30, 31, 5, 7]
    assert segments == [S2 if id in partners else S1 for id in ids]
    assert labels == [-100] * (len(ids) - 2) + [8, EOS]


def test_a_persona_within_a_turn_changes_the_place_of_the_turns_text():
    first, last = (replace(PARTNER_FIRST, persona_turn=turn) for turn in ("first", "last"))
    one, two, with_persona = Place.SPEAKER1, Place.SPEAKER2, Place.PERSONA_TURN
    assert CHAT.places_of_turns(3, has_persona=True) == [two, one, two]
    assert first.places_of_turns(3, has_persona=False) == [two, one, two]
    assert first.places_of_turns(3, has_persona=True) == [with_persona, one, two]
    assert first.places_of_turns(2, has_persona=True) == [one, two]  # it is in an empty one
    assert last.places_of_turns(2, has_persona=True) == [one, with_persona]
    assert last.places_of_turns(0, has_persona=True) == []


@given(layouts)
def test_a_layout_is_the_same_when_it_is_read_from_a_file(layout):
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize("change", [{"reply_open": ()}, {"persona_turn": "last"}])
def test_a_layout_without_a_place_for_reply_or_persona_is_refused(change):
    with pytest.raises(ValueError, match="reply_open is empty, or its persona has no turn"):
        replace(CHAT, **change)
