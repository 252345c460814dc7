"""What is missing is made from the dialogues and a seed alone: a split, and distractors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast.data.complete import Numbering, SplitArrays, split_conversations
from convai_fast.data.groups import first_equal
from convai_fast.data.readers.predecessor import Row
from convai_fast.data.spool import Spool
from convai_fast.dialogue.dialogue import Dialogue, History, Utterance


def conversation(turns, persona=(), first=1):
    """What the second speaker answers, or with `first` 0 what the first does after the opening."""
    places = range(first, len(turns), 2)
    utterances = [Utterance(History(turns, i), [turns[i]]) for i in places if i > 0]
    return [Dialogue(list(persona), utterances)]


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


def long(*turns):
    return [f"{turn}, which is said at more length than any greeting" for turn in turns]


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


@pytest.mark.parametrize("seed", range(5))
def test_both_sides_of_doubled_conversations_stay_in_one_split(seed):
    with Spool() as spool:
        for side in (1, 0):
            for i in range(20):
                turns = [f"hello {i}", f"i sell {i}", f"how many {i}", f"just {i}", f"bye {i}"]
                spool.add("train", conversation(turns[: 4 + side], first=side))
        chosen, ((origin,),), _ = split_conversations(spool, 0.1, seed)
        assert origin == (*spool.fingerprints, True, 0.1, seed)
        assert len(chosen["valid"]) == 4
        assert {i % 20 for i in chosen["train"]}.isdisjoint(i % 20 for i in chosen["valid"])


def test_what_is_cut_off_does_not_depend_on_other_sources():
    def valid(sources):
        with Spool() as spool:
            for number, source in enumerate(sources):
                for split, i in source:
                    spool.add(split, conversation([f"say {i}", f"reply {i}"]), number)
            chosen, origins, _ = split_conversations(spool, 0.2, 7)
            texts = spool.text_of()
            last = [spool["candidate_ids"][i] for i in chosen["valid"]]
            return [texts(number) for number in last], [origin.is_cut for (origin,) in origins]

    cut, own = [("train", i) for i in range(10)], [("train", 90), ("test", 91), ("val", 92)]
    replies, is_cut = valid([cut])
    assert (len(replies), is_cut) == (2, [True])
    assert valid([own, cut]) == (["reply 92", *replies], [False, True])


def test_what_one_source_holds_out_another_does_not_give_to_learn_from():
    def turns(i):
        return [f"hello {i}", f"i sell {i}", f"how many {i}", f"just {i}", f"bye {i}"]

    def valid(sources):
        with Spool() as spool:
            number = 0
            for source, members in enumerate(sources):
                for i in members:
                    # The other source has the other side.
                    spool.add("train", conversation(turns(i)[: 4 + source], first=source), source)
                    number += 1
            chosen, _, notes = split_conversations(spool, 0.2, 7)
        names = [i for members in sources for i in members]
        return {s: {names[n] for n in numbers} for s, numbers in chosen.items()}, notes

    alone = [valid([range(40)])[0]["valid"], valid([[], range(20, 60)])[0]["valid"]]
    together, notes = valid([range(40), range(20, 60)])
    assert together["valid"] == alone[0] | alone[1]
    assert not together["valid"] & together["train"]
    moved = len(alone[0] & set(range(20, 40)) ^ alone[1] & set(range(20, 40)))
    assert notes == [
        f"{moved} conversations are in the validation split and not learnt, since another data "
        "set holds them out"
    ]


def test_conversations_that_are_all_one_leave_none_for_validation_and_say_so():
    with Spool() as spool:
        for count in range(2, 8, 2):
            spool.add("train", conversation(long(*"abcdefgh")[:count]))
        chosen, _, notes = split_conversations(spool, 0.2, 7)
    assert (len(chosen["train"]), len(chosen["valid"])) == (3, 0)
    assert "the 3 conversations repeat one another" in notes[0]


def test_no_distractor_is_from_the_other_side_of_a_conversation():
    names = [[f"{name}{i}" for i in range(6)] for name in "abcd"]
    rows, _ = distractors([*names, *[turns[:5] for turns in names]], 4)
    for row in rows:
        assert all(other[0] != row[-1][0] for other in row[:-1])


def distractors(conversations, num_candidates, seed=0):
    with Spool() as spool:
        for turns in conversations:
            spool.add("train", conversation(turns))
        arrays = SplitArrays(spool, Numbering.of(spool), np.arange(len(conversations)))
        text = spool.text_of()
        rows = []
        for ids, counts in arrays.candidates(num_candidates, "train", seed):
            ends = counts.cumsum()
            rows += [[text(i) for i in ids[e - c : e]] for e, c in zip(ends, counts, strict=True)]
        owners = arrays.numbering.groups[arrays._owners].tolist()
    return rows, owners


WORDS = st.sampled_from(["yes", "no", "Yes ", "tea", "a dog", "cocoa", "why", "NO"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(WORDS, min_size=2, max_size=7), min_size=1, max_size=8), st.integers(1, 6))
def test_distractors_are_all_other_replies_that_there_are(conversations, num_candidates):
    rows, owners = distractors(conversations, num_candidates)
    normal = [[" ".join(text.lower().split()) for text in row] for row in rows]
    truths = [row[-1] for row in normal]
    for row, owner in zip(normal, owners, strict=True):
        foreign = {t for t, other in zip(truths, owners, strict=True) if other != owner}
        assert len(row) == min(num_candidates, 1 + len(foreign - {row[-1]}))
        assert len(set(row)) == len(row)
        assert set(row[:-1]) <= foreign


def test_replies_are_drawn_as_often_as_they_occur_and_alike_for_one_seed():
    conversations = [[f"ask {i}", "i see" if i % 2 else f"reply {i}"] for i in range(400)]
    rows, _ = distractors(conversations, 4, seed=1)
    assert rows == distractors(conversations, 4, seed=1)[0] != distractors(conversations, 4, 2)[0]
    share = sum("i see" in row[:-1] for row in rows if row[-1] != "i see") / 200
    assert 0.7 < share < 1  # three draws, every other reply: 7 of 8


def test_a_conversation_that_owns_nearly_all_replies_finds_the_few_others():
    big = [f"turn {i}" for i in range(4000)]
    rows, owners = distractors([big, ["a", "b"], ["c", "d"]], 20)
    assert all(
        sorted(row[:-1]) == ["b", "d"] for row, o in zip(rows, owners, strict=True) if o == 0
    )
    assert all(len(row) == 20 for row, o in zip(rows, owners, strict=True) if o > 0)
