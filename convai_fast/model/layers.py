"""Layers of PyTorch, with what a CPU computes faster in another way."""

import torch
from torch import Tensor, nn

from convai_fast import ops


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
    """`convai_fast.ops.linear`, which under autocast computes in its dtype."""
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if is_cast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return ops.linear(x, weight, bias)


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
