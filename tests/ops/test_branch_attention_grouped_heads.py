"""`branch_attention` with heads of keys and values that several heads of queries share.

And of queries, keys and values as they come: parts of one tensor, transposed, of other types.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast import ops
from tests.helpers.branches import (
    HEADS,
    SEED,
    TYPICAL,
    close,
    forward_and_gradient,
    heads,
    layout,
    make_grad,
    make_qkv,
    masked_attention,
    needs_kernels,
    reference_forward_and_gradient,
    some_rows,
)

COUNTS = [(4, 1), (4, 2), (4, 4), (6, 3)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gradients(parts, grad, *arguments):
    """The output for q, k and v as they lie in memory, and their gradients."""
    leaves = [part.detach().requires_grad_() for part in parts]
    out = ops.branch_attention(*leaves, *arguments)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@settings(max_examples=30, deadline=None)
@given(
    some_rows(40),
    st.sampled_from(COUNTS),
    st.sampled_from([4, 16, 20, 64]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.3]),
)
def test_the_kernels_compute_what_the_reference_does(rows, counts, head_dim, dtype, dropout_p):
    offsets, branch_ids = layout(rows)
    qkv = make_qkv(branch_ids, head_dim, dtype, counts)
    grad = make_grad(branch_ids, head_dim, dtype, counts)
    arguments = (offsets, branch_ids, dropout_p, SEED)
    results = forward_and_gradient(qkv, grad, *arguments, counts=counts)
    expected = reference_forward_and_gradient(qkv, grad, *arguments, counts=counts)
    assert all(result.dtype == dtype for result in results)
    for one, other in zip(results, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("counts", COUNTS)
def test_outputs_and_gradients_are_those_of_torchs_attention_with_grouped_heads(counts):
    offsets, branch_ids = layout(TYPICAL)
    qkv = make_qkv(branch_ids, counts=counts)
    grad = make_grad(branch_ids, counts=counts)
    leaf = qkv.double().requires_grad_()
    expected = masked_attention(leaf, offsets, branch_ids, counts)
    expected.backward(grad.double())
    out, grad_qkv = forward_and_gradient(qkv, grad, offsets, branch_ids, counts=counts)
    close(out, expected.detach().float())
    close(grad_qkv, leaf.grad.float())


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_shared_head_is_that_head_repeated_and_its_gradient_the_sum(counts, dtype, dropout_p):
    num_heads, num_kv_heads = counts
    group = num_heads // num_kv_heads
    offsets, branch_ids = layout(TYPICAL)
    q, k, v = heads(make_qkv(branch_ids, dtype=dtype, counts=counts), counts)
    grad = make_grad(branch_ids, dtype=dtype, counts=counts)
    arguments = (offsets, branch_ids, dropout_p, SEED)
    repeated = [part.repeat_interleave(group, dim=1) for part in (k, v)]
    out, grad_q, *shared = gradients((q, k, v), grad, *arguments)
    expected_out, expected_grad_q, *expected = gradients((q, *repeated), grad, *arguments)
    close(out, expected_out)
    close(grad_q, expected_grad_q)
    for one, other in zip(shared, expected, strict=True):
        total = other.float().unflatten(1, (num_kv_heads, group)).sum(2)
        # In bfloat16 each head's share was rounded before it was added.
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(one.float(), total, rtol=tolerance, atol=tolerance)


@needs_kernels
def test_queries_that_share_a_head_are_bit_by_bit_what_they_are_alone():
    offsets, branch_ids = layout(TYPICAL)
    q, k, v = heads(make_qkv(branch_ids, counts=(6, 3)), (6, 3))
    out = ops.branch_attention(q, k, v, offsets, branch_ids)
    for head in range(3):
        group, its = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        alone = ops.branch_attention(q[:, group], k[:, its], v[:, its], offsets, branch_ids)
        assert torch.equal(out[:, group], alone)


# ---- where they lie, and what they are --------------------------------------------------------


def heads_apart(part):
    return part.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = {
    "heads_before_tokens": heads_apart,
    "strides_of_two": lambda part: torch.stack([part, part], dim=-1)[..., 0],
    "head_dim_first": lambda part: part.movedim(2, 0).contiguous().movedim(0, 2),
    "every_second_row": lambda part: part.repeat_interleave(2, dim=0)[::2],
    "every_second_head": lambda part: part.repeat_interleave(2, dim=1)[:, ::2],
    "not_aligned": lambda part: torch.cat([part.flatten()[:1], part.flatten()])[1:].view_as(part),
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("counts", [HEADS, (4, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_numbers_lie_changes_no_bit(lay_out, counts, dtype):
    offsets, branch_ids = layout(TYPICAL)
    parts = heads(make_qkv(branch_ids, dtype=dtype, counts=counts), counts)  # rows apart
    grad = make_grad(branch_ids, dtype=dtype, counts=counts)
    arguments = (offsets, branch_ids, 0.3, SEED)
    dense = [part.contiguous() for part in parts]
    expected = gradients(dense, grad, *arguments)
    assert all(result.is_contiguous() for result in expected)
    for others, its_grad in [
        (parts, grad),
        ([lay_out(part) for part in dense], lay_out(grad)),
        ((dense[0], lay_out(dense[1]), parts[2]), heads_apart(grad)),
    ]:
        actual = gradients(others, its_grad, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_gradient_of_one_tensor_is_that_of_its_parts():
    offsets, branch_ids = layout(TYPICAL)
    qkv, grad = make_qkv(branch_ids, counts=(4, 2)), make_grad(branch_ids, counts=(4, 2))
    _, whole = forward_and_gradient(qkv, grad, offsets, branch_ids, 0.3, SEED, counts=(4, 2))
    _, *parts = gradients(heads(qkv, (4, 2)), grad, offsets, branch_ids, 0.3, SEED)
    assert torch.equal(whole, torch.cat(parts, dim=1).flatten(1))


def test_a_row_that_is_expanded_gives_the_bits_of_its_copies():
    offsets, branch_ids = layout(TYPICAL)
    tokens = len(branch_ids)
    parts = [part.expand(tokens, -1, -1) for part in heads(make_qkv(branch_ids[:1]))]
    grads = [make_grad(branch_ids[:1]).expand(tokens, -1, -1), torch.ones(()).expand(tokens, 2, 16)]
    for grad in grads:
        actual = gradients(parts, grad, offsets, branch_ids)
        copies = [part.contiguous() for part in parts]
        expected = gradients(copies, grad.contiguous(), offsets, branch_ids)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_other_floating_point_numbers_are_computed_as_float32(dtype, dropout_p):
    offsets, branch_ids = layout(TYPICAL)
    parts = [part.to(dtype) for part in heads(make_qkv(branch_ids, counts=(4, 2)), (4, 2))]
    grad = make_grad(branch_ids, dtype=dtype, counts=(4, 2))
    arguments = (offsets, branch_ids, dropout_p, SEED)
    results = gradients(parts, grad, *arguments)
    expected = gradients([part.float() for part in parts], grad.float(), *arguments)
    tolerance = 5e-3 if dtype == torch.float16 else 1e-4
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), other, rtol=tolerance, atol=tolerance)
