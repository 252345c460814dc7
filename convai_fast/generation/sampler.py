"""From logits to tokens: each reply's bans, penalties and filters, and the draw."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.generation.constraints import Constraints, constrain
from convai_fast.generation.params import SamplingParams

_DAMAGED = "no token can be drawn, since its logits are no numbers: the model's weights are damaged"
_ALL_BANNED = (
    "no token can be drawn, since no_repeat_ngram_size bans them all: give a larger one, or a "
    "smaller min_length"
)


class Draw(NamedTuple):
    """What is drawn for one row of logits.

    Attributes:
        params: how.
        constraints: what is banned and penalised.
        step: the counter of its random numbers.
    """

    params: SamplingParams
    constraints: Constraints
    step: int


class Drawn(NamedTuple):
    """A token, and the log-probability that it had, if it was asked for; or why there is none."""

    token: int
    logprob: float | None
    failure: str = ""


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw a token from each row of `logits` [batch, vocab_size], which are changed."""
    constrain(logits, [draw.constraints for draw in draws])
    params = [draw.params for draw in draws]

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=logits.device)

    token_ids, logprobs = ops.sample(
        logits,
        temperature=column((0.0 if p.no_sample else p.temperature for p in params), torch.float32),
        top_k=column((p.top_k for p in params), torch.int64),
        top_p=column((p.top_p for p in params), torch.float32),
        min_p=column((p.min_p for p in params), torch.float32),
        seeds=column((p.seed for p in params), torch.int64),
        steps=column((draw.step for draw in draws), torch.int64),
        return_logprobs=any(p.logprobs for p in params),
    )
    known = [None] * len(draws) if logprobs is None else logprobs.tolist()
    return [
        Drawn(token, logprob, "" if token >= 0 else _why_nothing(logits[row]))
        for row, (token, logprob) in enumerate(zip(token_ids.tolist(), known, strict=True))
    ]


def _why_nothing(logits: Tensor) -> str:
    return _ALL_BANNED if logits.max() == -torch.inf else _DAMAGED
