"""`dropout`: elements set to 0 at random, by a seed that alone is kept for the backward pass."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("dropout", reference.dropout, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::dropout")
def _fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.convai_fast.dropout(grad, ctx.p, *ctx.saved_tensors), None, None


torch.library.register_autograd("convai_fast::dropout", _backward, setup_context=_setup_context)


def check_probability(name: str, p: float) -> None:
    """Raise ValueError unless `p` is at least 0 and less than 1."""
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, not {p}")


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`x` with a share `p` of its elements set to 0 and the others scaled by 1 / (1 - p).

    Which ones, depends on `seed` and an element's number in `x` alone: the same on every device.
    Differentiable; nothing but the seed is kept for the backward pass.

    Args:
        x: any shape; on a CPU float32 or bfloat16.
        p: at least 0 and less than 1.
        seed: int64 [] on the CPU. Calls that are to be independent take different seeds.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError, TypeError: `p` or a dtype is not as above.

    Source: Srivastava et al. 2014 (JMLR 15); random bits by Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3" (SC 2011).
    """
    check_probability("dropout: p", p)
    return torch.ops.convai_fast.dropout(x, p, seed)
