"""How much of what a device can multiply a training step uses: model-flops utilisation."""

import time

import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.model.double_heads import DoubleHeadsModel


class FlopsCounter:
    """Floating-point operations of the matrix products that a training step cannot do without.

    6 a token and parameter of the linear layers, 2 for the forward and 4 for the backward pass (2
    where the layer is not trained), and likewise for a labelled token and the language-model head;
    attention is left out. In the shared-prefix layout what candidates share counts once.

    Source: Kaplan et al., "Scaling Laws for Neural Language Models" (arXiv 2001.08361, 2.1).
    """

    def __init__(self, model: DoubleHeadsModel) -> None:
        def flops(parameter: Tensor) -> float:
            return (6.0 if parameter.requires_grad else 4.0) * parameter.numel()

        blocks = model.transformer.blocks.parameters()
        self.per_token = sum(flops(parameter) for parameter in blocks if parameter.dim() == 2)
        self.per_label = flops(model.lm_head_weight)

    def count(self, num_tokens: int, num_labels: int) -> float:
        """Of a step over `num_tokens` tokens, `num_labels` of which are labelled."""
        return self.per_token * num_tokens + self.per_label * num_labels


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on `device`, measured.

    `dtype` is what autocast computes in, and the product `convai_fast.ops.linear`.
    """
    size = 1024 if device.type == "cpu" else 8192
    x = torch.randn(size, size, device=device, dtype=dtype)
    weight = torch.randn(size, size, device=device, dtype=x.dtype if x.is_cuda else torch.float32)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        product = ops.linear(x, weight)
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)
