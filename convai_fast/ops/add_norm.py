"""`add_norm`: a residual connection and the norm that follows it, in one pass."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("add_norm", reference.add_norm, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::add_norm")
def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    rms_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """`x + residual`, and LayerNorm or RMSNorm of that. Without a gradient: for inference.

    Args:
        x, residual: [..., n_embd], float32, bfloat16 or float16; on CUDA n_embd <= 8192.
        weight, bias: [n_embd], of the same dtype.
        rms_norm: divide by the root of the mean square (Zhang and Sennrich 2019, arXiv 1910.07467),
            in place of Ba et al. 2016 (arXiv 1607.06450), who subtract the mean before.

    Returns:
        The sum, rounded to the dtype of x, and the norm of what it is then; statistics and all that
        follows are computed in float32. Both [..., n_embd], contiguous on CUDA.

    Raises:
        ValueError, TypeError: on CUDA, shapes, dtypes or devices do not fit.
    """
    return torch.ops.convai_fast.add_norm(x, residual, weight, bias, eps, rms_norm)
