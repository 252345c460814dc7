"""Rotary positions (RoPE): queries and keys are turned by angles that grow with the position.

What a query and a key make together then depends on their distance alone. Source: Su et al.,
"RoFormer" (arXiv 2104.09864), with a head's halves paired as in Llama's weights for transformers.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def _on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [head_dim / 2], made once: a graph of CUDA's cannot be given them by the host."""
    return torch.tensor(frequencies, device=device)


def rotation(position_ids: Tensor, frequencies: tuple[float, ...], scale: float = 1.0) -> Tensor:
    """float32 [2, ..., 1, head_dim / 2] for positions [...]: cosines and sines, for any head.

    Angles are products in float32, as transformers makes them. `scale` is that of YaRN (arXiv
    2309.00071).
    """
    device = position_ids.device
    # A compiler has no use for the cache.
    is_compiled = torch.compiler.is_compiling()
    there = (
        torch.tensor(frequencies, device=device) if is_compiled else _on_device(frequencies, device)
    )
    angles = position_ids[..., None, None].float() * there
    return torch.stack([angles.cos(), angles.sin()]) * scale


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`x` [..., heads, head_dim] turned by what `rotation` gave for its positions."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
