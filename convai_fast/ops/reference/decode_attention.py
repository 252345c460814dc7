"""`decode_attention`, all rows at once and all slots to their very end."""

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
) -> Tensor:
    """See `convai_fast.ops.decode_attention`."""
    keys[slots, lengths] = k
    values[slots, lengths] = v
    # True where a row may not look; there, a weight of 0 would not hide a value that is NaN.
    hidden = torch.arange(keys.shape[1], device=q.device) > lengths[:, None]  # [rows, capacity]
    past_keys = keys[slots].float()  # [rows, capacity, num_kv_heads, head_dim]
    past_values = values[slots].float().masked_fill(hidden[..., None, None], 0)
    group = q.shape[1] // k.shape[1]
    queries = q.float().unflatten(1, (k.shape[1], group)) * q.shape[-1] ** -0.5
    scores = torch.einsum("nhgd,nchd->nhgc", queries, past_keys)
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("nhgc,nchd->nhgd", weights, past_values).flatten(1, 2).to(q.dtype)
