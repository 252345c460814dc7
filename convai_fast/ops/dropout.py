"""`dropout`: elements set to 0 at random, by a seed that alone is kept for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.ops.schemas import library


def _by_torch(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """torch's generator draws, in a few passes over `x`: `reference.dropout` takes a hundred."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    kept.bernoulli_(1 - p, generator=generator)
    return torch.where(kept, x.contiguous() * (1 / (1 - p)), 0)


library.impl("dropout", _by_torch, "CompositeExplicitAutograd")
for _key in ("CUDA", "AutogradCUDA"):  # torch's own kernel, which draws whatever the seed
    library.impl("dropout", lambda x, p, seed: F.dropout(x, p), _key)


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


def draw_seed() -> Tensor:
    """A seed for a dropout mask, int64 [] on the CPU, from torch's default generator.

    Not an operator of ours, of which compiled graphs take two calls that look alike for one, and
    nothing in place, which would end a graph.
    """
    return torch.randint(2**63 - 1, ())


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`x` with a share `p` of its elements set to 0 and the others scaled by 1 / (1 - p).

    Which ones, depends on `seed` and an element's number in `x` alone: with the compiled operator
    as `reference.dropout` says, elsewhere as torch's generator on the device of `x` draws; on CUDA
    torch's own dropout draws, whatever the seed. Differentiable; on a CPU nothing but the seed is
    kept for the backward pass.

    Args:
        x: any shape, floating-point numbers.
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
