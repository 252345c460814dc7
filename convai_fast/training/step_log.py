"""What is logged of optimizer steps."""

from typing import Any

import torch
from torch import Tensor

from convai_fast.model.layers import fetch
from convai_fast.training.distributed import Ranks


class StepLog:
    """Sums of the steps since the last record, kept on the device until somebody reads them."""

    def __init__(self, device: torch.device, matrix_rate: float) -> None:
        """`matrix_rate`: floating-point operations a second that the device can do, for `mfu`."""
        self.losses = torch.zeros(3, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.steps, self.lr = 0, 0.0
        self.matrix_rate = matrix_rate
        self.tokens, self.flops, self.seconds = 0, 0.0, 0.0  # of this process
        self._read = (0, 0.0, 0.0)

    @property
    def mfu(self) -> float:
        """Model-flops utilisation of this process so far: 1 if nothing but products took time."""
        return self.flops / self.matrix_rate / max(self.seconds, 1e-9)

    def end_step(
        self, losses: Tensor, num_tokens: int, flops: float, grad_norm: Tensor, lr: float
    ) -> None:
        """Count a step that was taken with the learning rate `lr`.

        `losses` is float32 [3]: the step's loss, and its parts of either head. Its `seconds` are
        for the caller to add, who knows when the device has caught up.
        """
        self.losses += losses
        self.steps += 1
        self.grad_norm, self.lr = grad_norm, lr
        self.tokens += num_tokens
        self.flops += flops

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Figures since the last call. Collective; waits for the device."""
        now = (self.tokens, self.flops, self.seconds)
        tokens, flops, seconds = (a - b for a, b in zip(now, self._read, strict=True))
        self._read = now
        seconds = max(seconds, 1e-9)
        means, grad_norm = fetch(self.losses / self.steps, self.grad_norm)
        loss, lm_loss, mc_loss = means.tolist()
        values = {
            "loss": loss,
            "lm_loss": lm_loss,
            "mc_loss": mc_loss,
            "grad_norm": grad_norm.item(),
            "lr": self.lr,
            "tokens_per_second": ranks.sum(torch.tensor(tokens)).item() / seconds,
            "mfu": flops / self.matrix_rate / seconds,
        }
        self.losses.zero_()
        self.steps = 0
        return values

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last record; times are those of a process, and begin anew."""
        return {"losses": self.losses.cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.losses.copy_(state["losses"])
        self.steps = state["steps"]
