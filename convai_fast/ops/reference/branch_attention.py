"""`branch_attention` and its gradient, a row at a time."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from convai_fast.ops.reference.philox import philox_words


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, factors: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Attention where queries see what is `visible`, and the log-sum-exp of their scores.

    Args:
        q: [..., num_heads, n, head_dim].
        k, v: [..., num_kv_heads, n, head_dim], a head for each group of those of `q`.
        visible: bool, [..., n, n], of queries by keys.
        factors: what weights are multiplied by, for dropout; [..., num_heads, n, n] or a number.

    Returns:
        [..., num_heads, n, head_dim] and [..., num_heads, n], in float32 or float64.
    """
    query, key, value = _grouped(q, k, v)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) * factors @ value, scores.logsumexp(-1)


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor | None,
    visible: Tensor,
    factors: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v where `grad_out` is that of the first result of `attend`.

    Without `logsumexp`, the second, it is computed again.
    """
    query, key, value = _grouped(q, k, v)
    grad, scale = grad_out.to(query.dtype), query.shape[-1] ** -0.5
    scores = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
    if logsumexp is None:
        logsumexp = scores.logsumexp(-1)
    weights = (scores - logsumexp[..., None]).exp()
    grad_value = (weights * factors).mT @ grad
    mean = (grad * out).sum(-1, keepdim=True)
    grad_scores = weights * (grad @ value.mT * factors - mean)
    grad_key = grad_scores.mT @ query * scale
    # A head of keys and values has the gradients of all heads of queries that share it.
    groups = (k.shape[-3], q.shape[-3] // k.shape[-3])
    grad_key, grad_value = (x.unflatten(-3, groups).sum(-3) for x in (grad_key, grad_value))
    return grad_scores @ key * scale, grad_key, grad_value


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 or float64, with a head of keys and values for each of the queries."""
    dtype, group = torch.promote_types(q.dtype, torch.float32), q.shape[-3] // k.shape[-3]
    k, v = (x.to(dtype).repeat_interleave(group, dim=-3) for x in (k, v))
    return q.to(dtype), k, v


def _rows_of_branches(
    offsets: Tensor, branch_ids: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """The tokens of each row, who sees whom [n, n], and the weights' factors [num_heads, n, n]."""
    device = branch_ids.device
    for first, end in pairwise(offsets.tolist()):
        branch = branch_ids[first:end]
        place = torch.arange(end - first, device=device)
        visible = (place <= place[:, None]) & ((branch == 0) | (branch == branch[:, None]))
        factors: Tensor | float = 1.0
        if dropout_p > 0:
            assert seed is not None
            # Where each token's segment (the prefix or a branch) begins, and its place therein.
            begins = torch.searchsorted(branch, branch)
            place = place - begins
            # Four queries of a segment share the four words of a key's block.
            query = (first + begins + place // 4 * 4)[:, None] * num_heads
            query = query + torch.arange(num_heads, device=device)[:, None, None]
            is_prefix = (branch != branch[:, None]).long()
            words = philox_words(seed.to(device), place, 2 * query + is_prefix)
            word = (place % 4)[:, None].expand(words.shape[1:])
            kept = words.gather(0, word[None])[0] >= int(dropout_p * 2**32)
            factors = kept / (1 - dropout_p)
        yield slice(first, end), visible, factors


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `convai_fast.ops.branch_attention`; the second result is each query's log-sum-exp."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    rows = _rows_of_branches(offsets, branch_ids, q.shape[1], dropout_p, seed)
    with torch.autocast(q.device.type, enabled=False):
        for row, visible, factors in rows:
            query, key, value = (x[row].transpose(0, 1) for x in (q, k, v))  # [heads, n, head_dim]
            result, logsumexp[:, row] = attend(query, key, value, visible, factors)
            out[row] = result.transpose(0, 1).to(out.dtype)
    return out, logsumexp


def branch_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v where `grad_out` is that of the first result."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    rows = _rows_of_branches(offsets, branch_ids, q.shape[1], dropout_p, seed)
    with torch.autocast(q.device.type, enabled=False):
        for row, visible, factors in rows:
            grad, query, key, value, result = (
                x[row].transpose(0, 1) for x in (grad_out, q, k, v, out)
            )
            results = attend_backward(
                grad, query, key, value, result, logsumexp[:, row], visible, factors
            )
            for target, part in zip(grads, results, strict=True):
                target[row] = part.transpose(0, 1).to(target.dtype)
    return grads[0], grads[1], grads[2]
