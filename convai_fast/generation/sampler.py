"""From logits to tokens: each reply's bans, penalties and filters, and the draw."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.generation.constraints import Constrainer, Constraints
from convai_fast.generation.params import SamplingParams
from convai_fast.model.layers import fetch, to_device

DAMAGED = "no token can be drawn, since its logits are no numbers: the model's weights are damaged"
ALL_BANNED = (
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


class Sampler:
    """Draws tokens; how is kept as tensors while the same replies are under way."""

    def __init__(self) -> None:
        self._constrain = Constrainer()
        self._params: list[SamplingParams] = []
        self._tables: dict[str, Tensor] = {}

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        """Draw a token from each row of `logits` [batch, vocab_size], which are changed."""
        self._constrain(logits, [draw.constraints for draw in draws])
        params = [draw.params for draw in draws]
        if params != self._params:
            self._params, self._tables = params, _tables(params, logits.device)
        steps = np.array([draw.step for draw in draws])  # sooner made than a tensor
        token_ids, logprobs = ops.sample(
            logits,
            **self._tables,
            steps=to_device(torch.from_numpy(steps), logits.device),
            return_logprobs=any(p.logprobs for p in params),
        )
        drawn, *known = fetch(token_ids, *([] if logprobs is None else [logprobs]))
        of_rows = known[0].tolist() if known else [None] * len(draws)
        return [
            Drawn(token, logprob, "" if token >= 0 else _why_nothing(logits[row]))
            for row, (token, logprob) in enumerate(zip(drawn.tolist(), of_rows, strict=True))
        ]


def _tables(params: Sequence[SamplingParams], device: torch.device) -> dict[str, Tensor]:
    """The parameters of `ops.sample`, each [batch]."""
    columns = {
        "temperature": ([0.0 if p.no_sample else p.temperature for p in params], torch.float32),
        "top_p": ([p.top_p for p in params], torch.float32),
        "min_p": ([p.min_p for p in params], torch.float32),
        "top_k": ([p.top_k for p in params], torch.int64),
        "seeds": ([p.seed for p in params], torch.int64),
    }
    return {
        name: to_device(torch.tensor(column, dtype=dtype), device)
        for name, (column, dtype) in columns.items()
    }


def _why_nothing(logits: Tensor) -> str:
    return ALL_BANNED if logits.max() == -torch.inf else DAMAGED
