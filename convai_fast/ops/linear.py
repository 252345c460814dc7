"""`linear`: a linear layer whose weight changes from step to step, as in training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.hardware import cpu_multiplies_bf16
from convai_fast.ops import reference
from convai_fast.ops.schemas import library

_CPU_MULTIPLIES_BF16 = cpu_multiplies_bf16()

library.impl("linear", reference.linear, "CompositeExplicitAutograd")
library.impl("linear_backward", reference.linear_backward, "CompositeExplicitAutograd")


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, in_float32: bool) -> Tensor:
    """torch's own, and its gradient; under autocast, which casts a weight once for many calls."""
    if not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


for _key in ("CUDA", "AutogradCUDA"):
    library.impl("linear", _by_torch, _key)


@torch.library.register_fake("convai_fast::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, in_float32: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("convai_fast::linear_backward")
def _fake_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, in_float32: bool, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    out_features, in_features = weight.shape
    return (
        grad.new_empty(*grad.shape[:-1], in_features) if wanted[0] else None,
        weight.new_empty(weight.shape) if wanted[1] else None,
        weight.new_empty(out_features) if wanted[2] else None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.in_float32 = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.convai_fast.linear_backward(
        grad, *ctx.saved_tensors, ctx.in_float32, wanted
    )
    return *gradients, None


torch.library.register_autograd("convai_fast::linear", _backward, setup_context=_setup_context)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`, [..., out_features] in the dtype of `x`; differentiable.

    `weight` and `bias` are rounded to the dtype of `x` and products summed in float32, as by
    `F.linear` under autocast. But on a CPU the gradients of `weight` and `bias` are never rounded
    to it, and the compiled operator neither makes nor keeps a bfloat16 copy of a float32 weight or
    of its gradient.

    On a CPU that multiplies bfloat16 no faster than float32, bfloat16 is multiplied in float32,
    with the weight as it is.

    Args:
        x: [..., in_features], floating-point numbers.
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Raises:
        ValueError, RuntimeError: shapes do not fit each other.
    """
    in_float32 = x.dtype == torch.bfloat16 and not _CPU_MULTIPLIES_BF16
    return torch.ops.convai_fast.linear(x, weight, bias, in_float32)
