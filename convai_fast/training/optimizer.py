"""The optimizer and its learning rate."""

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices, not on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def lr_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """The share of the peak learning rate at optimizer step `step`, counted from 0.

    Rises linearly over `warmup_steps`, then falls linearly to 0 at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
