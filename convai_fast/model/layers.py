"""Layers of PyTorch, with what a CPU computes faster in another way."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convai_fast import ops

_ALIGNMENT = 64  # rows of a vocabulary's product on a GPU


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without the host waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from other memory may make it wait
    return tensor.to(device, non_blocking=True)


def fetch_later(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """A function that waits until the device has computed `tensors`, but for nothing after them.

    They are of one device; it gives them on the CPU.
    """
    if not tensors or tensors[0].device.type != "cuda":
        fetched = [x.cpu() for x in tensors]
        return lambda: fetched
    targets = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for target, x in zip(targets, tensors, strict=True):
        target.copy_(x, non_blocking=True)
    copied = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait() -> list[Tensor]:
        copied.synchronize()
        return targets

    return wait


def fetch(*tensors: Tensor) -> list[Tensor]:
    """`tensors` of one device on the CPU, after a single wait for it."""
    return fetch_later(*tensors)()


class Dropout(nn.Dropout):
    """Inverted dropout by `convai_fast.ops.dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, in its dtype."""
        if not self.training or self.p == 0:
            return x
        return ops.dropout(x, self.p, ops.draw_seed())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`convai_fast.ops.linear`, which under autocast computes in its dtype."""
    return ops.linear(x.to(_product_dtype(x)), weight, bias)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in, under autocast or without."""
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast and x.dtype != torch.float64 else x.dtype


def vocabulary_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """`linear(hidden, weight)`, [..., vocab_size], by a weight that is padded where that is faster.

    In 16 bits cuBLAS has its fast kernels for rows that begin at multiples of 16 bytes.
    """
    dtype = _product_dtype(hidden)
    if not pads_vocabulary(hidden.device.type, dtype):
        return linear(hidden, weight)
    return linear(hidden, pad_vocabulary(weight, dtype))[..., : len(weight)]


def vocabulary_head(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes logits [..., vocab_size] of hidden states in the dtype of `weight`, which is
    padded once where that is faster."""
    if not pads_vocabulary(weight.device.type, weight.dtype):
        return partial(F.linear, weight=weight)
    padded, vocab_size = pad_vocabulary(weight, weight.dtype), len(weight)
    return lambda hidden: F.linear(hidden, padded)[..., :vocab_size]


def pads_vocabulary(device: str, dtype: torch.dtype) -> bool:
    """Whether a product in `dtype` on that kind of device is faster with a padded vocabulary."""
    return device == "cuda" and dtype in (torch.bfloat16, torch.float16)


def pad_vocabulary(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` [vocab_size, n_embd] in `dtype`, with rows of zeros up to a multiple of 64."""
    return F.pad(weight.to(dtype), (0, 0, 0, -len(weight) % _ALIGNMENT))


class RMSNorm(nn.RMSNorm):
    """RMSNorm by `convai_fast.ops.rms_norm`.

    Args:
        feeds_products: whether only products read what comes out, which then has the dtype that
            they are computed in.
    """

    def __init__(self, size: int, eps: float, feeds_products: bool = False) -> None:
        super().__init__(size, eps=eps)
        self.feeds_products = feeds_products

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same."""
        assert self.eps is not None
        dtype = _product_dtype(x) if self.feeds_products else x.dtype
        return ops.rms_norm(x, self.weight, self.eps, dtype)


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


class NothingIsDrawn(TorchFunctionMode):
    """A context in which the weights of new modules are left as their memory is.

    To draw them on the device "meta", torch would import its compiler, which takes a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_):
            return kwargs and kwargs["tensor"]
        if func is Tensor.normal_:
            return args[0]
        return func(*args, **(kwargs or {}))
