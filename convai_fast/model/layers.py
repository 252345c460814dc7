"""Layers of PyTorch, with what a CPU computes faster in another way."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convai_fast import ops


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones.

    So do those with AMX, and AMD's with AVX512-BF16; on Intel's, that instruction takes as long as
    the float32 products that it replaces, and longer.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8")


_CPU_MULTIPLIES_BF16 = cpu_multiplies_bf16()


def draw_seed() -> Tensor:
    """A seed for a dropout mask, int64, 0-d on the CPU, from torch's default generator."""
    return torch.empty((), dtype=torch.int64).random_()


class Dropout(nn.Dropout):
    """Inverted dropout: `convai_fast.ops.dropout` on the CPU, and torch's own elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, in its dtype."""
        if not self.training or self.p == 0:
            return x
        if x.device.type == "cpu":
            return ops.dropout(x, self.p, draw_seed())
        return F.dropout(x, self.p)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, which under bfloat16 autocast multiplies as fast as this CPU can.

    Where a CPU multiplies bfloat16 more slowly than float32, autocast would cost time. There this
    keeps bfloat16 for the backward pass, which saves the memory that autocast saves, and multiplies
    in float32 with the weight as it is: no weight is rounded or cast.
    """
    on_cpu = x.device.type == "cpu"
    if on_cpu and not _CPU_MULTIPLIES_BF16 and torch.is_autocast_enabled("cpu"):
        return _Float32Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(x, self.weight, self.bias)


class _Float32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(x.to(torch.bfloat16), weight)
        ctx.has_bias = bias is not None
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        weight_grad = rows.T @ x.flatten(0, -2).float() if ctx.needs_input_grad[1] else None
        bias_grad = rows.sum(0) if ctx.has_bias else None
        return (rows @ weight).view_as(x), weight_grad, bias_grad
