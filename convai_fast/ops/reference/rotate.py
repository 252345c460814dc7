"""`rotate` and the angles, by torch."""

import torch
from torch import Tensor


def rotation(position_ids: Tensor, frequencies: Tensor, scale: float) -> Tensor:
    """See `convai_fast.ops.rotate.rotation`; `frequencies` is float32 [head_dim / 2]."""
    angles = position_ids[:, None].float() * frequencies
    return torch.stack([angles.cos(), angles.sin()]) * scale


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """See `convai_fast.ops.rotate`."""
    cos, sin = cosines[:, None], sines[:, None]
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
