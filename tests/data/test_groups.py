"""Conversations that hold the same turns are one group."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convai_fast.data.groups import first_equal
from convai_fast.data.readers.predecessor import Row
from convai_fast.data.spool import Spool
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from tests.helpers.conversations import conversation, long


@given(st.lists(st.binary(min_size=1, max_size=1), max_size=40))
def test_first_equal_finds_the_first_of_each_key(values):
    keys = np.frombuffer(b"".join(value * 16 for value in values), np.uint8)
    assert first_equal(keys).tolist() == [values.index(value) for value in values]


def test_first_equal_works_part_by_part(monkeypatch):
    values = np.random.default_rng(0).integers(0, 50, 3_000_000)
    keys = np.zeros((len(values), 2), np.uint64)
    keys[:, 1] = keys[:, 0] = values
    first = first_equal(keys.reshape(-1).view(np.uint8))
    _, expected = np.unique(values, return_index=True)
    assert np.array_equal(first, expected[values])


@pytest.mark.parametrize(
    "other",
    [
        ["a", "b", "c", "d"],  # the same
        ["a", "b", "c"],  # without its last turn, which nobody answers from that side
        ["b", "c", "d"],  # without its first
        ["b", "c", "d", "e"],
        ["a", "b", "c", "d", "e"],
    ],
)
def test_a_conversation_held_twice_is_one_group(other):
    with Spool() as spool:
        spool.add("train", conversation(["a", "b", "c", "d"]))
        spool.add("train", conversation(["p", "q", "r", "s"]))
        spool.add("train", conversation(other, first=(len(other) + 1) % 2))
        spool.add("train", conversation(["a", "b", "x", "y"]))  # only the greeting is the same
        assert spool.group_of.tolist() == [0, 1, 0, 3]


@pytest.mark.parametrize(
    ("conversations", "groups"),
    [
        # Each turn a record with its history.
        ([long("a", "b"), long("a", "b", "c", "d"), long("a", "b", "c", "d", "e", "f")], [0, 0, 0]),
        # Two answers to one question, and two conversations that begin alike.
        ([long("a", "b", "c", "d"), long("a", "b", "c", "x")], [0, 1]),
        ([long("a", "b"), long("a", "x")], [0, 1]),
        # A greeting is no conversation.
        ([["hi", "hello"], ["hi", "hello", "how are you ?", "fine"]], [0, 1]),
        # Windows of a few turns that move on.
        ([long("a", "b", "c", "d"), long("b", "c", "d", "e"), long("c", "d", "e", "f")], [0, 0, 0]),
        # Three turns, seen from the other side.
        ([long("a", "b", "c"), long("b", "c")], [0, 0]),
    ],
)
def test_conversations_that_hold_one_another_are_one_group(conversations, groups):
    for order in (1, -1):
        with Spool() as spool:
            for turns in conversations[::order]:
                spool.add("train", conversation(turns, first=(len(turns) + 1) % 2))
            found = spool.group_of.tolist()
            assert [found.index(group) for group in found] == found
            assert sorted(map(found.count, set(found))) == sorted(map(groups.count, set(groups)))


def test_parts_with_one_conversation_id_are_one_group():
    def part(turn, conversation_id):
        dialogue = Dialogue([], [Utterance([turn], ["yes"])])
        return [Row(dialogue, conversation_id)]

    with Spool() as spool:
        for source in (0, 1):
            for turn, conversation_id in (("a", 1), ("b", "x"), ("c", 1), ("d", None), ("e", None)):
                spool.add("train", part(f"{turn} {source}", conversation_id), source)
        assert spool.group_of.tolist() == [0, 1, 0, 3, 4, 5, 6, 5, 8, 9]
