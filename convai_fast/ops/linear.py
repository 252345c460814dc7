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
for _key in ("CUDA", "AutogradCUDA"):  # torch's own, and its gradient
    library.impl("linear", lambda x, weight, bias, _: F.linear(x, weight, bias), _key)


@torch.library.register_fake("convai_fast::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, in_float32: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("convai_fast::linear_backward")
def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, in_float32: bool, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    shapes = (x, weight, weight[:, 0])
    return tuple(
        like.new_empty(like.shape) if is_wanted else None
        for like, is_wanted in zip(shapes, wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.in_float32 = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.convai_fast.linear_backward(
        grad, *ctx.saved_tensors, ctx.in_float32, wanted
    )
    return *gradients, None


torch.library.register_autograd("convai_fast::linear", _backward, setup_context=_setup_context)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`, [..., out_features] in the dtype of `x`; differentiable.

    `weight` and `bias` are rounded to the dtype of `x`, products are summed in float32, and the
    gradients of `weight` and `bias` are never rounded to it: a bfloat16 copy of a float32 weight,
    and of its gradient, is neither made nor kept. So it stands for `F.linear` under autocast.

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
