"""Rotary positions (RoPE): queries and keys are turned by angles that grow with the position.

What a query and a key make together then depends on their distance alone. Source: Su et al.,
"RoFormer" (arXiv 2104.09864), with a head's halves paired as in Llama's weights for transformers.
"""

import torch
from torch import Tensor


def rotation(position_ids: Tensor, head_dim: int, theta: float) -> Tensor:
    """float32 [2, ..., 1, head_dim / 2] for positions [...]: cosines and sines, for any head."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device) / head_dim
    angles = position_ids[..., None, None] / theta**exponents
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`x` [..., heads, head_dim] turned by what `rotation` gave for its positions."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
