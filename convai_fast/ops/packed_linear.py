"""`packed_linear`: a linear layer on a CPU, its weight packed as float32, bfloat16 or int8."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

BLOCK = 64  # output features that lie side by side
TOGETHER = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # input features, innermost

library.impl("packed_linear", reference.packed_linear, "CompositeExplicitAutograd")
library.impl(
    "packed_linear_instructions", lambda weight: "plain PyTorch", "CompositeExplicitAutograd"
)


@torch.library.register_fake("convai_fast::packed_linear")
def _fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    column_sums: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    activation: str | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class PackedWeight(NamedTuple):
    """A weight [out_features, in_features] as `packed_linear` reads it.

    Attributes:
        data: [blocks, ceil(in_features / together), 64, together], 64 output features a block,
            padded with 0; together are 1 input feature of float32, 2 of bfloat16, 4 of int8.
        scales: float32 [out_features], what one step of int8 is worth; None for the others.
        column_sums: int32 [out_features], the sum of an output feature's int8; None for the others.
        out_features: their number, without padding.
    """

    data: Tensor
    scales: Tensor | None
    column_sums: Tensor | None
    out_features: int


def packed_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """The size of `PackedWeight.data` for a weight of this shape."""
    out_features, in_features = (
        -(-n // m) * m for n, m in zip(shape, (BLOCK, TOGETHER[dtype]), strict=True)
    )
    return out_features * in_features * dtype.itemsize


def pack_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Pack `weight`, float32 [out_features, in_features], to float32, bfloat16 or int8.

    bfloat16 rounds to nearest. int8 rounds each output feature to multiples of 1/127 of its largest
    weight, so that an error is at most 0.4 % of that.
    """
    out_features, in_features = weight.shape
    weight = weight.detach().float()
    scales = column_sums = None
    if dtype == torch.int8:
        scales = F.pad(weight.abs(), (0, 1)).amax(dim=1) / 127  # of none, 0
        weight = (weight / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
        column_sums = weight.sum(dim=1, dtype=torch.float64).int()
    together = TOGETHER[dtype]
    padded = F.pad(weight.to(dtype), (0, -in_features % together, 0, -out_features % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // together, together)
    return PackedWeight(blocks.transpose(1, 2).contiguous(), scales, column_sums, out_features)


def packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`x W^T + bias` in float32, [..., out_features], for contiguous x float32 [..., in_features].

    With `activation`, what that makes of it: "gelu_new" (GELU in the tanh approximation; Hendrycks
    and Gimpel 2016, arXiv 1606.08415), "gelu", "relu" or "silu".

    `x` is rounded to the format of the weight, and the products are summed in float32: for int8
    weights, a row of `x` to 256 steps between its least and its largest value (or 0), and the
    products in int32, exactly.

    The compiled operator sums each element in one order, whatever the number of rows: a row's
    result does not depend on the rows beside it.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit, or int8 weights have more than 65,793
            input features, whose sums int32 does not hold.
    """
    return torch.ops.convai_fast.packed_linear(
        x, weight.data, weight.scales, weight.column_sums, bias, weight.out_features, activation
    )


def product_instructions(dtype: torch.dtype) -> str:
    """What `packed_linear` multiplies in on this CPU, such as "AVX512-BF16 by oneDNN".

    Args:
        dtype: of the weight: float32, bfloat16 or int8.
    """
    return torch.ops.convai_fast.packed_linear_instructions(torch.empty(0, dtype=dtype))
