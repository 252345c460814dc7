"""`packed_linear`, over the blocks of the weight."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.ops.reference.gelu import gelu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": gelu,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    column_sums: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    activation: str | None,
) -> Tensor:
    """See `convai_fast.ops.packed_linear`."""
    if scales is None or column_sums is None:
        out = _products(x.to(weight.dtype).float(), weight, out_features)
    else:
        steps, x_scales, zeros = _to_steps(x)
        sums = _products(steps.double(), weight, out_features)  # exact: below 2**31
        out = (sums - zeros * column_sums.double()).float() * (x_scales * scales)
    out = out if bias is None else out + bias
    return out if activation is None else ACTIVATIONS[activation](out)


def _to_steps(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x` = (steps - zeros) * scales with steps from 0 to 255, a scale and a zero for each row.

    >>> _to_steps(torch.tensor([[-1.0, 0.0, 4.1]]))
    (tensor([[  0.,  50., 255.]]), tensor([[0.0200]]), tensor([[50.]]))
    """
    low = F.pad(x, (0, 1)).amin(-1, keepdim=True)  # 0 is always among the values
    high = F.pad(x, (0, 1)).amax(-1, keepdim=True)
    scales = high / 255 - low / 255
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0, scales)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    zeros = (-low * inverse).round()
    steps = ((x * inverse).round() + zeros).clamp(0, 255)
    return steps.nan_to_num(0), scales, zeros.nan_to_num(0)


def _products(x: Tensor, weight: Tensor, out_features: int) -> Tensor:
    """[..., in_features] by a packed weight to [..., out_features], in the dtype of `x`."""
    blocks = weight.transpose(2, 3).to(x.dtype, memory_format=torch.contiguous_format)
    blocks = blocks.flatten(1, 2)[:, : x.shape[-1]]  # [blocks, in_features, 64]
    products = torch.atleast_2d(x).flatten(0, -2) @ blocks  # [blocks, rows, 64]
    return products.transpose(0, 1).flatten(1)[:, :out_features].view(*x.shape[:-1], out_features)
