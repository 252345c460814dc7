"""Which sequences run, in which slots, and what they begin with."""

import random

import numpy as np
import pytest

from convai_fast.generation.scheduler import Scheduler, TokenSequence

VOCAB_SIZE = 100


@pytest.fixture
def scheduler():
    scheduler = Scheduler(num_slots=3, vocab_size=VOCAB_SIZE)
    scheduler.reserve(100)
    return scheduler


def ask(scheduler, id, input_ids, segment=1):
    segments = [segment] * len(input_ids)
    keys = scheduler.keys_of(input_ids, segments)
    sequence = TokenSequence(id, input_ids, segments, keys)
    scheduler.add([sequence])
    return sequence


def ask_and_run(scheduler, id, input_ids):
    sequence = ask(scheduler, id, input_ids)
    scheduler.schedule()
    return sequence


def draw(sequence, token):
    sequence.input_ids.append(token)
    sequence.token_type_ids.append(1)


def plan(step):
    """{id: (tokens that are there before, new tokens)}"""
    parts = np.split(step.input_ids, step.counts.cumsum()[:-1])
    rows = zip(step.sequences, step.past.tolist(), parts, strict=True)
    return {sequence.id: (past, new.tolist()) for sequence, past, new in rows}


def test_a_prompt_is_computed_once_and_then_each_token(scheduler):
    sequence = ask(scheduler, "a", [5, 6, 7])
    assert plan(scheduler.schedule()) == {"a": (0, [5, 6, 7])}
    draw(sequence, 8)
    step = scheduler.schedule()
    assert plan(step) == {"a": (3, [8])}
    assert (step.position_ids.tolist(), step.last.tolist()) == ([3], [0])
    scheduler.remove(sequence)
    assert scheduler.schedule() is None
    scheduler.check_integrity()


def test_what_prompts_share_is_copied_from_the_slot_that_holds_it(scheduler):
    first = ask_and_run(scheduler, "a", [*range(40)])
    second = ask(scheduler, "b", [*range(30), 77, 78])
    draw(first, 99)
    step = scheduler.schedule()
    assert plan(step) == {"a": (40, [99]), "b": (30, [77, 78])}
    assert step.copies == [(first.slot, second.slot, 30)]
    scheduler.check_integrity()


def test_a_prompt_that_goes_on_from_a_free_slot_takes_it_over(scheduler):
    scheduler.remove(ask_and_run(scheduler, "a", [*range(20)]))
    ask(scheduler, "b", [*range(25)])
    step = scheduler.schedule()
    assert (plan(step), step.copies) == ({"b": (20, [20, 21, 22, 23, 24])}, [])


def test_the_last_token_of_a_prompt_is_always_computed(scheduler):
    scheduler.remove(ask_and_run(scheduler, "a", [*range(20)]))
    ask(scheduler, "b", [*range(20)])
    assert plan(scheduler.schedule()) == {"b": (19, [19])}


def test_equal_tokens_of_another_segment_are_not_shared(scheduler):
    scheduler.remove(ask_and_run(scheduler, "a", [*range(20)]))
    ask(scheduler, "b", [*range(20)], segment=2)
    assert plan(scheduler.schedule())["b"][0] == 0


def test_who_begins_like_one_that_is_about_to_be_computed_waits_a_step(scheduler):
    first = ask(scheduler, "a", [*range(40)])
    ask(scheduler, "b", [*range(40), 50])
    third = ask(scheduler, "c", [*range(15), 60])  # which is not worth waiting for
    assert set(plan(scheduler.schedule())) == {"a", "c"}
    draw(first, 1)
    draw(third, 1)
    assert plan(scheduler.schedule())["b"] == (40, [50])


def test_what_was_interrupted_is_computed_anew(scheduler):
    sequence = ask_and_run(scheduler, "a", [5, 6, 7])
    draw(sequence, 8)
    scheduler.schedule()
    scheduler.forget()
    assert plan(scheduler.schedule()) == {"a": (0, [5, 6, 7, 8])}
    scheduler.check_integrity()


def test_a_sequence_that_got_no_token_computes_its_last_one_again(scheduler):
    ask_and_run(scheduler, "a", [5, 6, 7])
    assert plan(scheduler.schedule()) == {"a": (2, [7])}
    assert plan(scheduler.schedule()) == {"a": (2, [7])}
    scheduler.check_integrity()


def test_more_sequences_than_slots_wait_and_come_in_turn(scheduler):
    for id in range(5):
        ask(scheduler, id, [id])
    step = scheduler.schedule()
    assert (set(plan(step)), scheduler.num_waiting) == ({0, 1, 2}, 2)
    scheduler.remove(step.sequences[1])
    assert {sequence.id for sequence in scheduler.schedule().sequences} == {0, 2, 3}


def test_those_that_came_later_cannot_push_back_those_that_wait(scheduler):
    for id in range(4):
        ask(scheduler, id, [50 + id])
    step = scheduler.schedule()
    ask(scheduler, "late", [1])  # which sorts before all others
    scheduler.remove(step.sequences[0])
    assert 3 in [sequence.id for sequence in scheduler.schedule().sequences]


def test_cancelled_sequences_are_gone_wherever_they_are(scheduler):
    for _ in range(5):
        ask(scheduler, "a", [1])
    other = ask(scheduler, "b", [2])
    scheduler.schedule()
    scheduler.cancel("a")
    assert scheduler.num_waiting == 1
    assert scheduler.schedule().sequences == [other]
    scheduler.check_integrity()


@pytest.mark.parametrize("keep_prefixes", [True, False])
def test_what_is_cancelled_can_be_copied_unless_it_shall_not_be(scheduler, keep_prefixes):
    ask_and_run(scheduler, "a", [*range(20)])
    scheduler.cancel("a", keep_prefixes=keep_prefixes)
    scheduler.check_integrity()
    ask(scheduler, "b", [*range(20)])
    past = 19 if keep_prefixes else 0
    assert plan(scheduler.schedule()) == {"b": (past, [*range(past, 20)])}


def test_a_truncated_sequence_computes_what_comes_in_place_of_the_rest(scheduler):
    sequence = ask_and_run(scheduler, "a", [5, 6, 7, 8])
    scheduler.truncate(sequence, 2)
    draw(sequence, 9)
    assert plan(scheduler.schedule()) == {"a": (2, [9])}
    scheduler.check_integrity()


def test_whatever_comes_and_goes_every_token_is_computed_from_those_before_it():
    """A long random life, with a cache that is played by lists of tokens."""
    rng = random.Random(0)
    scheduler = Scheduler(num_slots=4, vocab_size=VOCAB_SIZE)
    scheduler.reserve(80)
    held = [[] for _ in range(4)]
    num_copies = 0
    for number in range(600):
        for _ in range(rng.choice([0, 0, 1, 3])):
            shared = [*range(rng.choice([0, 5, 20, 40]))]
            ask(scheduler, number, shared + rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 9)))
        step = scheduler.schedule()
        if step is None:
            continue
        if rng.random() < 0.1:
            scheduler.forget()
            for slot in step.slots:
                held[slot] = []
            continue
        num_copies += len(step.copies)
        for source, slot, length in step.copies:
            held[slot] = held[source][:length]
            assert len(held[slot]) == length
        parts = np.split(step.input_ids, step.counts.cumsum()[:-1])
        for sequence, past, new in zip(step.sequences, step.past, parts, strict=True):
            held[sequence.slot] = [*held[sequence.slot][:past], *new.tolist()]
            assert held[sequence.slot] == sequence.input_ids
        for sequence in step.sequences:
            if sequence.slot < 0:
                continue  # cancelled with another one of its request
            if rng.random() < 0.2 or len(sequence.input_ids) > 70:
                scheduler.remove(sequence)
            elif rng.random() < 0.05:
                scheduler.cancel(sequence.id)
            elif rng.random() < 0.05 and len(sequence.input_ids) > 3:
                scheduler.truncate(sequence, len(sequence.input_ids) - 2)
                draw(sequence, rng.randrange(VOCAB_SIZE))
            elif rng.random() < 0.9:
                draw(sequence, rng.randrange(VOCAB_SIZE))
        scheduler.check_integrity()
    assert num_copies > 20
