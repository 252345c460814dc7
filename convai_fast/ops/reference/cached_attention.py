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
    head_dim, dtype, out = q.shape[-1], keys.dtype, torch.empty_like(q)
    block, together = keys.shape[-2:]
    bounds = offsets.tolist()
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        rows = slice(bounds[i], bounds[i + 1])
        end = length + bounds[i + 1] - bounds[i]
        if end == length:
            continue
        positions = torch.arange(length, end, device=q.device)
        # [tokens, heads, head_dim / together, together] and [tokens, heads, head_dim / 64, 64]
        columns = F.pad(k[rows], (0, -head_dim % together)).unflatten(-1, (-1, together))
        keys[slot, :, positions // block, :, positions % block] = columns.to(dtype)
        features = F.pad(v[rows], (0, -head_dim % block)).unflatten(-1, (-1, block))
        if end % together:  # multiplied too, by 0
            values[slot, :, :, end // together, :, end % together] = 0
        values[slot, :, :, positions // together, :, positions % together] = features.to(dtype)
        past_keys = keys[slot, :, : -(-end // block)].transpose(-3, -2).flatten(-2).flatten(1, 2)
        past_keys = past_keys[:, :end, :head_dim].float()  # [kv_heads, end, head_dim]
        past_values = values[slot, :, :, : -(-end // together)].transpose(-2, -1).flatten(2, 3)
        past_values = past_values.transpose(1, 2).flatten(2)[:, :end, :head_dim].float()
        # Queries of the heads that share keys are rows of one product.
        shape = (k.shape[1], q.shape[1] // k.shape[1], len(positions))  # kv_heads, group, tokens
        queries = (q[rows] * head_dim**-0.5).to(dtype).float().unflatten(1, shape[:2])
        scores = queries.permute(1, 2, 0, 3).flatten(1, 2) @ past_keys.transpose(1, 2)
        # True where a new token (a row of the mask) may look: at itself and before.
        mask = torch.arange(end, device=q.device) <= positions[:, None]
        scores = scores.view(*shape, end).masked_fill(~mask, -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        sums = weights.sum(-1, keepdim=True)
        products = (weights.to(dtype).float().flatten(1, 2) @ past_values).view(*shape, head_dim)
        out[rows] = (products / sums).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out
