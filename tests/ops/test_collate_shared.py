"""`collate_shared`, whose candidates share their prefix, against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast import ops
from convai_fast.ops import reference
from tests.helpers.collate_arguments import (
    SPECIAL,
    assert_equal,
    make_shared,
    needed_length,
    needs_kernel,
    on,
    stores,
)
from tests.helpers.emulator import on_gpus


def test_a_worked_example_shares_its_prefix():
    utterances = [[10], [11, 12], [20], [21], [30, 31], [40]]
    rows = [([0, 1], 0, 2, [2, 3], [5, 4]), ([], 0, 0, [], [0])]
    arguments = make_shared(utterances, rows, 12)
    ids, segments, positions, branches, labels, mc_token_ids = ops.collate_shared(**arguments)
    bos, eos, s1, s2, _ = SPECIAL
    prefix = [bos, 10, 11, 12, s1, 20, s2, 21]
    assert ids.tolist() == [*prefix, s1, 40, eos, s1, 30, 31, eos, bos, s1, 10, eos]
    assert segments.tolist() == [s1] * 6 + [s2] * 2 + [s1] * 11
    assert positions.tolist() == [*range(8), 8, 9, 10, 8, 9, 10, 11, 0, 1, 2, 3]
    assert branches.tolist() == [0] * 8 + [1] * 3 + [2] * 4 + [0, 1, 1, 1]
    assert labels.tolist() == [-100] * 12 + [30, 31, eos] + [-100, -100, 10, eos]
    assert mc_token_ids.tolist() == [[10, 14], [18, -1]]


@needs_kernel
@settings(max_examples=300, deadline=None)
@given(stores(), st.sampled_from([torch.uint16, torch.int32]), st.integers(-8, 3))
def test_the_shared_kernel_equals_the_reference(store, dtype, slack):
    texts, rows, layout = store
    max_length = max(0, needed_length(*store) + slack)
    arguments = make_shared(texts, rows, max_length, dtype, layout)
    try:
        expected = reference.collate_shared(**arguments)
    except ValueError as error:
        with pytest.raises(ValueError, match=r"does not fit|must rise"):
            ops.collate_shared(**arguments)
        assert "does not fit" in str(error)
    else:
        assert_equal(ops.collate_shared(**arguments), expected)


@needs_kernel
@pytest.mark.parametrize(
    ("offsets", "num_tokens", "says"),
    [
        ([0, 7], 7, "row 0 does not fit"),
        ([0, 5], 5, "row 0 does not fit"),
        ([0, 6], 9, "must rise from 0 to num_tokens"),
        ([1, 6], 6, "must rise from 0 to num_tokens"),
        ([0, 6, 6], 6, "one more than the rows"),
    ],
)
def test_offsets_that_do_not_fit_the_examples_are_refused(offsets, num_tokens, says):
    arguments = make_shared([[5], [6]], [([0], 0, 1, [], [1])], 20)
    assert arguments["num_tokens"] == 5
    arguments |= {"offsets": torch.tensor(offsets), "num_tokens": num_tokens}
    if offsets == [0, 5]:
        arguments["max_length"] = 3  # the reply is cut, and the row is shorter
    with pytest.raises(ValueError, match=says):
        ops.collate_shared(**arguments)


def test_a_row_without_candidates_may_leave_them_no_room():
    arguments = make_shared([[5, 6]], [([0], 0, 1, [], [])], 3)
    assert ops.collate_shared(**arguments)[0].tolist() == [1, 5, 6]


@on_gpus()
def test_on_cuda_a_row_without_candidates_may_leave_them_no_room(gpu):
    arguments = make_shared([[5, 6]], [([0], 0, 1, [], [])], 3)
    assert ops.collate_shared(**on(gpu, arguments))[0].tolist() == [1, 5, 6]
