"""`branch_attention` over padded rows, which computes it where nothing is compiled."""

import pytest
import torch
from hypothesis import given, settings

from convai_fast import ops
from convai_fast.ops import reference
from convai_fast.ops.branch_attention_by_torch import _padded, _padded_backward
from tests.helpers.branches import (
    HEADS,
    SEED,
    TYPICAL,
    close,
    heads,
    layout,
    make_grad,
    make_qkv,
    some_rows,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_the_references(rows, counts, dtype=torch.float32):
    offsets, branch_ids = layout(rows)
    parts = heads(make_qkv(branch_ids, dtype=dtype, counts=counts), counts)
    grad = make_grad(branch_ids, dtype=dtype, counts=counts)
    arguments = (offsets, branch_ids, 0.0, None)
    out, unused = _padded(*parts, *arguments)
    expected, logsumexp = reference.branch_attention(*parts, *arguments)
    close(out, expected)
    assert (unused.shape, unused.dtype) == (logsumexp.shape, logsumexp.dtype)
    grads = _padded_backward(grad, *parts, out, unused, *arguments)
    others = reference.branch_attention_backward(grad, *parts, expected, logsumexp, *arguments)
    for one, other in zip(grads, others, strict=True):
        assert one.dtype == dtype
        close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [HEADS, (4, 1), (6, 3)])
def test_padded_rows_give_what_the_reference_does(counts, dtype):
    assert_the_references(TYPICAL, counts, dtype)


@settings(max_examples=40, deadline=None)
@given(some_rows(9))
def test_rows_of_any_kind_do(rows):
    assert_the_references(rows, (4, 2))


def test_float64_stays_float64():
    offsets, branch_ids = layout(TYPICAL)
    q, k, v = heads(make_qkv(branch_ids).double())
    out, _ = _padded(q, k, v, offsets, branch_ids, 0.0, None)
    coarse, _ = _padded(q.float(), k.float(), v.float(), offsets, branch_ids, 0.0, None)
    assert out.dtype == torch.float64
    assert 0 < (out - coarse).abs().max() < 1e-5


def test_a_seed_drops_alike_forward_and_backward():
    offsets, branch_ids = layout([(30, 7, 5), (0, 20)])
    q, k, v = heads(make_qkv(branch_ids))
    arguments = (offsets, branch_ids, 0.4, SEED)
    out, sums = _padded(q, k, v, *arguments)
    assert torch.equal(out, _padded(q, k, v, *arguments)[0])
    assert not torch.allclose(out, _padded(q, k, v, offsets, branch_ids, 0.4, SEED + 1)[0])
    # The output is linear in the values: its derivative along them is its value there.
    grad = make_grad(branch_ids)
    _, _, grad_v = _padded_backward(grad, q, k, v, out, sums, *arguments)
    torch.testing.assert_close((grad_v * v).sum(), (grad * out).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 4], [0, 5, 4], [0, -1, 4], []])
def test_rows_that_do_not_cover_the_tokens_are_refused(offsets):
    q, k, v = heads(make_qkv(torch.zeros(4)))
    offsets, branch_ids = torch.tensor(offsets, dtype=torch.int64), torch.zeros(4).long()
    with pytest.raises(ValueError, match="from 0 to the number of tokens, 4, without decreasing"):
        _padded(q, k, v, offsets, branch_ids, 0.0, None)
    with pytest.raises(ValueError, match="from 0 to the number of tokens, 4, without decreasing"):
        ops.index_keys(offsets, branch_ids)


@pytest.mark.parametrize(
    ("shapes", "error"),
    [
        ([(4, 3, 8), (4, 2, 8), (4, 2, 8)], ValueError),
        ([(4, 3, 8), (4, 0, 8), (4, 0, 8)], ValueError),
        ([(4, 2, 8), (4, 2, 8), (4, 1, 8)], ValueError),
        ([(4, 2, 8), (3, 2, 8), (3, 2, 8)], ValueError),
        ([(4, 16), (4, 16), (4, 16)], ValueError),
    ],
)
def test_heads_that_do_not_fit_are_refused(shapes, error):
    parts, branch_ids = [torch.zeros(shape) for shape in shapes], torch.zeros(4).long()
    with pytest.raises(error, match=r"q must be \[tokens, num_heads, head_dim\]"):
        _padded(*parts, torch.tensor([0, 4]), branch_ids, 0.0, None)


def test_it_can_be_differentiated_once():
    offsets, branch_ids = layout([(5, 2), (1,)])
    leaf = make_qkv(branch_ids).requires_grad_()
    out = ops.branch_attention(*heads(leaf), offsets, branch_ids)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="it can be differentiated once"):
        gradient.sum().backward()
