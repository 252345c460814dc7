"""`swiglu`: the middle of a gated MLP, in one pass each way."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("swiglu", reference.swiglu, "CompositeExplicitAutograd")
library.impl("swiglu_backward", reference.swiglu_backward, "CompositeExplicitAutograd")
for _key in ("CUDA", "AutogradCUDA"):  # torch's own, and its gradient
    library.impl("swiglu", reference.swiglu, _key)


@torch.library.register_fake("convai_fast::swiglu")
def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("convai_fast::swiglu_backward")
def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.convai_fast.swiglu_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("convai_fast::swiglu", _backward, setup_context=_setup_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`; differentiable.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).

    Args:
        gate, up: of one shape and dtype; computed in float32 if they are bfloat16.

    Returns:
        Their shape and dtype.

    Raises:
        ValueError or TypeError: shapes or dtypes differ.
    """
    return torch.ops.convai_fast.swiglu(gate, up)
