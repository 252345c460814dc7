"""Replies from a double-heads model, token by token, with a key/value cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.data.tokenizer import SpecialIds
from convai_fast.errors import UserError
from convai_fast.generation.cache import KVCache
from convai_fast.generation.params import SamplingParams
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.ops.reference import build_sequence

# <bos>, one turn of a speaker token and one token, and the reply's <speaker1>.
_SHORTEST_PROMPT = 4


class GenerationEngine:
    """Writes replies with `model`, whose special tokens are `special_ids`.

    Works on token ids only. The model is put in eval mode whenever a reply is written.
    """

    def __init__(self, model: DoubleHeadsModel, special_ids: SpecialIds) -> None:
        self.model = model
        self.special_ids = special_ids
        self._banned = torch.tensor(special_ids)

    def prompt_room(self, params: SamplingParams) -> int:
        """Number of tokens that a prompt may have so that the reply still fits the model.

        Raises UserError when `params.max_length` leaves no room for a prompt.
        """
        n_positions = self.model.config.n_positions
        room = n_positions - params.max_length
        if room < _SHORTEST_PROMPT:
            raise UserError(
                f"max_length is {params.max_length}, which leaves no room for a prompt in the "
                f"model's {n_positions} positions: give at most {n_positions - _SHORTEST_PROMPT}"
            )
        return room

    def stream(
        self,
        persona: Sequence[Sequence[int]],
        history: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> Iterator[int]:
        """Yield the token ids of a reply, each as soon as it is drawn.

        A special token ends the reply and is not yielded; `params.max_length` ends it too. The
        reply depends on the prompt, `params` and the model alone. A prompt too long for the model
        loses what `fit_prefix` cuts.

        Args:
            persona: token ids of each sentence.
            history: token ids of each turn, oldest first, the partner's last turn last.

        Raises:
            UserError: at once, when `params.max_length` leaves no room for a prompt.
        """
        room = self.prompt_room(params)
        persona, history = fit_prefix(persona, history, room - 1)  # beside the reply's <speaker1>
        input_ids, token_type_ids, _ = build_sequence(
            persona, history, [], self.special_ids, with_eos=False
        )
        return self._decode(input_ids, token_type_ids, params)

    def reply(
        self,
        persona: Sequence[Sequence[int]],
        history: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[int]:
        """The token ids of a reply; see `stream`."""
        return list(self.stream(persona, history, params))

    @torch.inference_mode()
    def _decode(
        self, input_ids: list[int], token_type_ids: list[int], params: SamplingParams
    ) -> Iterator[int]:
        self.model.eval()
        weight = next(self.model.parameters())
        # The last token of a reply is never fed back, so max_length - 1 of them are cached.
        cache = KVCache(
            self.model.config,
            batch_size=1,
            max_length=len(input_ids) + params.max_length - 1,
            dtype=weight.dtype,
            device=weight.device,
        )
        logits = self._next_logits(input_ids, token_type_ids, cache)
        for step in range(params.max_length):
            if step < params.min_length:
                logits[:, self._banned.to(logits.device)] = -torch.inf
            drawn, _ = ops.sample(
                logits,
                temperature=0.0 if params.no_sample else params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                seeds=params.seed,
                steps=step,
            )
            token = int(drawn)
            if token in self.special_ids:
                return
            yield token
            if step + 1 < params.max_length:
                logits = self._next_logits([token], [self.special_ids.speaker1], cache)

    def _next_logits(
        self, input_ids: list[int], token_type_ids: list[int], cache: KVCache
    ) -> Tensor:
        """LM logits [1, vocab_size] after the given tokens, which join the cache."""
        device = next(self.model.parameters()).device
        hidden = self.model.transformer(
            torch.tensor([input_ids], device=device),
            torch.tensor([token_type_ids], device=device),
            kv_cache=cache,
        )
        return self.model.lm_logits(hidden[:, -1])


def fit_prefix(
    persona: Sequence[Sequence[int]], history: Sequence[Sequence[int]], room: int
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Cut persona and history so that `<bos>` and both take at most `room` tokens.

    The oldest turns go first, then persona sentences from the end, then the beginning of the last
    turn, which goes altogether where not one token of it fits.
    """
    persona, history = list(persona), list(history)

    def excess() -> int:
        return 1 + sum(map(len, persona)) + sum(1 + len(turn) for turn in history) - room

    while excess() > 0 and len(history) > 1:
        del history[0]
    while excess() > 0 and persona:
        del persona[-1]
    if history and excess() > 0:
        kept = history[0][excess() :]
        history = [kept] if kept else []
    return persona, history
