"""What is missing is made from the dialogues and a seed alone: a split, and distractors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast.data.complete import Numbering, SplitArrays, split_conversations
from convai_fast.data.spool import Spool
from tests.helpers.conversations import conversation, long


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
