"""`add_norm`, by an addition and torch's own norms."""

import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms_norm: bool,
) -> tuple[Tensor, Tensor]:
    """See `convai_fast.ops.add_norm`."""
    total = x + residual
    if rms_norm:
        normed = F.rms_norm(total, weight.shape, weight, eps)
        return total, normed if bias is None else normed + bias
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)
