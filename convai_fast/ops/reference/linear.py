"""`linear` and its gradient, in the dtype of `x` or in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, in_float32: bool) -> Tensor:
    """See `convai_fast.ops.linear`."""
    dtype = torch.float32 if in_float32 else x.dtype
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


def linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, in_float32: bool, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, those that are wanted, each in its dtype.

    Without the gradient of the weight, x may be None.
    """
    dtype = torch.float32 if in_float32 else grad.dtype
    exact = torch.promote_types(dtype, torch.float32)
    for_x = for_weight = for_bias = None
    with torch.autocast(grad.device.type, enabled=False):
        if wanted[0]:
            for_x = (grad.to(dtype) @ weight.to(dtype)).to(grad.dtype)
        if wanted[1]:
            assert x is not None
            rows, x_rows = torch.atleast_2d(grad.to(exact), x.to(exact))
            for_weight = (rows.flatten(0, -2).T @ x_rows.flatten(0, -2)).to(weight.dtype)
        if wanted[2]:
            rows = torch.atleast_2d(grad.to(exact)).flatten(0, -2)
            for_bias = rows.sum(0).to(weight.dtype)
    return for_x, for_weight, for_bias
