"""`branch_attention` against its reference, and both against torch's attention under a mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast import ops
from convai_fast.ops import reference
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
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_worked_example():
    offsets, branch_ids = layout([(1, 1, 1)])
    # Indifferent queries: the mean of the values that a token sees. The branches see the prefix
    # and themselves.
    qkv = torch.tensor([[0.0, 5.0, 1.0], [0.0, 6.0, 3.0], [0.0, 7.0, 5.0]])
    out = ops.branch_attention(*heads(qkv, (1, 1)), offsets, branch_ids)
    assert out.tolist() == [[[1.0]], [[2.0]], [[3.0]]]


@pytest.mark.parametrize("head_dim", [4, 16, 64, 80])
def test_outputs_and_gradients_are_those_of_torchs_attention_under_the_mask(head_dim):
    offsets, branch_ids = layout(TYPICAL)
    qkv = make_qkv(branch_ids, head_dim).double()
    grad = make_grad(branch_ids, head_dim).double()
    leaf = qkv.clone().requires_grad_()
    expected = masked_attention(leaf, offsets, branch_ids)
    expected.backward(grad)
    out, grad_qkv = forward_and_gradient(qkv.float(), grad.float(), offsets, branch_ids)
    close(out, expected.detach().float())
    close(grad_qkv, leaf.grad.float())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=4), max_size=4),
    st.sampled_from([4, 16, 64, 80]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 0.3]),
)
def test_the_kernels_compute_what_the_reference_does(rows, head_dim, dtype, dropout_p):
    offsets, branch_ids = layout(rows)
    qkv = make_qkv(branch_ids, head_dim, dtype)
    grad = make_grad(branch_ids, head_dim, dtype)
    arguments = (offsets, branch_ids, dropout_p, SEED)
    out, grad_qkv = forward_and_gradient(qkv, grad, *arguments)
    expected, expected_grad = reference_forward_and_gradient(qkv, grad, *arguments)
    assert out.dtype == grad_qkv.dtype == dtype
    close(out, expected)
    close(grad_qkv, expected_grad)


def test_the_references_gradient_is_the_gradient_of_the_reference():
    offsets, branch_ids = layout(TYPICAL)
    leaf = make_qkv(branch_ids).requires_grad_()
    arguments = (offsets, branch_ids, 0.3, SEED)
    out, logsumexp = reference.branch_attention(*heads(leaf), *arguments)
    grad = torch.randn_like(out)
    out.backward(grad)
    actual = reference.branch_attention_backward(
        grad, *heads(leaf.detach()), out.detach(), logsumexp.detach(), *arguments
    )
    close(torch.cat(actual, dim=1).flatten(1), leaf.grad)


def test_rows_beyond_a_thousand_tokens():
    offsets, branch_ids = layout([(1000, 60, 30), (2, 1)])
    qkv = make_qkv(branch_ids)
    grad = make_grad(branch_ids)
    arguments = (offsets, branch_ids, 0.0, None)
    expected = reference_forward_and_gradient(qkv, grad, *arguments)
    for a, b in zip(forward_and_gradient(qkv, grad, *arguments), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("rows", [[], [()], [(), ()]])
def test_no_rows_and_no_tokens(rows):
    offsets, branch_ids = layout(rows)
    leaf = make_qkv(branch_ids).requires_grad_()
    out = ops.branch_attention(*heads(leaf), offsets, branch_ids, 0.5, SEED)
    assert out.shape == (0, HEADS[0], 16)
    out.sum().backward()
    assert leaf.grad.shape == leaf.shape


@needs_kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_nothing_depends_on_what_a_token_does_not_see(dropout_p):
    offsets, branch_ids = layout([(40, 14, 9)])
    qkv = make_qkv(branch_ids)
    arguments = (dropout_p, SEED)
    out = ops.branch_attention(*heads(qkv), offsets, branch_ids, *arguments)
    other = qkv.clone()
    other[40:54] = torch.randn(14, qkv.shape[1])  # another first branch
    changed = ops.branch_attention(*heads(other), offsets, branch_ids, *arguments)
    assert torch.equal(out[:40], changed[:40])
    assert not torch.equal(out[40:54], changed[40:54])
    assert torch.equal(out[54:], changed[54:])
    alone = ops.branch_attention(
        *heads(qkv[:40]), torch.tensor([0, 40]), branch_ids[:40], *arguments
    )
    assert torch.equal(out[:40], alone)


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    offsets, branch_ids = layout(TYPICAL)
    qkv = make_qkv(branch_ids)
    grad = make_grad(branch_ids)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_and_gradient(qkv, grad, offsets, branch_ids, 0.2, SEED))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def weights_of(dropout_p, seed, n=128):
    """The dropped and scaled weights themselves, [n, n], seen through values that are unit vectors.

    Queries are 0, so that before dropout a row's weights are equal.
    """
    offsets, branch_ids = layout([(n // 2, n // 4, n // 4)])
    qkv = torch.zeros(n, 3, n)
    qkv[:, 2] = torch.eye(n)
    parts = heads(qkv.flatten(1), (1, 1))
    return ops.branch_attention(*parts, offsets, branch_ids, dropout_p, seed)[:, 0]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest(dropout_p):
    whole, dropped = weights_of(0.0, None), weights_of(dropout_p, SEED)
    kept = dropped[whole > 0] > 0
    n = len(kept)
    assert abs(kept.float().mean() - (1 - dropout_p)) < 4 * (dropout_p * (1 - dropout_p) / n) ** 0.5
    close(dropped[whole > 0][kept] * (1 - dropout_p), whole[whole > 0][kept])


def test_a_seed_drops_the_same_and_another_seed_others():
    assert torch.equal(weights_of(0.5, SEED), weights_of(0.5, SEED))
    one, other = (weights_of(0.5, seed) > 0 for seed in (SEED, SEED + 2**32))
    visible = weights_of(0.0, None) > 0
    assert 0.4 < (one == other)[visible].float().mean() < 0.6


def test_heads_rows_and_segments_draw_their_own_masks():
    rows = [(16, 16), (16, 16)]
    offsets, branch_ids = layout(rows)
    value = torch.eye(16)[torch.arange(16).repeat(4)]
    qkv = torch.zeros(64, 3, 2, 16)
    qkv[:, 2] = value[:, None]
    # The last token of each segment sees 16 keys of its own; the second segment's sees 16 more.
    out = ops.branch_attention(*heads(qkv.flatten(1)), offsets, branch_ids, 0.5, SEED)
    last = out[15::16].flatten(0, 1)
    assert len({tuple(weights) for weights in last.tolist()}) == len(last)


def test_the_backward_pass_drops_what_the_forward_pass_dropped():
    # The output is linear in the values: its derivative along any direction is its value there.
    offsets, branch_ids = layout([(30, 7, 5), (0, 20)])
    qkv = make_qkv(branch_ids)
    grad = make_grad(branch_ids)
    arguments = (offsets, branch_ids, 0.4, SEED)
    out, grad_qkv = forward_and_gradient(qkv, grad, *arguments)
    values = slice(sum(HEADS) * 16, None)
    along = (grad_qkv[:, values] * qkv[:, values]).sum()
    torch.testing.assert_close(along, (grad * out).sum(), rtol=1e-4, atol=1e-3)
    # In queries and keys by finite differences of the reference, which drops alike.
    direction = torch.randn_like(qkv)
    direction[:, values] = 0
    step = 1e-2
    ahead, behind = (
        ops.branch_attention(*heads(qkv + sign * step * direction), *arguments) for sign in (1, -1)
    )
    slope = (grad * (ahead - behind)).sum() / (2 * step)
    torch.testing.assert_close((grad_qkv * direction).sum(), slope, rtol=2e-2, atol=5e-2)


def test_very_different_scores_do_not_overflow():
    offsets, branch_ids = layout([(50, 20)])
    qkv = make_qkv(branch_ids)
    qkv[:, : sum(HEADS) * 16] *= 100  # queries and keys: the scores are in the ten thousands
    grad = make_grad(branch_ids)
    out, grad_qkv = forward_and_gradient(qkv, grad, offsets, branch_ids)
    assert grad_qkv.isfinite().all()
    expected = masked_attention(qkv.double(), offsets, branch_ids).float()
    # Scores of ten thousand have 4 digits left after the point, and here and there two are close.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_inference_mode_change_nothing(dtype):
    offsets, branch_ids = layout(TYPICAL)
    qkv = make_qkv(branch_ids, dtype=dtype)
    grad = make_grad(branch_ids, dtype=dtype)
    arguments = (offsets, branch_ids, 0.2, SEED)
    expected = forward_and_gradient(qkv, grad, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = forward_and_gradient(qkv, grad, *arguments)
        slow = reference_forward_and_gradient(qkv, grad, *arguments)
    for a, b, c in zip(actual, expected, slow, strict=True):
        assert torch.equal(a, b)
        close(c, b)
    with torch.inference_mode():
        assert torch.equal(ops.branch_attention(*heads(qkv), *arguments), expected[0])


@needs_kernels
def test_what_does_not_fit_is_named():
    offsets, branch_ids = layout([(2, 1), (1,)])
    q, k, v = heads(make_qkv(branch_ids))

    def call(q=q, k=k, v=v, offsets=offsets, branch_ids=branch_ids, p=0.0, seed=None):
        return ops.branch_attention(q, k, v, offsets, branch_ids, p, seed)

    for wrong, error, message in [
        ({"offsets": torch.tensor([0, 3])}, ValueError, "from 0 to the number of tokens, 4"),
        ({"offsets": torch.tensor([1, 4])}, ValueError, "from 0 to the number of tokens, 4"),
        ({"offsets": torch.tensor([0, 2**62, 4])}, ValueError, "row 0 is 0 to"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, ValueError, "row 1 is 3 to 2"),
        ({"offsets": torch.tensor([0, -1, 4])}, ValueError, "row 0 is 0 to -1"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "from 0"),
        ({"offsets": offsets.int()}, TypeError, "offsets must be"),
        ({"branch_ids": branch_ids[:3]}, ValueError, "4 tokens need as many branch_ids, not 3"),
        ({"branch_ids": torch.tensor([0, 1, 0, 0])}, ValueError, "row 0 .* token 2 has 0"),
        ({"branch_ids": torch.tensor([-1, 0, 0, 0])}, ValueError, "token 0 has -1"),
        ({"branch_ids": branch_ids.float()}, TypeError, "branch_ids must be"),
        ({"q": q.double()}, TypeError, "of one type, not Double, Float and Float"),
        ({"v": v.bfloat16()}, TypeError, "of one type, not Float, Float and BFloat16"),
        ({"q": q.int(), "k": k.int(), "v": v.int()}, TypeError, "must be floating-point numbers"),
        ({"q": q[None]}, ValueError, r"q must be \[tokens, num_heads, head_dim\]"),
        ({"q": q.flatten(1), "k": k.flatten(1), "v": v.flatten(1)}, ValueError, "q must be"),
        ({"q": q[:3]}, ValueError, r"not \[3, 2, 16\], \[4, 2, 16\] and \[4, 2, 16\]"),
        ({"v": v[:, :1]}, ValueError, r"head_dim\], where .* not .* and \[4, 1, 16\]"),
        ({"q": q[..., :8]}, ValueError, r"not \[4, 2, 8\]"),
        ({"q": q[:, [0, 1, 0]]}, ValueError, r"not \[4, 3, 16\]"),  # no multiple of 2
        ({"q": q[:, :0]}, ValueError, r"not \[4, 0, 16\]"),
        ({"k": k[:, :0], "v": v[:, :0]}, ValueError, r"not .*, \[4, 0, 16\] and"),
        ({"q": q[..., :0], "k": k[..., :0], "v": v[..., :0]}, ValueError, r"not \[4, 2, 0\]"),
        ({"p": 0.1}, ValueError, "dropout needs a seed"),
        ({"p": 1.0, "seed": SEED}, ValueError, "at least 0 and less than 1, not 1.0"),
        ({"p": torch.nan, "seed": SEED}, ValueError, "less than 1, not nan"),
        ({"p": 0.1, "seed": SEED[None]}, ValueError, "seed must have 0 dim"),
        ({"p": 0.1, "seed": SEED.int()}, TypeError, "seed must be"),
    ]:
        with pytest.raises(error, match=message):
            call(**wrong)

    def backward(**wrong):
        plain = (offsets, branch_ids, 0.0, None)
        out, logsumexp = torch.ops.convai_fast.branch_attention(
            q, k, v, *plain, None, None, None, 0, 0
        )
        tensors = {"grad_out": out, "q": q, "k": k, "v": v, "out": out, "logsumexp": logsumexp}
        return torch.ops.convai_fast.branch_attention_backward(*(tensors | wrong).values(), *plain)

    backward()
    for name, shape in [
        ("grad_out", (3, 2, 16)),
        ("grad_out", (4, 32)),
        ("out", (4, 1, 16)),
        ("logsumexp", (2, 3)),
        ("logsumexp", (1, 4)),
        ("q", (4, 4, 16)),
    ]:
        with pytest.raises(ValueError, match="do not fit each other"):
            backward(**{name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="q must be"):
        backward(q=torch.zeros(3, 2, 16))
    for name in ("grad_out", "out"):
        with pytest.raises(TypeError, match="grad_out and out must be Float"):
            backward(**{name: q.double()})
    with pytest.raises(TypeError, match="logsumexp must be"):
        backward(logsumexp=torch.zeros(2, 4).double())


@pytest.mark.parametrize("counts", [HEADS, (4, 2)])
def test_opcheck_passes(counts):
    offsets, branch_ids = layout([(5, 2), (1,)])
    parts = heads(make_qkv(branch_ids, counts=counts), counts)
    no_index = (None, None, None, 0, 0)
    for dropout in [(0.0, None), (0.3, SEED)]:
        everything = (offsets, branch_ids, *dropout)
        leaves = [part.clone().requires_grad_() for part in parts]
        forward = torch.ops.convai_fast.branch_attention
        torch.library.opcheck(forward.default, (*leaves, *everything, *no_index))
        out, logsumexp = forward(*parts, *everything, *no_index)
        torch.library.opcheck(
            torch.ops.convai_fast.branch_attention_backward.default,
            (out, *parts, out, logsumexp, *everything),
        )


def test_it_compiles_into_a_graph():
    offsets, branch_ids = layout([(5, 2), (1,)])
    qkv = make_qkv(branch_ids)
    compiled = torch.compile(ops.branch_attention, backend="eager", fullgraph=True)
    one, other = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    out = compiled(*heads(one), offsets, branch_ids, 0.3, SEED)
    expected = ops.branch_attention(*heads(other), offsets, branch_ids, 0.3, SEED)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(one.grad, other.grad)
