"""Notices a loss or a gradient that is no number, without waiting for the device."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from convai_fast.data.batches import Batch, tensors_of
from convai_fast.model.layers import fetch


@dataclass(frozen=True)
class BadStep:
    """The first optimizer step whose loss or gradient was not finite.

    Attributes:
        step: its number, from 1.
        losses: for each of its batches: loss, language-model loss, multiple-choice loss.
        grad_norm: the norm of the gradient before clipping.
    """

    step: int
    losses: list[list[float]]
    grad_norm: float

    @property
    def culprits(self) -> list[int]:
        """Which of its batches have a loss that is not finite; all if it is the gradient alone."""
        bad = [i for i, parts in enumerate(self.losses) if not all(map(math.isfinite, parts))]
        return bad or list(range(len(self.losses)))

    def __str__(self) -> str:
        values = [value for parts in self.losses for value in parts if not math.isfinite(value)]
        what = f"loss at step {self.step:,} is {values[0]}" if values else ""
        return what or f"gradient at step {self.step:,} has the norm {self.grad_norm}"


class FiniteGuard:
    """Keeps on the device what there is to know about the first bad step, until it is read."""

    def __init__(self, device: torch.device, max_batches: int, check_gradient: bool) -> None:
        """Watch steps of up to `max_batches` batches.

        `check_gradient` is False where a gradient that overflows is part of the method: fp16, whose
        scaler skips that step and tries a smaller scale.
        """
        self.check_gradient = check_gradient
        self._step = torch.zeros((), dtype=torch.int64, device=device)  # 0: none so far
        self._num_batches = torch.zeros((), dtype=torch.int64, device=device)
        self._losses = torch.zeros(max_batches, 3, device=device)
        self._grad_norm = torch.zeros((), device=device)

    def check(self, step: int, losses: Tensor, grad_norm: Tensor) -> Tensor:
        """Look at step number `step`; returns 1 if it must be skipped, else 0.

        Args:
            losses: float32 [batches, 3], see `BadStep`.
            grad_norm: float32 scalar.

        Returns:
            a float32 scalar on the device, as AdamW's `found_inf` wants it.
        """
        bad = ~losses.isfinite().all()
        if self.check_gradient:
            bad |= ~grad_norm.isfinite()
        first, count = bad & (self._step == 0), len(losses)
        self._losses[:count] = torch.where(first, losses, self._losses[:count])
        self._grad_norm = torch.where(first, grad_norm, self._grad_norm)
        self._num_batches = torch.where(first, count, self._num_batches)
        self._step = torch.where(first, step, self._step)
        return bad.float()

    def read(self) -> BadStep | None:
        """The first bad step, if there was one; waits for the device once."""
        what = (self._step, self._num_batches, self._losses, self._grad_norm)
        step, num_batches, losses, grad_norm = fetch(*what)
        if step == 0:
            return None
        return BadStep(int(step), losses[: int(num_batches)].tolist(), grad_norm.item())


def describe_batch(
    index: int, batch: Batch, losses: list[float], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Batch `index` of its epoch and its losses (see `BadStep`), as ids and as text, for a file."""
    if "offsets" in batch:
        rows = batch["input_ids"].tensor_split(batch["offsets"][1:-1])
    else:
        rows = batch["input_ids"].flatten(0, -2).unbind()
    return {
        "batch": index,
        **dict(zip(("loss", "lm_loss", "mc_loss"), losses, strict=True)),
        "text": tokenizer.batch_decode([row.tolist() for row in rows]),
        **{name: tensor.tolist() for name, tensor in tensors_of(batch)},
    }
