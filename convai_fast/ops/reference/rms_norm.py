"""`rms_norm` and its gradients, by torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `convai_fast.ops.rms_norm`."""
    if not eps >= 0:
        raise ValueError(f"rms_norm: eps must not be below 0, and is {eps}")
    kind = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(kind), weight.shape, weight.to(kind), eps).to(dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and `weight`, in their dtypes.

    With y = w x / r and r^2 = mean(x^2) + eps, they are (w g - x mean(w g x) / r^2) / r and the sum
    of g x / r.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    v, g = x.to(kind), grad.to(kind)
    scale = (v.square().mean(-1, keepdim=True) + eps).rsqrt()
    weighted = g * weight.to(kind)
    for_x = (weighted - v * scale**2 * (weighted * v).mean(-1, keepdim=True)) * scale
    for_weight = (g * v * scale).flatten(0, -2).sum(0)
    return for_x.to(x.dtype), for_weight.to(weight.dtype)
