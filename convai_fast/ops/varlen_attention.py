"""Attention of sequences of any lengths one after another, by torch's own kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal attention within each of several sequences; the last query sees the last key.

    On CUDA nothing is padded, and torch's generator draws what is dropped. The gradient is torch's
    own there; elsewhere, where it is computed a sequence at a time, there is no dropout.

    Args:
        q: [tokens, num_heads, head_dim], float32 or narrower.
        k, v: [num_keys, num_kv_heads, head_dim], where num_heads is a multiple of num_kv_heads.
        cu_queries, cu_keys: int32 [sequences + 1], where those of each sequence begin
            (FlashAttention's cu_seqlens_q and cu_seqlens_k).
        max_queries, max_keys: the most that a sequence has of them.

    Returns:
        [tokens, num_heads, head_dim].
    """
    if q.device.type == "cuda":
        return _on_cuda(q, k, v, cu_queries, cu_keys, max_queries, max_keys, dropout_p)
    out = torch.empty_like(q)
    begins, ends = cu_queries.tolist(), cu_keys.tolist()
    for i in range(len(begins) - 1):
        rows, keys = slice(begins[i], begins[i + 1]), slice(ends[i], ends[i + 1])
        num_queries, num_keys = begins[i + 1] - begins[i], ends[i + 1] - ends[i]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        out[rows] = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1),
            k[keys].transpose(0, 1),
            v[keys].transpose(0, 1),
            attn_mask=mask.tril(num_keys - num_queries),
            enable_gqa=q.shape[1] != k.shape[1],
        ).transpose(0, 1)
    return out


def _on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    dropout_p: float,
) -> Tensor:
    width, lengths = q.shape[-1], (cu_queries, cu_keys, max_queries, max_keys)
    scale = width**-0.5
    if padding := -width % 8:  # heads of such a width neither kernel takes
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    if takes_flash(q):
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, dropout_p, True, False, scale=scale
        )
    else:
        if q.shape[1] != k.shape[1]:
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        last_key_last = 2  # the mask's alignment: a sequence's last query sees its last key
        out, *_ = torch.ops.aten._efficient_attention_forward(
            q[None], k[None], v[None], None, *lengths, dropout_p, last_key_last, True, scale=scale
        )
    return out.view(q.shape)[..., :width]


def takes_flash(q: Tensor) -> bool:
    """Whether torch's FlashAttention computes queries like these."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        return False
    return q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) >= (8, 0)
