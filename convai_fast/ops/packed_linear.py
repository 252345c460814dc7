"""`packed_linear`: a linear layer on a CPU, its weight packed as float32, bfloat16 or int8."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

PANEL = 16  # columns that lie side by side: of packed weights, and of the keys in a cache

library.impl("packed_linear", reference.packed_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::packed_linear")
def _fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    gelu: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class PackedWeight(NamedTuple):
    """A weight [out_features, in_features] as `packed_linear` reads it.

    Attributes:
        data: float32 or bfloat16 [panels, in_features, 16], 16 output features a panel, padded with
            0; or int8 [panels, ceil(in_features / 2), 16, 2].
        scales: float32 [out_features], what one step of int8 is worth; None for the others.
        out_features: their number, without padding.
    """

    data: Tensor
    scales: Tensor | None
    out_features: int


def pack_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Pack `weight`, float32 [out_features, in_features], to float32, bfloat16 or int8.

    bfloat16 rounds to nearest. int8 rounds each output feature to multiples of 1/127 of its largest
    weight, so that an error is at most 0.4 % of that.
    """
    out_features, in_features = weight.shape
    weight = F.pad(weight.detach().float(), (0, 0, 0, -out_features % PANEL))
    if dtype != torch.int8:
        panels = weight.to(dtype).view(-1, PANEL, in_features)
        return PackedWeight(panels.transpose(1, 2).contiguous(), None, out_features)
    scales = weight.abs().amax(dim=1) / 127
    steps = (weight / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    pairs = (
        F.pad(steps, (0, in_features % 2)).to(torch.int8).view(-1, PANEL, (in_features + 1) // 2, 2)
    )
    return PackedWeight(
        pairs.transpose(1, 2).contiguous(), scales[:out_features].contiguous(), out_features
    )


def packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """`x W^T + bias` in float32, [..., out_features], for contiguous x float32 [..., in_features].

    With `gelu`, its GELU in the tanh approximation (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    The compiled operator sums each element in the order of the input features, whatever the number
    of rows: a row's result does not depend on the rows beside it. With int8 weights a row of `x` is
    rounded to int16, as finely as int32 sums of its products allow.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.
    """
    return torch.ops.convai_fast.packed_linear(
        x, weight.data, weight.scales, bias, weight.out_features, gelu
    )
