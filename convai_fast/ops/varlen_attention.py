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
) -> Tensor:
    """Causal attention within each of several sequences, whose last query sees its last key.

    For inference. On CUDA nothing is padded; elsewhere it is a sequence at a time.

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
        head_dim = q.shape[-1]
        if padding := -head_dim % 8:
            q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
        lengths = (cu_queries, cu_keys, max_queries, max_keys)
        out, _ = attend_segments(q, k, v, lengths, 0.0, head_dim**-0.5, True)
        return out[..., :head_dim]
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


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    dropout_p: float,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention within segments by torch's CUDA kernels, and its log-sum-exp as they return it.

    Args:
        lengths: cu_queries, cu_keys, max_queries, max_keys, as for `varlen_attention`.
        scale: of scores. head_dim is a multiple of 8, which neither kernel can do without.
        is_causal: whether a segment's last query sees its last key, and each before it one less.
    """
    if _takes_flash(q):
        out, sums, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, dropout_p, is_causal, False, scale=scale
        )
        return out.view(q.shape), sums
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if scale != q.shape[-1] ** -0.5:  # the width is padded, and it divides scores by its root
        q = q * (q.shape[-1] ** 0.5 * scale)
    batch = (q[None], k[None], v[None], None)
    last_key_last = 2  # how the causal mask is aligned
    out, sums, *_ = torch.ops.aten._efficient_attention_forward(
        *batch, *lengths, dropout_p, last_key_last if is_causal else 0, True
    )
    return out.view(q.shape), sums


def _takes_flash(q: Tensor) -> bool:
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        return False
    return q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) >= (8, 0)
