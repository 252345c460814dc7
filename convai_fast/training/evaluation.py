"""The figures of a validation split."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from convai_fast.data.batches import Batch, count_examples, count_labels
from convai_fast.model.double_heads import DoubleHeadsModel, DoubleHeadsOutput
from convai_fast.model.layers import to_device
from convai_fast.training.compute import Compute
from convai_fast.training.distributed import Ranks
from convai_fast.training.interruption import Stop


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
    """Adds up batches on the device, without waiting for it; what the host knows, it counts."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # nll, mc_loss, hits
        self.num_tokens = self.num_examples = 0

    def add(
        self, output: DoubleHeadsOutput, num_tokens: int, num_examples: int, mc_labels: Tensor
    ) -> None:
        """Count one batch of so many labelled tokens and examples; `mc_labels` on the device."""
        assert output.loss is not None and output.mc_loss is not None  # there are labels
        hits = (output.mc_logits.argmax(-1) == mc_labels).sum()
        nll, mc_loss = output.loss.double() * num_tokens, output.mc_loss.double() * num_examples
        self.sums += torch.stack([nll, mc_loss, hits.double()])
        self.num_tokens += num_tokens
        self.num_examples += num_examples

    def compute(self, ranks: Ranks) -> Metrics:
        """The figures so far, over all ranks; NaN where nothing was counted. Collective."""
        counts = torch.tensor([self.num_tokens, self.num_examples], dtype=torch.float64)
        sums = torch.cat([self.sums, to_device(counts, self.sums.device)])
        nll, mc_loss, hits, tokens, examples = ranks.sum(sums).tolist()
        per_token, per_example = tokens or math.nan, examples or math.nan
        return Metrics(
            nll=nll / per_token,
            mc_loss=mc_loss / per_example,
            hits_at_1=hits / per_example,
            num_tokens=int(tokens),
            num_examples=int(examples),
        )


@torch.no_grad()  # not inference_mode, whose tensors FSDP cannot train with afterwards
def evaluate(
    model: DoubleHeadsModel,
    batches: Iterable[Batch],
    compute: Compute,
    ranks: Ranks,
    stop: Stop | None = None,
) -> Metrics:
    """Figures of `model` over `batches`, this rank's part of them. Collective.

    Raises StoppedError when a signal arrives.
    """
    model.eval()
    sums = MetricSums(compute.device)
    with compute.weights_cast_once():
        for batch in batches:
            if stop is not None:
                stop.raise_if_asked()
            arguments = compute.to_device(batch)
            with compute.autocast():
                output = model(**arguments, return_logits=False)
            sums.add(output, count_labels(batch), count_examples(batch), arguments["mc_labels"])
    return sums.compute(ranks)
