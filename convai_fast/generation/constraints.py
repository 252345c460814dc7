"""What changes the logits of a reply before a token is drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from convai_fast.generation.params import SamplingParams


class Constraints:
    """The bans and penalties of one reply.

    Args:
        params: `min_length`, `repetition_penalty` and `no_repeat_ngram_size` are read.
        prompt: its token ids, which penalties and n-grams count too, as in transformers.
        special_ids: the tokens that end a reply.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], special_ids: Sequence[int]
    ) -> None:
        self._params = params
        self._special_ids = list(special_ids)
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

    def penalise(self, logits: Tensor) -> None:
        """Make what was seen less likely in `logits` [vocab_size], in place."""
        penalty = self._params.repetition_penalty
        if penalty != 1:
            seen = torch.tensor(list(self._seen), device=logits.device)
            values = logits[seen]
            logits[seen] = torch.where(values < 0, values * penalty, values / penalty)

    def banned(self) -> list[int]:
        """What must not be drawn next."""
        num_drawn = self._num_seen - self._prompt_length
        banned = self._special_ids if num_drawn < self._params.min_length else []
        n = self._params.no_repeat_ngram_size
        if n > 0:
            context = tuple(self._tokens[len(self._tokens) - n + 1 :])
            banned = banned + self._followers.get(context, [])
        return banned


def constrain(logits: Tensor, constraints: Sequence[Constraints]) -> None:
    """Penalise and ban in place, each reply in its row of `logits` [batch, vocab_size]."""
    rows, tokens = [], []
    for i, each in enumerate(constraints):
        each.penalise(logits[i])
        banned = each.banned()
        rows += [i] * len(banned)
        tokens += banned
    if rows:
        logits[torch.tensor([rows, tokens], device=logits.device).unbind()] = -torch.inf
