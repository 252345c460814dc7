"""An epoch: its order, its steps on however many ranks, and where it goes on."""

import numpy as np
import pytest
import torch

from tests.helpers.batches import make_batches


def rows_of(batches):
    return [rows.tolist() for rows in batches._batches]


def test_an_epoch_sees_every_example_once(store):
    batches = make_batches(store, shuffle=True)
    for epoch in range(3):
        batches.set_epoch(epoch)
        seen = [row for rows in rows_of(batches) for row in rows]
        assert sorted(seen) == list(range(batches.num_examples))


def test_the_order_depends_on_seed_and_epoch_alone(store):
    orders = {}
    for seed in (1, 2):
        batches = make_batches(store, shuffle=True, seed=seed)
        for epoch in (0, 1, 0):
            batches.set_epoch(epoch)
            order = rows_of(batches)
            assert orders.setdefault((seed, epoch), order) == order
    distinct = {str(order) for order in orders.values()}
    assert len(distinct) == 4


def test_a_batch_of_an_epoch_is_the_collation_of_its_rows(store):
    batches = make_batches(store, shuffle=True)
    for i, rows in enumerate(batches._batches):
        for name, tensor in batches.collate(rows).items():
            assert torch.equal(batches[i][name], tensor), name


def test_it_resumes_at_a_saved_position(store):
    batches = make_batches(store, shuffle=True)
    batches.set_epoch(3)
    whole = [batch["input_ids"] for batch in batches]
    batches.set_epoch(3, start=5 * 4)
    rest = [batch["input_ids"] for batch in batches]
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))


def steps_of(ranks):
    """The rows of each step, over all ranks."""
    return [
        sorted(row for b in ranks for i in step for row in b.rows_of(i).tolist())
        for step in ranks[0].steps
    ]


@pytest.mark.parametrize(
    ("world_size", "batch_size", "batches_per_step"), [(1, 1, 12), (1, 6, 2), (3, 4, 1), (2, 1, 6)]
)
def test_a_step_has_the_same_examples_however_they_are_cut(
    store, world_size, batch_size, batches_per_step
):
    one = make_batches(store, shuffle=True, batch_size=12)
    ranks = [
        make_batches(
            store,
            shuffle=True,
            batch_size=batch_size,
            batches_per_step=batches_per_step,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for epoch in range(2):
        for batches in (one, *ranks):
            batches.set_epoch(epoch)
        assert len({len(batches) for batches in ranks}) == 1
        assert steps_of(ranks) == steps_of([one])


def test_a_run_may_go_on_with_other_steps_and_sees_each_example_once(store):
    sizes, seen, start = [(4, 1), (1, 3), (6, 2)], [], 0
    for batch_size, batches_per_step in sizes:
        batches = make_batches(
            store, shuffle=True, batch_size=batch_size, batches_per_step=batches_per_step
        )
        batches.set_epoch(1, start)
        steps = steps_of([batches])
        taken = steps if (batch_size, batches_per_step) == sizes[-1] else steps[:2]
        seen += [row for step in taken for row in step]
        start = len(seen)
    assert sorted(seen) == list(range(batches.num_examples))


@pytest.mark.parametrize("batches_per_step", [1, 3])
def test_shares_are_what_a_batch_adds_to_the_whole_step(store, batches_per_step):
    # Replies cut by a short max_length count only what is left of them.
    ranks = [
        make_batches(
            store,
            "valid",
            rank=rank,
            world_size=3,
            batch_size=2,
            batches_per_step=batches_per_step,
            max_length=10,
        )
        for rank in range(3)
    ]
    assert any(ranks[0].cuts)
    for step in ranks[0].steps:
        parts = [(batches, i) for batches in ranks for i in step]
        tokens = [int((batches[i]["labels"] != -100).sum()) for batches, i in parts]
        examples = [int((batches[i]["mc_labels"] != -100).sum()) for batches, i in parts]
        for (batches, i), n, m in zip(parts, tokens, examples, strict=True):
            expected = (3 * n / sum(tokens), 3 * m / sum(examples))
            assert batches.shares[i] == pytest.approx(expected)


def test_a_rank_without_an_example_gets_one_without_labels(store):
    last = make_batches(store, "valid", max_examples=5, batch_size=2, rank=1, world_size=2)[1]
    assert last["input_ids"].shape[0] == 1
    assert last["labels"].eq(-100).all()
    assert last["mc_labels"].eq(-100).all()


def test_batches_hold_examples_of_similar_length(store):
    batches = make_batches(store, shuffle=True)
    spread = [np.ptp(batches.index.shared_lengths[rows]) for rows in batches._batches]
    assert np.mean(spread) < np.ptp(batches.index.shared_lengths) / 4
