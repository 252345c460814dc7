"""Layers of PyTorch, with what a CPU computes faster in another way."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convai_fast import _native, ops
from convai_fast.hardware import cpu_multiplies_bf16

_CPU_MULTIPLIES_BF16 = cpu_multiplies_bf16()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without the host waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from other memory may make it wait
    return tensor.to(device, non_blocking=True)


def draw_seed() -> Tensor:
    """A seed for a dropout mask, int64, 0-d on the CPU, from torch's default generator."""
    return torch.empty((), dtype=torch.int64).random_()


def has_kernel(x: Tensor) -> bool:
    """Whether the compiled operators for training take `x`; else PyTorch's own are used."""
    on_cpu, dtypes = x.device.type == "cpu", (torch.float32, torch.bfloat16)
    return on_cpu and _native.host is not None and x.dtype in dtypes


class Dropout(nn.Dropout):
    """Inverted dropout: `convai_fast.ops.dropout` where compiled, torch's own elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, in its dtype."""
        if not self.training or self.p == 0:
            return x
        if has_kernel(x):
            return ops.dropout(x, self.p, draw_seed())
        return F.dropout(x, self.p)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, which under bfloat16 autocast multiplies as fast as this CPU can.

    Where a CPU multiplies bfloat16 more slowly than float32, autocast would cost time. There this
    keeps bfloat16 for the backward pass, which saves the memory that autocast saves, and multiplies
    in float32 with the weight as it is: no weight is rounded or cast.
    """
    if _keeps_float32(x, weight):
        return _Float32Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _keeps_float32(x: Tensor, weight: Tensor) -> bool:
    return (
        not _CPU_MULTIPLIES_BF16
        and x.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class Linear(nn.Linear):
    """A linear layer through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(x, self.weight, self.bias)


def init_weights(module: nn.Module, std: float) -> None:
    """Draw a Linear's or Embedding's weight from normal(0, std) and set its bias, if any, to 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class _Float32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN001
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x.to(torch.bfloat16), weight)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        # A compiled backward pass is traced under the forward pass's autocast.
        with torch.autocast("cpu", enabled=False):
            return (
                (rows @ weight).view_as(x) if for_x else None,
                rows.T @ x.flatten(0, -2).float() if for_weight else None,
                rows.sum(0) if for_bias else None,
            )
