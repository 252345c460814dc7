"""`cached_attention`, a sequence at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    offsets: Tensor,
    lengths: Tensor,
) -> Tensor:
    """See `convai_fast.ops.cached_attention`."""
    head_dim, out = keys.shape[3], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    panel, bounds = keys.shape[4], offsets.tolist()
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        rows = slice(bounds[i], bounds[i + 1])
        end = length + bounds[i + 1] - bounds[i]
        positions = torch.arange(length, end, device=q.device)
        keys[slot, :, positions // panel, :, positions % panel] = k[rows].to(keys.dtype)
        values[slot, :, length:end, :head_dim] = v[rows].transpose(0, 1).to(values.dtype)
        past_keys = keys[slot].transpose(-1, -2).flatten(1, 2)[:, :end].to(q.dtype)
        past_values = values[slot, :, :end, :head_dim].to(q.dtype)
        # True where a new token (a row of the mask) may look: at itself and before.
        mask = torch.arange(end, device=q.device) <= positions[:, None]
        out[rows] = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1), past_keys, past_values, attn_mask=mask, enable_gqa=True
        ).transpose(0, 1)
    return out
