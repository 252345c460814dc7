"""`gelu` and its gradient, by torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """See `convai_fast.ops.gelu`."""
    return F.gelu(x, approximate="tanh")


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, in its dtype."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
