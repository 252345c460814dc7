"""`branch_attention` by torch alone: on CUDA, and where nothing is compiled.

On CUDA torch's attention of variable length computes it, and its gradient is torch's own. Elsewhere
rows are padded to the longest, and all are computed at once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.ops.key_index import check_layout, index_keys
from convai_fast.ops.reference.branch_attention import attend, attend_backward
from convai_fast.ops.schemas import library
from convai_fast.ops.varlen_attention import attend_segments


def _on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    key_ids: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    max_queries: int,
    max_keys: int,
) -> tuple[Tensor, Tensor]:
    """torch's own generator draws what is dropped, whatever the seed."""
    _check_heads(q, k, v)
    if key_ids is None or cu_queries is None or cu_keys is None:
        index = index_keys(offsets, branch_ids.cpu())  # this waits for the device
        key_ids, cu_queries, cu_keys = (x.to(q.device) for x in index[:3])
        max_queries, max_keys = index.max_queries, index.max_keys
    shape, kind, scale = q.shape, q.dtype, q.shape[-1] ** -0.5
    logsumexp = q.new_zeros(shape[1], shape[0], dtype=torch.float32)  # its backward pass needs none
    if len(q) == 0:
        return q + 0 * (k.sum() + v.sum()), logsumexp
    if kind == torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    if padding := -shape[-1] % 8:  # heads of such a width neither kernel takes
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    keys, values = k.index_select(0, key_ids), v.index_select(0, key_ids)
    if cu_keys.dim() == 1:
        lengths = (cu_queries, cu_keys, max_queries, max_keys)
        out, _ = attend_segments(q, keys, values, lengths, dropout_p, scale, True)
    else:  # an index of prefixes
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError("branch_attention: by an index of prefixes there is no gradient")
        lengths = (cu_queries, cu_queries, max_queries, max_queries)
        own = attend_segments(q, k, v, lengths, dropout_p, scale, True)
        lengths = (cu_keys[0], cu_keys[1], max_queries, max_keys)
        of_prefix = attend_segments(q, keys, values, lengths, dropout_p, scale, False)
        out = _merge(own, of_prefix, cu_queries, *cu_keys)
    return out[..., : shape[-1]].to(kind).contiguous(), logsumexp


def _merge(
    own: tuple[Tensor, Tensor],
    of_prefix: tuple[Tensor, Tensor],
    cu_queries: Tensor,
    cu_branches: Tensor,
    cu_prefixes: Tensor,
) -> Tensor:
    """What `attend_segments` gives to the keys of both, in float32, of what it gives to each's."""
    (out, sums), (other, other_sums) = own, of_prefix
    tokens = torch.arange(len(out), dtype=cu_queries.dtype, device=out.device)

    def segments(begins: Tensor) -> Tensor:
        return torch.searchsorted(begins[1:], tokens, right=True)

    def of_tokens(sums: Tensor, begins: Tensor) -> Tensor:
        if sums.dim() == 2:  # flash: [num_heads, tokens]
            return sums.mT
        segment = segments(begins)
        return sums[segment, :, tokens - begins[segment]]  # of [segments, num_heads, queries]

    share = (of_tokens(other_sums, cu_branches) - of_tokens(sums, cu_queries)).sigmoid()
    # What a kernel makes of a query without keys is not said.
    has_keys = (cu_prefixes.diff() > 0)[segments(cu_branches)][:, None, None]
    share, other = share[..., None].where(has_keys, 0), other.float().where(has_keys, 0)
    return torch.lerp(out.float(), other, share)


for _key in ("CUDA", "AutogradCUDA"):
    library.impl("branch_attention", _on_cuda, _key)


class _Padding:
    """Rows padded to the longest."""

    def __init__(self, offsets: Tensor, branch_ids: Tensor) -> None:
        check_layout(offsets, branch_ids)
        lengths, device = offsets.diff(), branch_ids.device
        self.batch, self.seq_len = len(lengths), int(lengths.max()) if len(lengths) else 0
        shift = torch.arange(self.batch) * self.seq_len - offsets[:-1]
        place = torch.arange(len(branch_ids)) + shift.repeat_interleave(lengths)
        self.place = place.to(device)  # of each token among the padded ones
        branch = self.pad(branch_ids[:, None, None] + 1).squeeze(1).squeeze(-1) - 1  # padding: -1
        # Padding stands on the right, where no token of a row looks.
        visible = (branch[:, None, :] <= 0) | (branch[:, None, :] == branch[:, :, None])
        self.visible = visible.tril_()[:, None]  # [batch, 1, seq_len, seq_len]

    def pad(self, x: Tensor) -> Tensor:
        """[tokens, heads, width] to [batch, heads, seq_len, width]."""
        padded = x.new_zeros(self.batch * self.seq_len, *x.shape[1:])
        padded.index_copy_(0, self.place, x)
        return padded.unflatten(0, (self.batch, self.seq_len)).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[batch, heads, seq_len, width] to [tokens, heads, width]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.place)

    def factors(self, num_heads: int, p: float, seed: Tensor | None) -> Tensor | float:
        """What weights are multiplied by, as torch's generator on their device draws."""
        if p == 0:
            return 1.0
        assert seed is not None
        device = self.place.device
        generator = torch.Generator(device).manual_seed(int(seed))
        shape = (self.batch, num_heads, self.seq_len, self.seq_len)
        return torch.empty(shape, device=device).bernoulli_(1 - p, generator=generator).div_(1 - p)


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    _check_heads(q, k, v)
    rows = _Padding(offsets, branch_ids)
    query, key, value = rows.pad(q), rows.pad(k), rows.pad(v)
    with torch.autocast(q.device.type, enabled=False):
        if dropout_p == 0:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=rows.visible, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:  # torch's own would draw without the seed
            factors = rows.factors(q.shape[1], dropout_p, seed)
            out = attend(query, key, value, rows.visible, factors)[0]
    no_logsumexp = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    return rows.unpad(out).to(q.dtype), no_logsumexp


def _padded_backward(
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
    rows = _Padding(offsets, branch_ids)
    factors = rows.factors(q.shape[1], dropout_p, seed)
    with torch.autocast(q.device.type, enabled=False):
        grads = attend_backward(
            rows.pad(grad_out),
            rows.pad(q),
            rows.pad(k),
            rows.pad(v),
            rows.pad(out),
            None,
            rows.visible,
            factors,
        )
    grad_q, grad_k, grad_v = (rows.unpad(x).to(q.dtype) for x in grads)
    return grad_q, grad_k, grad_v


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise TypeError(
            "branch_attention: q, k and v must be floating-point numbers of one type, not "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2]
    if not fits or 0 in (q.shape[2], k.shape[1], q.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            "branch_attention: q must be [tokens, num_heads, head_dim], and k and v "
            "[tokens, num_kv_heads, head_dim], where num_heads is a multiple of num_kv_heads, "
            f"not {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )


library.impl("branch_attention", _padded, "CompositeExplicitAutograd")
library.impl("branch_attention_backward", _padded_backward, "CompositeExplicitAutograd")
