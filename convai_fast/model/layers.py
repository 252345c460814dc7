"""Layers of PyTorch, with what a CPU computes faster in another way."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convai_fast import ops
from convai_fast.hardware import cpu_multiplies_bf16

_CPU_MULTIPLIES_BF16 = cpu_multiplies_bf16()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without the host waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from other memory may make it wait
    return tensor.to(device, non_blocking=True)


def fetch(*tensors: Tensor) -> list[Tensor]:
    """`tensors` of one device on the CPU, after a single wait for it."""
    if tensors[0].device.type != "cuda":
        return [x.cpu() for x in tensors]
    targets = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for target, x in zip(targets, tensors, strict=True):
        target.copy_(x, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return targets


class Dropout(nn.Dropout):
    """Inverted dropout by `convai_fast.ops.dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, in its dtype."""
        if not self.training or self.p == 0:
            return x
        return ops.dropout(x, self.p, ops.draw_seed())


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x.to(torch.bfloat16), weight)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
