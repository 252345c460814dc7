"""What a batch costs, and what training and an evaluation add up."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convai_fast.dialogue.format import IGNORED
from convai_fast.model.double_heads import DoubleHeadsOutput
from convai_fast.training.distributed import Ranks


def combined_loss(lm_loss: Tensor, mc_loss: Tensor, lm_coef: float, mc_coef: float) -> Tensor:
    """`lm_coef * lm_loss + mc_coef * mc_loss`, a scalar (TransferTransfo, section 3)."""
    return lm_coef * lm_loss + mc_coef * mc_loss


@dataclass(frozen=True)
class Metrics:
    """Figures of one evaluation.

    Attributes:
        nll: mean negative log-likelihood of a labelled token (reply and `<eos>`), in nats, over
            all tokens of the split, not a mean of batch means.
        mc_loss: mean multiple-choice cross-entropy of an example, in nats.
        hits_at_1: share of examples whose true reply has the largest multiple-choice logit.
    """

    nll: float
    mc_loss: float
    hits_at_1: float
    num_tokens: int
    num_examples: int

    @property
    def ppl(self) -> float:
        """Perplexity of a token: exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def as_dict(self) -> dict[str, float]:
        """What metrics.jsonl and metrics.json record."""
        return {
            "nll": self.nll,
            "ppl": self.ppl,
            "mc_loss": self.mc_loss,
            "hits@1": self.hits_at_1,
            "num_tokens": self.num_tokens,
            "num_examples": self.num_examples,
        }

    def __str__(self) -> str:
        return (
            f"nll {self.nll:.3f}, perplexity {self.ppl:,.2f}, hits@1 {self.hits_at_1:.1%} "
            f"over {self.num_examples:,} examples"
        )


class MetricSums:
    """Adds up batches on the device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, output: DoubleHeadsOutput, labels: Tensor, mc_labels: Tensor) -> None:
        """Count one batch; `labels` and `mc_labels` as in `DoubleHeadsModel.forward`."""
        num_tokens = (labels[..., 1:] != IGNORED).sum()
        num_examples = (mc_labels != IGNORED).sum()
        hits = (output.mc_logits.argmax(-1) == mc_labels.to(output.mc_logits.device)).sum()
        terms = (
            output.loss.double() * num_tokens,
            num_tokens,
            output.mc_loss.double() * num_examples,
            hits,
            num_examples,
        )
        self.sums += torch.stack([term.to(self.sums) for term in terms])

    def compute(self, ranks: Ranks) -> Metrics:
        """The figures so far, over all ranks; NaN where nothing was counted. Collective."""
        nll, tokens, mc_loss, hits, examples = ranks.sum(self.sums).tolist()
        per_token, per_example = tokens or math.nan, examples or math.nan
        return Metrics(
            nll=nll / per_token,
            mc_loss=mc_loss / per_example,
            hits_at_1=hits / per_example,
            num_tokens=int(tokens),
            num_examples=int(examples),
        )


class StepLog:
    """Sums of the steps since the last record, kept on the device until somebody reads them."""

    def __init__(self, device: torch.device, matrix_rate: float) -> None:
        """`matrix_rate`: floating-point operations a second that the device can do, for `mfu`."""
        self.losses = torch.zeros(3, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.batches = 0
        self.matrix_rate = matrix_rate
        self.tokens, self.flops, self.seconds = 0, 0.0, 0.0  # of this process
        self._read = (0, 0.0, 0.0)

    @property
    def mfu(self) -> float:
        """Model-flops utilisation of this process so far: 1 if nothing but products took time."""
        return self.flops / self.matrix_rate / max(self.seconds, 1e-9)

    def end_step(self, losses: Tensor, num_tokens: int, flops: float, grad_norm: Tensor) -> None:
        """Count a step; `losses` is float32 [batches, 3]. Its `seconds` are for the caller to add,
        who knows when the device has caught up."""
        self.losses += losses.sum(0)
        self.batches += len(losses)
        self.grad_norm = grad_norm
        self.tokens += num_tokens
        self.flops += flops

    def read(self, lr: float, ranks: Ranks) -> dict[str, float]:
        """Figures since the last call. Collective; waits for the device."""
        now = (self.tokens, self.flops, self.seconds)
        tokens, flops, seconds = (a - b for a, b in zip(now, self._read, strict=True))
        self._read = now
        seconds = max(seconds, 1e-9)
        loss, lm_loss, mc_loss = (self.losses / self.batches).tolist()
        values = {
            "loss": loss,
            "lm_loss": lm_loss,
            "mc_loss": mc_loss,
            "grad_norm": self.grad_norm.item(),
            "lr": lr,
            "tokens_per_second": ranks.sum(torch.tensor(tokens)).item() / seconds,
            "mfu": flops / self.matrix_rate / seconds,
        }
        self.losses.zero_()
        self.batches = 0
        return values

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last record; times are those of a process, and begin anew."""
        return {"losses": self.losses.cpu(), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.losses.copy_(state["losses"])
        self.batches = state["batches"]
