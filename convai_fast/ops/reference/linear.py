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
    grad: Tensor, x: Tensor, weight: Tensor, in_float32: bool, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, those that are wanted, each in its dtype."""
    dtype = torch.float32 if in_float32 else x.dtype
    rows, x_rows = grad.flatten(0, -2).to(dtype), x.flatten(0, -2).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    return (
        (rows @ weight.to(dtype)).to(x.dtype).view_as(x) if wanted[0] else None,
        (rows.to(exact).T @ x_rows.to(exact)).to(weight.dtype) if wanted[1] else None,
        rows.sum(0, dtype=exact).to(weight.dtype) if wanted[2] else None,
    )
