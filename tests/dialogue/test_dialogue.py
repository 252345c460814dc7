"""A history is a view of its conversation, and looks like the list that it stands for."""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from convai_fast.dialogue.dialogue import Dialogue, History, Utterance

TURNS = ["a", "b", "c", "d"]


@given(st.integers(0, 4), st.slices(6))
def test_a_view_has_the_items_and_slices_of_the_list(count, part):
    view, expected = History(TURNS, count), TURNS[:count]
    assert (len(view), list(view), view[part]) == (count, expected, expected[part])
    assert view == expected and expected == view and repr(view) == repr(expected)
    assert view != [*expected, "e"] and view != "".join(expected)
    assert [view[i] for i in range(-count, count)] == expected * 2


def test_a_view_grows_no_further_than_its_turns():
    turns = ["a"]
    view = History(turns, 1)
    turns.append("b")
    assert view == ["a"]


def test_asdict_gives_lists_that_json_writes():
    dialogue = Dialogue(["i sing"], [Utterance(History(TURNS, 2), ["x"])])
    written = json.loads(json.dumps(dataclasses.asdict(dialogue)))
    assert written["utterances"] == [{"history": ["a", "b"], "candidates": ["x"]}]
