"""`swiglu` and its gradients, by torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `convai_fast.ops.swiglu`."""
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both, in their dtype."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
