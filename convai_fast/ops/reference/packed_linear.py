"""`packed_linear`, over the panels of the weight."""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    gelu: bool,
) -> Tensor:
    """See `convai_fast.ops.packed_linear`."""
    if scales is None:
        out = _products(x, weight.float(), out_features)
    else:  # [panels, pairs, 16, 2] -> [panels, in_features, 16]
        weight = weight.transpose(2, 3).flatten(1, 2)[:, : x.shape[-1]]
        largest_step = min(32767, max(1, 2**31 // (127 * max(1, x.shape[-1])) - 1))
        x_scales = F.pad(x.abs(), (0, 1)).amax(-1, keepdim=True) / largest_step  # of none, 0
        steps = (x / x_scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
        sums = _products(steps.double(), weight.double(), out_features)  # exact: below 2**31
        out = sums.float() * (x_scales * scales)
    out = out if bias is None else out + bias
    return F.gelu(out, approximate="tanh") if gelu else out


def _products(x: Tensor, panels: Tensor, out_features: int) -> Tensor:
    """[..., in_features] by [panels, in_features, 16] to [..., out_features]."""
    products = torch.atleast_2d(x).flatten(0, -2) @ panels  # [panels, rows, 16]
    return products.transpose(0, 1).flatten(1)[:, :out_features].view(*x.shape[:-1], out_features)
