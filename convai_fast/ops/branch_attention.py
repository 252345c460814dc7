"""`branch_attention`: attention in rows of a prefix and branches, differentiable, no padding."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import branch_attention_by_torch  # noqa: F401  (registers what torch computes)
from convai_fast.ops.dropout import check_probability
from convai_fast.ops.key_index import KeyIndex


@torch.library.register_fake("convai_fast::branch_attention")
def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.register_fake("convai_fast::branch_attention_backward")
def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, branch_ids, ctx.dropout_p, seed, *_ = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, branch_ids, seed)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    grads = torch.ops.convai_fast.branch_attention_backward(grad_out, *tensors, ctx.dropout_p, seed)
    return *grads, *[None] * 9


torch.library.register_autograd(
    "convai_fast::branch_attention", _backward, setup_context=_setup_context
)


def _no_second_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("branch_attention: it can be differentiated once")


torch.library.register_autograd("convai_fast::branch_attention_backward", _no_second_backward)


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    index: KeyIndex | None = None,
) -> Tensor:
    """Attention of each token to those before it in its row's prefix and in its own branch.

    Row r is tokens `offsets[r]` to `offsets[r + 1]`: a prefix, which may be empty, and any number
    of branches one after another, as `collate_shared` lays them out. Token i attends to
    token k of its row if `k <= i` and `branch_ids[k]` is 0 or `branch_ids[i]`; scores are scaled
    by 1 / sqrt(head_dim). What is computed for a token depends on the tokens it sees alone, on a
    CPU with the compiled operator bit for bit, and its dropout on its place in the batch besides.

    Differentiable in q, k and v, once: the backward pass computes the weights again. Arithmetic is
    in float32, but a CPU that multiplies bfloat16 rounds weights and their gradients to it, where q
    is bfloat16, before it multiplies by them; on CUDA it is that of torch's own attention of
    variable length.

    Args:
        q: [tokens, num_heads, head_dim], queries. A head_dim that is a multiple of 16 wastes
            nothing.
        k, v: [tokens, num_kv_heads, head_dim], keys and values, in the dtype of q; each head of
            them is that of num_heads / num_kv_heads heads of queries (grouped-query attention).
            All three are read where they are if a token's heads lie side by side.
        offsets: int64 [rows + 1] on the CPU, from 0 to tokens, not decreasing.
        branch_ids: int64 [tokens], 0 on the prefix; not decreasing within a row.
        dropout_p: the share of attention weights that are set to 0, at least 0 and less than 1; the
            others are scaled by 1 / (1 - dropout_p).
        seed: int64 [] on the CPU, for dropout: the same seed drops the same weights, but on CUDA,
            where torch's own generator draws.
        index: `index_keys(offsets, branch_ids)`, or `index_prefixes` where no gradient is wanted,
            its tensors on the device of q: what attention on CUDA reads; without it, it is made
            there at every call. Other devices need none.

    Returns:
        [tokens, num_heads, head_dim] in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes, rows or branches are not as above.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); weights recomputed from their log-sum-exp as in
    Dao et al. 2022, "FlashAttention" (arXiv 2205.14135).
    """
    check_probability("branch_attention: dropout_p", dropout_p)
    if dropout_p > 0 and seed is None:
        raise ValueError("branch_attention: dropout needs a seed")
    return torch.ops.convai_fast.branch_attention(
        q, k, v, offsets, branch_ids, dropout_p, seed, *(index or (None, None, None, 0, 0))
    )[0]
