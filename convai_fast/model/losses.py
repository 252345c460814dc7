"""What a batch's labels ask of the tokens before them, and the mean loss over what is labelled."""

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.dialogue.format import IGNORED
from convai_fast.model.layers import to_device


def targets_of(
    labels: Tensor, positions: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The labels that count, and the tokens that predict them: each the one before its own.

    In the shared-prefix layout, too, the token before a labelled one is of its own branch, whose
    first is never labelled.
    """
    if positions is None:
        shifted = F.pad(labels[..., 1:], (1, 0), value=IGNORED)  # nothing predicts a row's first
        positions = (shifted.flatten() != IGNORED).nonzero().squeeze(1)
    targets = labels.flatten().index_select(0, to_device(positions, labels.device))
    return to_device(targets, device), to_device(positions - 1, device)


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """In float32, over the targets that are not ignored; 0, not NaN, where there are none."""
    targets = targets.flatten()
    logits = logits.reshape(len(targets), logits.shape[-1]).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)
