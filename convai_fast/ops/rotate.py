"""`rotate`: rotary positions (RoPE), by angles that grow with the position.

What a query and a key make together then depends on their distance alone. Source: Su et al.,
"RoFormer" (arXiv 2104.09864), with a head's halves paired as in Llama's weights for transformers.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("rotate", reference.rotate, "CompositeExplicitAutograd")
for _key in ("CUDA", "AutogradCUDA"):  # torch's own, and its gradient
    library.impl("rotate", reference.rotate, _key)


@torch.library.register_fake("convai_fast::rotate")
def _fake(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    cosines, sines = ctx.saved_tensors
    return torch.ops.convai_fast.rotate(grad, cosines, -sines), None, None


torch.library.register_autograd("convai_fast::rotate", _backward, setup_context=_setup_context)


@lru_cache(maxsize=16)
def _on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [head_dim / 2], made once: a graph of CUDA's cannot be given them by the host."""
    return torch.tensor(frequencies, device=device)


def rotation(position_ids: Tensor, frequencies: tuple[float, ...], scale: float = 1.0) -> Tensor:
    """float32 [2, tokens, head_dim / 2]: cosines and sines for positions [tokens].

    Angles are products in float32, as transformers makes them. `scale` is that of YaRN (arXiv
    2309.00071).
    """
    device = position_ids.device
    # A compiler has no use for the cache.
    is_compiled = torch.compiler.is_compiling()
    there = (
        torch.tensor(frequencies, device=device) if is_compiled else _on_device(frequencies, device)
    )
    return reference.rotation(position_ids, there, scale)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the heads of tokens by the angles of their positions; differentiable.

    Args:
        x: [tokens, heads, head_dim], computed in float32 if its numbers have fewer bits.
        rotation: what `rotation` gives for their positions.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError or RuntimeError: shapes do not fit.
    """
    cosines, sines = rotation
    return torch.ops.convai_fast.rotate(x, cosines, sines)
