"""From logits to tokens: each reply's bans, penalties and filters, and the draw."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.generation.constraints import Constraints, constrain
from convai_fast.generation.params import SamplingParams
from convai_fast.model.layers import fetch, to_device

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

    floats = [(0.0 if p.no_sample else p.temperature, p.top_p, p.min_p) for p in params]
    integers = [(draw.params.top_k, draw.params.seed, draw.step) for draw in draws]
    # One transfer of each kind; what a column holds of all rows lies side by side.
    columns = (
        torch.tensor(rows, dtype=dtype).T.contiguous()
        for rows, dtype in ((floats, torch.float32), (integers, torch.int64))
    )
    (temperature, top_p, min_p), (top_k, seeds, steps) = (
        to_device(column, logits.device) for column in columns
    )
    token_ids, logprobs = ops.sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        steps=steps,
        return_logprobs=any(p.logprobs for p in params),
    )
    drawn, *known = fetch(token_ids, *([] if logprobs is None else [logprobs]))
    of_rows = known[0].tolist() if known else [None] * len(draws)
    return [
        Drawn(token, logprob, "" if token >= 0 else _why_nothing(logits[row]))
        for row, (token, logprob) in enumerate(zip(drawn.tolist(), of_rows, strict=True))
    ]


def _why_nothing(logits: Tensor) -> str:
    return _ALL_BANNED if logits.max() == -torch.inf else _DAMAGED
