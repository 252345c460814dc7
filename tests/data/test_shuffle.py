"""Orders that a run which is continued elsewhere, or after an update, relies on."""

import numpy as np

from convai_fast.data.shuffle import mixed, permutation, seed_of


def test_orders_are_the_same_on_any_machine_and_with_any_numpy():
    assert permutation(8, "examples", 42, 0).tolist() == [7, 2, 0, 4, 3, 6, 1, 5]
    assert permutation(8, "examples", 42, 1).tolist() == [7, 1, 5, 2, 6, 0, 3, 4]
    assert seed_of("x", 1) == 321442881046209828
    assert mixed(np.array([1], np.uint64), 0).tolist() == [16294208416658607535]


def test_a_permutation_has_every_number_once_and_is_not_near_the_identity():
    order = permutation(10_000, "any")
    assert sorted(order) == list(range(10_000))
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert permutation(0, "any").tolist() == []
