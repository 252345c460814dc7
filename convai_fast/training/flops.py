"""How much of what a device can multiply a training step uses: model-flops utilisation."""

import time

import torch

from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import cpu_multiplies_bf16


def training_flops(model: DoubleHeadsModel, num_tokens: int, num_labels: int) -> float:
    """Floating-point operations of the matrix products that a training step cannot do without.

    6 a token and parameter of the linear layers, 2 for the forward and 4 for the backward pass, and
    6 a labelled token and parameter of the language-model head; attention is left out. In the
    shared-prefix layout `num_tokens` counts what the candidates of an example share once.

    Source: Kaplan et al., "Scaling Laws for Neural Language Models" (arXiv 2001.08361, 2.1).
    """
    body = sum(p.numel() for p in model.transformer.blocks.parameters() if p.dim() == 2)
    head = model.transformer.token_embedding.weight.numel()
    return 6.0 * (body * num_tokens + head * num_labels)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on `device`, measured.

    `dtype` is what autocast computes in; see `convai_fast.model.layers.linear`.
    """
    if device.type == "cpu" and not cpu_multiplies_bf16():
        dtype = torch.float32
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)
