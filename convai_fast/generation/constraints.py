"""What changes the logits of a reply before a token is drawn."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from convai_fast.generation.params import SamplingParams
from convai_fast.model.layers import to_device


class Constraints:
    """The bans and penalties of one reply.

    Args:
        params: `min_length`, `repetition_penalty` and `no_repeat_ngram_size` are read.
        prompt: its token ids, which penalties and n-grams count too, as in transformers.
        ends: the tokens that end a reply.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], ends: Sequence[int]) -> None:
        self._params = params
        self._ends = list(ends)
        self._tokens: list[int] = []
        self._seen: dict[int, None] = {}  # in order, and each once
        self._followers: dict[tuple[int, ...], list[int]] = {}  # of every n - 1 tokens so far
        self._num_seen = 0
        self._prompt_length = len(prompt)
        self._is_recorded = params.repetition_penalty != 1 or params.no_repeat_ngram_size > 0
        self.follow(prompt)

    def follow(self, tokens: Sequence[int]) -> None:
        """Take note of the prompt and what was drawn after it, as far as it is new."""
        for token in tokens[self._num_seen :]:
            self._add(token)

    def _add(self, token: int) -> None:
        self._num_seen += 1
        if not self._is_recorded:
            return
        self._seen[token] = None
        self._tokens.append(token)
        n = self._params.no_repeat_ngram_size
        if n > 0 and len(self._tokens) >= n:
            *context, last = self._tokens[-n:]
            self._followers.setdefault(tuple(context), []).append(last)

    @property
    def penalty(self) -> float:
        """What makes a token less likely that was seen; 1 for nothing."""
        return self._params.repetition_penalty

    def seen(self) -> list[int]:
        """What was seen, each token once."""
        return list(self._seen)

    def banned(self) -> list[int]:
        """What must not be drawn next."""
        num_drawn = self._num_seen - self._prompt_length
        banned = self._ends if num_drawn < self._params.min_length else []
        n = self._params.no_repeat_ngram_size
        if n > 0:
            context = tuple(self._tokens[len(self._tokens) - n + 1 :])
            banned = banned + self._followers.get(context, [])
        return banned


class Constrainer:
    """Applies constraints; where it bans is kept as tensors while the bans are the same."""

    def __init__(self) -> None:
        self._banned: list[list[int]] = []
        self._places: tuple[Tensor, Tensor] | None = None
        self._never = torch.empty(())

    def __call__(self, logits: Tensor, constraints: Sequence[Constraints]) -> None:
        """Penalise and ban in place, each reply in its row of `logits` [batch, vocab_size]."""
        if any(each.penalty != 1 for each in constraints):
            _penalise(logits, constraints)
        banned = [each.banned() for each in constraints]
        if banned != self._banned:
            self._never = logits.new_full((), -torch.inf)
            self._banned, self._places = banned, _places(banned, logits.device)
        if self._places:
            logits.index_put_(self._places, self._never)


def _penalise(logits: Tensor, constraints: Sequence[Constraints]) -> None:
    penalties = torch.tensor([each.penalty for each in constraints], dtype=torch.float32)
    at = _places([each.seen() if each.penalty != 1 else [] for each in constraints], logits.device)
    if at:
        penalty = to_device(penalties, logits.device)[at[0]]
        values = logits[at]
        penalised = torch.where(values < 0, values * penalty, values / penalty)
        logits[at] = penalised.to(logits.dtype)


def _places(tokens: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Row and column of each token of each row; None where there is none."""
    rows = [i for i, row in enumerate(tokens) for _ in row]
    if not rows:
        return None
    columns = list(chain.from_iterable(tokens))
    row_ids, token_ids = to_device(torch.tensor([rows, columns]), device)
    return row_ids, token_ids
