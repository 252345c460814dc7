"""`branch_attention` as a GPU computes it: the index of keys, and torch's attention by it.

Torch's kernels run on a GPU alone. In their place stands what they are documented to compute; that
the calls fit their signatures, torch's own functions of shapes say, on the device "meta".
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from convai_fast import ops
from convai_fast.model import context
from convai_fast.ops import reference
from convai_fast.ops.branch_attention_by_torch import _on_cuda
from tests.helpers.branches import (
    HEADS,
    SEED,
    TYPICAL,
    close,
    heads,
    layout,
    make_grad,
    make_qkv,
    reference_forward_and_gradient,
    some_rows,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def attend_to_segments(
    q, keys, values, cu_queries, cu_keys, max_queries, max_keys, scale=None, is_causal=True
):
    """Attention within each segment, causal if its last query sees its last key.

    Returns it, and the log-sum-exp of the scores, a [num_heads, queries] for each segment. Of
    queries without keys both are what nobody may use.
    """
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert cu_queries[-1] == len(q)
    assert cu_keys[-1] == len(keys) == len(values)
    assert max_queries >= max(cu_queries.diff(), default=0)
    assert max_keys >= max(cu_keys.diff(), default=0)
    outs, sums, group = [q[:0]], [], q.shape[1] // keys.shape[1]
    bounds = zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True)
    for (first, end), (first_key, end_key) in bounds:
        count, num_keys = end - first, end_key - first_key
        if num_keys == 0:
            assert not is_causal
            outs.append(torch.full_like(q[first:end], torch.nan))
            sums.append(torch.full((q.shape[1], count), torch.nan))
            continue
        assert 0 < count <= num_keys or not is_causal
        query = q[first:end].transpose(0, 1).float()
        key, value = (
            x[first_key:end_key].transpose(0, 1).float().repeat_interleave(group, dim=0)
            for x in (keys, values)
        )
        visible = torch.ones(count, num_keys, dtype=torch.bool)
        if is_causal:
            visible = visible.tril(num_keys - count)
        scores = (query @ key.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~visible, -torch.inf)
        outs.append((scores.softmax(-1) @ value).transpose(0, 1).to(q.dtype))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), sums


# ---- the index of keys ------------------------------------------------------------------------


def test_the_index_of_a_worked_example():
    # A prefix of two tokens and branches of one and two, as the docstring has it.
    index = ops.index_keys(torch.tensor([0, 5]), torch.tensor([0, 0, 1, 2, 2]))
    assert index.cu_queries.tolist() == [0, 2, 3, 5]
    assert index.key_ids.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4]
    assert index.cu_keys.tolist() == [0, 2, 5, 9]
    assert index[3:] == (2, 4)
    assert [x.dtype for x in index[:3]] == [torch.int64, torch.int32, torch.int32]


def test_rows_without_a_prefix_without_branches_and_without_tokens_are_indexed():
    # Rows () (1 token of branch 3, 1 of branch 7) () (a prefix of 2) (a prefix of 1, a branch).
    offsets = torch.tensor([0, 0, 2, 2, 4, 6])
    index = ops.index_keys(offsets, torch.tensor([3, 7, 0, 0, 0, 5]))
    assert index.cu_queries.tolist() == [0, 1, 2, 4, 5, 6]
    assert index.key_ids.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert index.cu_keys.tolist() == [0, 1, 2, 4, 5, 7]


@pytest.mark.parametrize("rows", [[], [()], [(), ()]])
def test_the_index_of_no_tokens_is_empty(rows):
    index = ops.index_keys(*layout(rows))
    assert index.key_ids.tolist() == []
    assert index.cu_queries.tolist() == index.cu_keys.tolist() == [0]
    assert index[3:] == (0, 0)


@settings(max_examples=60, deadline=None)
@given(some_rows(12))
def test_attention_to_the_indexed_keys_is_the_references(rows):
    offsets, branch_ids = layout(rows)
    qkv, grad = make_qkv(branch_ids, counts=(4, 2)), make_grad(branch_ids, counts=(4, 2))
    key_ids, *lengths = ops.index_keys(offsets, branch_ids)
    q, k, v = heads(qkv, (4, 2))
    out, _ = attend_to_segments(q, k[key_ids], v[key_ids], *lengths)
    arguments = (offsets, branch_ids, 0.0, None)
    close(out, reference_forward_and_gradient(qkv, grad, *arguments, counts=(4, 2))[0])


# ---- torch's attention by it --------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Torch's two kernels replaced; the arguments of each call but the tensors."""
    calls = []

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale):
        assert q.shape[-1] % 8 == 0
        assert q.dtype in (torch.float16, torch.bfloat16)
        calls.append(("flash", dropout_p, is_causal, return_debug_mask))
        segments = (q, k, v, cu_q, cu_k, max_q, max_k, scale, is_causal)
        out, sums = attend_to_segments(*segments)
        return out, torch.cat(sums, dim=1), None, None, None

    def efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout_p, custom_mask_type, log_sumexp):
        assert bias is None
        assert q.shape[-1] % 8 == 0
        assert q.dtype == torch.float32
        assert q.dim() == k.dim() == v.dim() == 4
        assert len(q) == len(k) == len(v) == 1
        assert q.shape[2] == k.shape[2] == v.shape[2]  # it knows no grouped heads
        calls.append(("efficient", dropout_p, custom_mask_type, log_sumexp))
        segments = (q[0], k[0], v[0], cu_q, cu_k, max_q, max_k, None, custom_mask_type != 0)
        out, sums = attend_to_segments(*segments)
        width = -(-max_q // 32) * 32
        padded = [F.pad(own, (0, width - own.shape[1]), value=torch.nan) for own in sums]
        return out[None], torch.stack(padded), None, None, max_q, max_k

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)
    return calls


NO_INDEX = (None, None, None, 0, 0)
BOTTOM_RIGHT = 2
WAYS = {
    torch.float32: ("efficient", 0.0, BOTTOM_RIGHT, True),
    torch.bfloat16: ("flash", 0.0, True, False),
}


@pytest.mark.parametrize("dtype", WAYS, ids=str)
@pytest.mark.parametrize("counts", [HEADS, (4, 1), (6, 3)])
@pytest.mark.parametrize("is_indexed", [True, False])
def test_torchs_attention_by_the_index_is_the_references(calls, dtype, counts, is_indexed):
    offsets, branch_ids = layout(TYPICAL)
    qkv = make_qkv(branch_ids, dtype=dtype, counts=counts)
    grad = make_grad(branch_ids, dtype=dtype, counts=counts)
    index = ops.index_keys(offsets, branch_ids) if is_indexed else NO_INDEX
    leaf = qkv.clone().requires_grad_()
    out, _ = _on_cuda(*heads(leaf, counts), offsets, branch_ids, 0.0, None, *index)
    out.backward(grad)
    expected, expected_grad = reference_forward_and_gradient(
        qkv, grad, offsets, branch_ids, counts=counts
    )
    assert out.dtype == leaf.grad.dtype == dtype
    close(out.detach(), expected)
    if dtype == torch.bfloat16:  # the shares of a prefix's keys are rounded before they are added
        torch.testing.assert_close(leaf.grad, expected_grad, rtol=5e-2, atol=5e-2)
    else:
        close(leaf.grad, expected_grad)
    assert calls == [WAYS[dtype]]


# ---- without gradients: what many branches share is not repeated --------------------------------


def test_the_index_of_prefixes_of_a_worked_example():
    index = ops.index_prefixes(torch.tensor([0, 5]), torch.tensor([0, 0, 1, 2, 2]))
    assert index.cu_queries.tolist() == [0, 2, 3, 5]
    assert index.key_ids.tolist() == [0, 1]
    assert index.cu_keys.tolist() == [[0, 2, 5], [0, 0, 2]]
    assert index[3:] == (3, 2)
    assert [x.dtype for x in index[:3]] == [torch.int64, torch.int32, torch.int32]


@torch.no_grad()
@pytest.mark.parametrize("dtype", WAYS, ids=str)
@pytest.mark.parametrize("counts", [HEADS, (4, 1)])
@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("rows", [TYPICAL, [()], [(3,)], [(0, 2, 5), (0, 1)], [(9, *[4] * 20)] * 2])
def test_two_calls_that_are_merged_are_the_references(calls, dtype, counts, head_dim, rows):
    offsets, branch_ids = layout(rows)
    parts = heads(make_qkv(branch_ids, head_dim, dtype, counts), counts)
    index = ops.index_prefixes(offsets, branch_ids)
    out, _ = _on_cuda(*parts, offsets, branch_ids, 0.0, None, *index)
    close(out, reference.branch_attention(*parts, offsets, branch_ids, 0.0, None)[0])
    name, *_, last = WAYS[dtype]
    no_mask = {"flash": False, "efficient": 0}[name]
    assert calls == ([WAYS[dtype], (name, 0.0, no_mask, last)] if len(branch_ids) else [])


@settings(max_examples=60, deadline=None)
@given(some_rows(12))
def test_an_index_of_prefixes_says_who_sees_whom(rows):
    offsets, branch_ids = layout(rows)
    key_ids, cu_queries, cu_keys, max_queries, max_keys = ops.index_prefixes(offsets, branch_ids)
    seen = [set() for _ in branch_ids]
    for first, end in pairwise(cu_queries.tolist()):
        for i in range(first, end):
            seen[i] |= set(range(first, i + 1))
    for (first, end), (begin, last) in zip(*map(pairwise, cu_keys.tolist()), strict=True):
        assert end - first <= max_queries
        assert last - begin <= max_keys
        for i in range(first, end):
            seen[i] |= set(key_ids[begin:last].tolist())
    full = ops.index_keys(offsets, branch_ids)
    segments = zip(pairwise(full.cu_queries.tolist()), pairwise(full.cu_keys.tolist()), strict=True)
    for (first, end), (begin, last) in segments:
        for i in range(first, end):
            assert seen[i] == set(full.key_ids[begin : last - (end - 1 - i)].tolist())


def test_an_index_of_prefixes_gives_no_wrong_gradient(calls):
    offsets, branch_ids = layout(TYPICAL)
    parts = heads(make_qkv(branch_ids).requires_grad_())
    with pytest.raises(ValueError, match="by an index of prefixes there is no gradient"):
        _on_cuda(*parts, offsets, branch_ids, 0.0, None, *ops.index_prefixes(offsets, branch_ids))


def test_many_branches_take_it_where_no_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(context, "to_device", lambda x, _: x)
    cuda = torch.device("cuda")
    for num_branches, with_gradient, dims in [(20, False, 2), (20, True, 1), (4, False, 1)]:
        offsets, branch_ids = layout([(9, *[4] * num_branches)])
        index = context.key_index(offsets, branch_ids, cuda, with_gradient)
        assert index.cu_keys.dim() == dims


# ---- what the kernels do not take ---------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [3, 20])
@pytest.mark.parametrize("dtype", WAYS, ids=str)
def test_heads_of_a_width_that_the_kernels_do_not_take_are_padded(calls, head_dim, dtype):
    offsets, branch_ids = layout(TYPICAL)
    qkv = make_qkv(branch_ids, head_dim, dtype)
    index = ops.index_keys(offsets, branch_ids)
    out, _ = _on_cuda(*heads(qkv), offsets, branch_ids, 0.0, None, *index)
    close(out, reference.branch_attention(*heads(qkv), offsets, branch_ids, 0.0, None)[0])


def test_float64_is_computed_in_float32(calls):
    offsets, branch_ids = layout(TYPICAL)
    q, k, v = heads(make_qkv(branch_ids).double())
    out, _ = _on_cuda(q, k, v, offsets, branch_ids, 0.0, None, *NO_INDEX)
    expected, _ = _on_cuda(
        *(x.float() for x in (q, k, v)), offsets, branch_ids, 0.0, None, *NO_INDEX
    )
    assert torch.equal(out, expected.double())


def test_a_batch_of_no_tokens_has_gradients(calls):
    offsets, branch_ids = layout([()])
    leaf = make_qkv(branch_ids).requires_grad_()
    out, logsumexp = _on_cuda(*heads(leaf), offsets, branch_ids, 0.0, None, *NO_INDEX)
    out.sum().backward()
    assert leaf.grad.shape == leaf.shape
    assert logsumexp.shape == (HEADS[0], 0)
    assert calls == []


@pytest.mark.parametrize("dtype", WAYS, ids=str)
def test_dropout_is_torchs_own(calls, dtype):
    offsets, branch_ids = layout(TYPICAL)
    parts, index = heads(make_qkv(branch_ids, dtype=dtype)), ops.index_keys(offsets, branch_ids)
    _on_cuda(*parts, offsets, branch_ids, 0.3, SEED, *index)
    name, _, *others = WAYS[dtype]
    assert calls == [(name, 0.3, *others)]


@pytest.mark.parametrize("dtype", [*WAYS, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [HEADS, (4, 2)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_calls_fit_torchs_signatures_forward_and_backward(dtype, counts, dropout_p):
    offsets, branch_ids = layout(TYPICAL)
    tensors = [make_qkv(branch_ids, dtype=dtype, counts=counts), branch_ids]
    *tensors, key_ids, cu_queries, cu_keys = (
        x.to("meta") for x in (*tensors, *ops.index_keys(offsets, branch_ids)[:3])
    )
    leaves = [part.detach().requires_grad_() for part in heads(tensors[0], counts)]
    index = (key_ids, cu_queries, cu_keys, *ops.index_keys(offsets, branch_ids)[3:])
    out, logsumexp = _on_cuda(*leaves, offsets, tensors[1], dropout_p, SEED, *index)
    assert (out.shape, out.dtype) == ((len(branch_ids), counts[0], 16), dtype)
    assert logsumexp.dtype == torch.float32
    out.backward(torch.empty_like(out))
    for leaf in leaves:
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, dtype)


def test_a_gpu_computes_by_torch_with_and_without_gradients():
    name = "convai_fast::branch_attention"
    for key in ("CUDA", "AutogradCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*WAYS, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [HEADS, (4, 2)])
def test_the_merged_calls_fit_torchs_signatures(dtype, counts):
    offsets, branch_ids = layout(TYPICAL)
    parts = heads(make_qkv(branch_ids, dtype=dtype, counts=counts).to("meta"), counts)
    index = ops.index_prefixes(offsets, branch_ids)
    index = (*(x.to("meta") for x in index[:3]), *index[3:])
    out, _ = _on_cuda(*parts, offsets, branch_ids.to("meta"), 0.0, None, *index)
    assert (out.shape, out.dtype) == ((len(branch_ids), counts[0], 16), dtype)


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [*WAYS, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [TYPICAL, [(9, *[4] * 20)] * 2])
def test_a_gpu_merges_two_calls_into_what_the_reference_computes(dtype, rows):
    offsets, branch_ids = layout(rows)
    parts = heads(make_qkv(branch_ids, dtype=dtype))
    expected, _ = reference.branch_attention(*parts, offsets, branch_ids, 0.0, None)
    index = ops.index_prefixes(offsets, branch_ids)
    index = ops.KeyIndex(*(x.cuda() for x in index[:3]), *index[3:])
    parts = [part.cuda() for part in parts]
    out = ops.branch_attention(*parts, offsets, branch_ids.cuda(), 0.0, None, index)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [*WAYS, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [HEADS, (4, 2)])
@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_gpu_computes_what_the_reference_does(dtype, counts, is_indexed):
    offsets, branch_ids = layout(TYPICAL)
    qkv = make_qkv(branch_ids, dtype=dtype, counts=counts)
    grad = make_grad(branch_ids, dtype=dtype, counts=counts)
    expected = reference_forward_and_gradient(qkv, grad, offsets, branch_ids, counts=counts)
    index = ops.index_keys(offsets, branch_ids)
    index = ops.KeyIndex(*(x.cuda() for x in index[:3]), *index[3:]) if is_indexed else None
    leaf = qkv.cuda().requires_grad_()
    out = ops.branch_attention(*heads(leaf, counts), offsets, branch_ids.cuda(), 0.0, None, index)
    out.backward(grad.cuda())
    for result, other in zip((out.detach(), leaf.grad), expected, strict=True):
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(result.cpu(), other, rtol=tolerance, atol=tolerance)
