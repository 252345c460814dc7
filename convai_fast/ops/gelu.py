"""`gelu`: the activation of OpenAI GPT and GPT-2, in one pass each way."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("gelu", reference.gelu, "CompositeExplicitAutograd")
library.impl("gelu_backward", reference.gelu_backward, "CompositeExplicitAutograd")
for _key in ("CUDA", "AutogradCUDA"):  # torch's own, and its gradient
    library.impl("gelu", lambda x: F.gelu(x, approximate="tanh"), _key)


@torch.library.register_fake("convai_fast::gelu")
def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("convai_fast::gelu_backward")
def _fake_backward(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.convai_fast.gelu_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("convai_fast::gelu", _backward, setup_context=_setup_context)


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation, which transformers calls `gelu_new`; differentiable.

    Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415).

    Args:
        x: any shape, floating-point numbers; computed in float32 if they are bfloat16.

    Returns:
        The shape and dtype of `x`.
    """
    return torch.ops.convai_fast.gelu(x)


ACTIVATIONS = {**reference.ACTIVATIONS, "gelu_new": gelu}  # of an MLP, by their names in configs
