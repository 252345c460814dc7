"""`rms_norm`: a row over its root mean square, in one pass each way."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("rms_norm", reference.rms_norm, "CompositeExplicitAutograd")
library.impl("rms_norm_backward", reference.rms_norm_backward, "CompositeExplicitAutograd")
for _key in ("CUDA", "AutogradCUDA"):  # torch's own, and its gradient
    library.impl("rms_norm", reference.rms_norm, _key)


@torch.library.register_fake("convai_fast::rms_norm")
def _fake(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("convai_fast::rms_norm_backward")
def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, float, torch.dtype], output: Tensor
) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, weight = ctx.saved_tensors
    return *torch.ops.convai_fast.rms_norm_backward(grad, x, weight, ctx.eps), None, None


torch.library.register_autograd("convai_fast::rms_norm", _backward, setup_context=_setup_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, over the last dimension; differentiable.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).

    Args:
        x: [..., size], floating-point numbers; computed in float32 if they have fewer bits.
        weight: [size].
        dtype: of what comes out; by default that of `x`.

    Returns:
        [..., size].

    Raises:
        ValueError or RuntimeError: `weight` does not fit, or `eps` is below 0.
    """
    return torch.ops.convai_fast.rms_norm(x, weight, eps, dtype or x.dtype)
