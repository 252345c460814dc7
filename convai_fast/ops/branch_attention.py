"""`branch_attention`: attention in rows of a prefix and branches, differentiable, no padding."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.dropout import check_probability
from convai_fast.ops.schemas import library

library.impl("branch_attention", reference.branch_attention, "CompositeExplicitAutograd")
library.impl(
    "branch_attention_backward", reference.branch_attention_backward, "CompositeExplicitAutograd"
)


@torch.library.register_fake("convai_fast::branch_attention")
def _fake(
    qkv: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    return out, qkv.new_empty(num_heads, qkv.shape[0], dtype=torch.float32)


@torch.library.register_fake("convai_fast::branch_attention_backward")
def _fake_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, offsets, branch_ids, ctx.num_heads, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, *output, offsets, branch_ids, seed)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    grad_qkv = torch.ops.convai_fast.branch_attention_backward(
        grad_out, *tensors, ctx.num_heads, ctx.dropout_p, seed
    )
    return grad_qkv, None, None, None, None, None


torch.library.register_autograd(
    "convai_fast::branch_attention", _backward, setup_context=_setup_context
)


def branch_attention(
    qkv: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    num_heads: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of each token to those before it in its row's prefix and in its own branch.

    Row r is tokens `offsets[r]` to `offsets[r + 1]`: a prefix, which may be empty, and any number
    of branches one after another, as `collate_shared` lays them out. Token i attends to
    token k of its row if `k <= i` and `branch_ids[k]` is 0 or `branch_ids[i]`; scores are scaled
    by 1 / sqrt(head_dim). What is computed for a token depends on the tokens it sees alone, on a
    CPU with the compiled operator bit for bit, and its dropout on its place in the batch besides.

    Differentiable in `qkv`, once: the backward pass computes the weights again. Arithmetic is in
    float32, under autocast too.

    Args:
        qkv: [tokens, 3 * num_heads * head_dim], queries, keys and values; on a CPU float32 or
            bfloat16. A head_dim that is a multiple of 16 wastes nothing.
        offsets: int64 [rows + 1] on the CPU, from 0 to tokens, not decreasing.
        branch_ids: int64 [tokens], 0 on the prefix; not decreasing within a row.
        dropout_p: the share of attention weights that are set to 0, at least 0 and less than 1; the
            others are scaled by 1 / (1 - dropout_p).
        seed: int64 [] on the CPU, for dropout: the same seed drops the same weights.

    Returns:
        [tokens, num_heads * head_dim] in the dtype of `qkv`.

    Raises:
        ValueError, TypeError: shapes, dtypes, rows or branches are not as above.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); weights recomputed from their log-sum-exp as in
    Dao et al. 2022, "FlashAttention" (arXiv 2205.14135).
    """
    check_probability("branch_attention: dropout_p", dropout_p)
    if dropout_p > 0 and seed is None:
        raise ValueError("branch_attention: dropout needs a seed")
    return torch.ops.convai_fast.branch_attention(
        qkv, offsets, branch_ids, num_heads, dropout_p, seed
    )[0]
