"""Rows of a prefix and branches, and queries, keys and values for them."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from convai_fast import _native, ops
from convai_fast.ops import reference

HEADS = (2, 2)  # of queries, and of keys and values
SEED = torch.tensor(-1_234_567_890_123)

# Rows are (prefix, branch, branch, …), in tokens.
TYPICAL = [(100, 14, 13), (35, 5, 40, 3), (64,), (0, 17, 1), (), (1,)]

needs_kernels = pytest.mark.skipif(_native.host is None, reason="nothing is compiled here")


def some_rows(most):
    """A strategy for up to three rows, of segments of up to `most` tokens."""
    return st.lists(st.lists(st.integers(0, most), max_size=4), max_size=3)


def layout(rows):
    """`offsets` and `branch_ids` of rows of segment lengths."""
    offsets = torch.tensor([0, *(sum(row) for row in rows)]).cumsum(0)
    branches = [j for row in rows for j, length in enumerate(row) for _ in range(length)]
    return offsets, torch.tensor(branches, dtype=torch.int64)


def make_qkv(branch_ids, head_dim=16, dtype=torch.float32, counts=HEADS):
    """[tokens, (num_heads + 2 * num_kv_heads) * head_dim], as one linear layer makes it."""
    return torch.randn(len(branch_ids), (counts[0] + 2 * counts[1]) * head_dim).to(dtype)


def heads(qkv, counts=HEADS):
    """Queries, keys and values where they lie side by side: views whose rows are apart."""
    num_heads, num_kv_heads = counts
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    return qkv.unflatten(-1, (sum(sizes), -1)).split(sizes, dim=-2)


def make_grad(branch_ids, head_dim=16, dtype=torch.float32, counts=HEADS):
    return torch.randn(len(branch_ids), counts[0], head_dim).to(dtype)


def close(actual, expected):
    rtol, atol = (2e-2, 2e-2) if actual.dtype == torch.bfloat16 else (1e-4, 2e-5)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def forward_and_gradient(qkv, grad, *arguments, counts=HEADS):
    leaf = qkv.detach().requires_grad_()
    out = ops.branch_attention(*heads(leaf, counts), *arguments)
    out.backward(grad)
    return out.detach(), leaf.grad


def reference_forward_and_gradient(
    qkv, grad, offsets, branch_ids, dropout_p=0.0, seed=None, counts=HEADS
):
    parts, arguments = heads(qkv, counts), (offsets, branch_ids, dropout_p, seed)
    out, logsumexp = reference.branch_attention(*parts, *arguments)
    grads = reference.branch_attention_backward(grad, *parts, out, logsumexp, *arguments)
    return out, torch.cat(grads, dim=1).flatten(1)


def masked_attention(qkv, offsets, branch_ids, counts=HEADS):
    """Torch's attention, a row at a time, under the mask written out."""
    query, key, value = heads(qkv, counts)
    outs = [query[:0]]
    for first, end in pairwise(offsets.tolist()):
        n = end - first
        if n == 0:
            continue
        branch = branch_ids[first:end].tolist()
        mask = torch.tensor(
            [[k <= i and branch[k] in (0, branch[i]) for k in range(n)] for i in range(n)]
        )
        row = (part[first:end].transpose(0, 1) for part in (query, key, value))
        out = F.scaled_dot_product_attention(*row, attn_mask=mask, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)
