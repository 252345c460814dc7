"""`collate` against its reference, and the reference against the predecessor's rules."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast import ops
from convai_fast.ops import reference
from tests.helpers.collate_arguments import (
    SPECIAL,
    assert_equal,
    make_arguments,
    make_shared,
    needed_length,
    needs_kernel,
    on,
    sequences_of,
    stores,
)
from tests.helpers.emulator import on_gpus


def test_a_worked_example_has_the_predecessors_layout():
    utterances = [[10], [11, 12], [20], [21], [30, 31], [40]]
    rows = [([0, 1], 0, 2, [2, 3], [5, 4])]
    input_ids, segments, labels, mc_token_ids = ops.collate(**make_arguments(utterances, rows, 12))
    bos, eos, s1, s2, pad = SPECIAL
    assert input_ids[0, 1].tolist() == [bos, 10, 11, 12, s1, 20, s2, 21, s1, 30, 31, eos]
    assert segments[0, 1].tolist() == [s1] * 6 + [s2] * 2 + [s1] * 4
    assert labels[0, 1].tolist() == [-100] * 9 + [30, 31, eos]
    assert input_ids[0, 0].tolist() == [bos, 10, 11, 12, s1, 20, s2, 21, s1, 40, eos, pad]
    assert segments[0, 0].tolist() == [s1] * 6 + [s2] * 2 + [s1] * 3 + [pad]
    assert labels[0, 0].tolist() == [-100] * 12
    assert mc_token_ids.tolist() == [[10, 11]]


def test_the_first_turn_can_lose_its_beginning():
    texts, rows = [[10], [20, 21, 22], [30], [40]], [([0], 0, 1, [1, 2], [3], 2)]
    arguments = make_arguments(texts, rows, 10)
    input_ids, segments, *_ = ops.collate(**arguments)
    bos, eos, s1, s2, _ = SPECIAL
    assert input_ids[0, 0].tolist() == [bos, 10, s1, 22, s2, 30, s1, 40, eos, 0]
    assert segments[0, 0].tolist() == [s1] * 4 + [s2] * 2 + [s1] * 3 + [0]
    ids, *_, positions, _, _, _ = ops.collate_shared(**make_shared(texts, rows, 10))
    assert ids.tolist() == input_ids[0, 0, :-1].tolist()
    assert positions.tolist() == list(range(9))


@pytest.mark.parametrize(("room", "labels"), [(3, [30, 31, 2]), (2, [30, -100]), (1, [-100])])
def test_a_reply_that_was_cut_has_no_eos_to_learn(room, labels):
    # The distractor is as long: what it loses changes nothing.
    utterances, rows = [[40, 41], [30, 31]], [([], 0, 0, [], [0, 1])]
    arguments = make_arguments(utterances, rows, 2 + room)
    input_ids, _, padded_labels, mc_token_ids = ops.collate(**arguments)
    assert padded_labels[0].tolist() == [[-100] * (2 + room), [-100, -100, *labels]]
    assert input_ids[0, :, -1].tolist() == [SPECIAL[1]] * 2  # which the other head reads
    assert mc_token_ids.tolist() == [[1 + room, 1 + room]]
    *_, shared_labels, _ = ops.collate_shared(**make_shared(utterances, rows, 2 + room))
    assert shared_labels.tolist() == [-100] * (2 + room) + [-100, *labels]


def test_a_distractor_that_was_cut_leaves_the_true_replys_eos():
    arguments = make_arguments([[40] * 9, [30]], [([], 0, 0, [], [0, 1])], 6)
    assert ops.collate(**arguments)[2][0, 1].tolist() == [-100, -100, 30, 2, -100, -100]


@settings(max_examples=50, deadline=None)
@given(stores())
def test_each_candidate_is_the_sequence_of_its_layout(store):
    texts, rows, layout = store
    seq_len = needed_length(*store)
    arguments = make_arguments(texts, rows, seq_len, layout=layout)
    outputs = [output.tolist() for output in ops.collate(**arguments)]
    fill = (layout.pad, layout.pad, -100)
    for row, (_, candidates) in enumerate(sequences_of(*store)):
        for j, columns in enumerate(candidates):
            if j < len(candidates) - 1:  # the true reply is the last one
                columns = (*columns[:2], [-100] * len(columns[2]))
            for output, column, value in zip(outputs, columns, fill, strict=False):
                assert output[row][j] == column + [value] * (seq_len - len(column))
            assert outputs[3][row][j] == len(columns[0]) - 1


@needs_kernel
@settings(max_examples=300, deadline=None)
@given(stores(), st.sampled_from([torch.uint16, torch.int32]), st.integers(0, 3))
def test_the_kernel_equals_the_reference(store, dtype, slack):
    texts, rows, layout = store
    seq_len = needed_length(*store) + slack
    arguments = make_arguments(texts, rows, seq_len, dtype, layout)
    assert_equal(ops.collate(**arguments), reference.collate(**arguments))


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(stores(), st.integers(1, 8))
def test_replies_that_do_not_fit_are_cut_alike(store, missing):
    texts, rows, layout = store
    seq_len = max(0, needed_length(*store) - missing)
    arguments = make_arguments(texts, rows, seq_len, layout=layout)
    try:
        expected = reference.collate(**arguments)
    except ValueError as error:
        with pytest.raises(ValueError, match=r"row \d does not fit"):
            ops.collate(**arguments)
        assert "does not fit" in str(error)
    else:
        assert_equal(ops.collate(**arguments), expected)


@pytest.mark.parametrize("vocab_size", [17, 1019, 40_483, 50_262, 65_536])
def test_the_largest_token_id_survives(vocab_size):
    arguments = make_arguments([[vocab_size - 1], [5]], [([0], 0, 1, [1], [0])], 8)
    input_ids, *_ = ops.collate(**arguments)
    assert input_ids[0, 0].tolist() == [1, vocab_size - 1, 4, 5, 3, vocab_size - 1, 2, 0]


def test_int32_ids_beyond_16_bits_survive():
    arguments = make_arguments([[70_000]], [([], 0, 0, [], [0])], 4, torch.int32)
    assert ops.collate(**arguments)[0].tolist() == [[[1, 3, 70_000, 2]]]


def test_an_empty_batch_gives_empty_tensors():
    outputs = ops.collate(**make_arguments([[5]], [], 7))
    assert [tuple(output.shape) for output in outputs] == [(0, 0, 7)] * 3 + [(0, 0)]


def test_an_example_with_fewer_candidates_is_padded_and_marked():
    arguments = make_arguments([[5], [6]], [([], 0, 0, [], [0]), ([], 0, 0, [], [0, 1])], 4)
    input_ids, segments, labels, mc_token_ids = ops.collate(**arguments)
    assert mc_token_ids.tolist() == [[3, -1], [3, 3]]
    assert input_ids[0, 1].tolist() == segments[0, 1].tolist() == [0] * 4
    assert labels[0].tolist() == [[-100, -100, 5, 2], [-100] * 4]


def changed(layout, name, number):
    return layout.index_fill(0, torch.tensor([ops.LAYOUT_NUMBERS.index(name)]), number)


@needs_kernel
@pytest.mark.parametrize(
    ("name", "change", "error", "says"),
    [
        ("tokens", lambda t: t.to(torch.int64), TypeError, "uint16 or int32"),
        ("plan", lambda t: t[:, :5].contiguous(), ValueError, "9 columns"),
        ("plan", lambda t: t.int(), TypeError, "plan must be Long"),
        ("num_candidates", lambda n: n - 1, ValueError, "row 0 has 1 candidates"),
        ("layout", lambda t: t[:4], ValueError, "24 numbers"),
        (
            "layout",
            lambda t: changed(t, "persona_open", 99),
            IndexError,
            "points outside the store",
        ),
        ("layout", lambda t: changed(t, "persona_turn", 1), ValueError, "no turn for a persona"),
    ],
)
def test_arguments_that_would_read_foreign_memory_are_refused(name, change, error, says):
    arguments = make_arguments([[5], [6]], [([0], 0, 1, [1], [0])], 8)
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=says):
        ops.collate(**arguments)


@needs_kernel
@pytest.mark.parametrize("column", range(9))
@pytest.mark.parametrize("value", [-1, 3, 2**62])
def test_a_plan_that_points_outside_the_store_is_refused(column, value):
    arguments = make_arguments([[5], [6]], [([0], 0, 1, [1], [0])], 8)
    arguments["plan"][0, column] = value
    with pytest.raises(IndexError, match="row 0 of the plan points outside"):
        ops.collate(**arguments)


@needs_kernel
@pytest.mark.parametrize("skip", [2, 3, 2**62, 2**63 - 1])
def test_a_skip_beyond_the_first_turn_is_refused(skip):
    # Longer turns come before and after it.
    rows = [([], 0, 0, [1, 1], [0], 2), ([], 0, 0, [0, 1], [0], 1)]
    arguments = make_arguments([[5], [6, 7, 8]], rows, 20)
    shared = make_shared([[5], [6, 7, 8]], rows, 20)
    arguments["plan"][1, ops.PLAN_COLUMNS.index("history_skip")] = skip
    shared["plan"] = arguments["plan"]
    with pytest.raises(IndexError, match="row 1 of the plan points outside the store"):
        ops.collate(**arguments)
    with pytest.raises(IndexError, match="row 1 of the plan points outside the store"):
        ops.collate_shared(**shared)


@needs_kernel
def test_a_skip_without_history_is_refused():
    arguments = make_arguments([[5]], [([], 0, 0, [], [0], 1)], 8)
    with pytest.raises(IndexError, match="row 0 of the plan points outside the store"):
        ops.collate(**arguments)


@pytest.mark.parametrize(
    ("struct", "names"), [("PlanRow", ops.PLAN_COLUMNS), ("Layout", ops.LAYOUT_NUMBERS)]
)
def test_the_numbers_of_plan_and_layout_are_those_of_the_compiled_structs(struct, names):
    header = Path(__file__).parents[2] / "csrc" / "ops" / "collate" / "layout.h"
    text = header.read_text(encoding="utf-8")
    fields = re.search(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)[1]
    assert tuple(re.findall(r"(\w+)[,;]", fields)) == names


def test_opcheck_passes():
    texts, rows = [[5, 6], [7]], [([0], 0, 1, [1], [0, 1], 1)]
    arguments = make_arguments(texts, rows, 9)
    torch.library.opcheck(torch.ops.convai_fast.collate.default, tuple(arguments.values()))
    arguments = make_shared(texts, rows, 9)
    torch.library.opcheck(torch.ops.convai_fast.collate_shared.default, tuple(arguments.values()))


def test_it_compiles_into_a_graph():
    arguments = make_arguments([[5, 6], [7]], [([0], 0, 1, [1], [0, 1])], 9)
    compiled = torch.compile(ops.collate, backend="eager", fullgraph=True)
    assert_equal(compiled(**arguments), ops.collate(**arguments))


@on_gpus("max_examples", cuda=[(300,)], emulator=[(60,)])
def test_cuda_equals_the_reference(gpu, max_examples):
    @settings(max_examples=max_examples, deadline=None)
    @given(stores(), st.sampled_from([torch.uint16, torch.int32]), st.integers(0, 3))
    def check(store, dtype, slack):
        texts, rows, layout = store
        seq_len = needed_length(*store) + slack
        arguments = make_arguments(texts, rows, seq_len, dtype, layout)
        expected = reference.collate(**arguments)
        assert_equal([x.cpu() for x in ops.collate(**on(gpu, arguments))], expected)
        shared = make_shared(texts, rows, seq_len, dtype, layout)
        expected = reference.collate_shared(**shared)
        assert_equal([x.cpu() for x in ops.collate_shared(**on(gpu, shared))], expected)

    check()
