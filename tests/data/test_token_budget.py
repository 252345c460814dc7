"""Batches under a budget of tokens: what is in them, on however many ranks, and how they go on."""

from itertools import islice

import numpy as np
import pytest

from convai_fast.data.batches import count_examples, count_labels
from convai_fast.errors import UserError
from tests.helpers.batches import make_batches

BUDGET = 1000


def batches_of(store, layout="shared", **settings):
    settings = {"shuffle": True, "layout": layout, "batch_tokens": BUDGET, **settings}
    return make_batches(store, **{"num_candidates": 2, **settings})


def rows_of(batches, i):
    return batches.rows_of(i).tolist()


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_each_epoch_has_all_examples_in_batches_within_the_budget(store, layout):
    batches = batches_of(store, layout)
    epochs = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert all(batch["input_ids"].numel() <= BUDGET for batch in batches)
        epochs.append([rows_of(batches, i) for i in range(len(batches))])
    for rows in epochs:
        assert sorted(row for each in rows for row in each) == list(range(batches.num_examples))
        assert len(rows) == len(epochs[0]) == batches.num_steps(0)
    as_sets = [{frozenset(rows) for rows in each} for each in epochs]
    assert as_sets[0] != as_sets[1] != as_sets[2]  # others stand together
    sizes = [batch["input_ids"].numel() for batch in batches]
    assert np.mean(sizes) > 0.8 * BUDGET


def test_examples_of_a_batch_are_of_similar_length(store):
    batches, lengths = batches_of(store), batches_of(store).index.shared_lengths
    spread = [np.ptp(lengths[rows_of(batches, i)]) for i in range(len(batches))]
    assert np.mean(spread) < np.ptp(lengths) / 8


def test_an_example_over_the_budget_is_a_batch_of_its_own(store):
    batches = batches_of(store, batch_tokens=1)
    assert {len(rows_of(batches, i)) for i in range(len(batches))} == {1}
    assert len(batches) == batches.num_examples


def test_a_budget_below_nothing_is_refused(store):
    with pytest.raises(UserError, match="batch_tokens is -1, but must be at least 0"):
        batches_of(store, batch_tokens=-1)


@pytest.mark.parametrize(("world_size", "batches_per_step"), [(2, 3), (3, 2), (6, 1)])
def test_a_step_is_the_same_batches_on_however_many_ranks(store, world_size, batches_per_step):
    one = batches_of(store, batches_per_step=6)
    ranks = [
        batches_of(store, batches_per_step=batches_per_step, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        for batches in (one, *ranks):
            batches.set_epoch(epoch)
        assert len({len(batches) for batches in ranks}) == 1
        assert ranks[0].step_examples == one.step_examples
        for own, whole in zip(ranks[0].steps, one.steps, strict=True):
            parts = [rows_of(batches, i) for i in own for batches in ranks]
            assert [rows for rows in parts if rows] == [rows_of(one, i) for i in whole]
        for batches in ranks:
            assert batches.num_steps(epoch) == len(batches.steps) == one.num_steps(epoch)


def test_a_run_goes_on_with_other_ranks_and_sees_each_example_once(store):
    seen, start = [], 0
    for world_size, batches_per_step in [(2, 1), (1, 3), (3, 2)]:
        ranks = [
            batches_of(store, batches_per_step=batches_per_step, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for batches in ranks:
            batches.set_epoch(1, start)
        assert len(ranks[0].steps) == ranks[0].num_steps(1, start)
        number = len(ranks[0].steps) if world_size == 3 else 2
        steps = zip(ranks[0].steps, ranks[0].step_examples, strict=True)
        for step, num_examples in islice(steps, number):
            rows = [row for i in step for batches in ranks for row in rows_of(batches, i)]
            assert len(rows) == num_examples
            seen += rows
            start += num_examples
    assert sorted(seen) == list(range(ranks[0].num_examples))
    assert ranks[0].num_steps(1, start) == 0


def test_shares_are_what_a_batch_adds_to_the_whole_step(store):
    ranks = [batches_of(store, batches_per_step=2, rank=rank, world_size=3) for rank in range(3)]
    for step in ranks[0].steps:
        parts = [(batches, i) for batches in ranks for i in step]
        tokens = [count_labels(batches[i]) for batches, i in parts]
        examples = [count_examples(batches[i]) for batches, i in parts]
        for (batches, i), n, m in zip(parts, tokens, examples, strict=True):
            expected = (3 * n / sum(tokens), 3 * m / sum(examples))
            assert batches.shares[i] == pytest.approx(expected)
