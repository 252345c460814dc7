"""Replies from a double-heads model, with a key/value cache."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from convai_fast import ops
from convai_fast.data.tokenizer import special_ids
from convai_fast.generation.cache import KVCache
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Prompt, Reply, Request, build_prompt, prompt_room
from convai_fast.model.double_heads import DoubleHeadsModel


class GenerationEngine:
    """Writes replies with `model`."""

    def __init__(
        self,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_batch_size: int = 64,
        weights: str = "float32",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.special_ids = special_ids(tokenizer)
        self._banned = torch.tensor(self.special_ids)

    def prompt_room(self, params: SamplingParams) -> int:
        """Number of tokens that a prompt may have so that the reply still fits the model.

        Raises UserError when `params.max_length` leaves no room for a prompt.
        """
        return prompt_room(self.model.config.n_positions, params)

    def generate(self, requests: Iterable[Request]) -> list[list[Reply]]:
        """The replies to each request, `params.n` of them, in the order of the requests."""
        return [replies for _, replies in sorted(self.serve(requests), key=lambda pair: pair[0])]

    def serve(self, requests: Iterable[Request]) -> Iterator[tuple[int, list[Reply]]]:
        """Yield each request's number and replies as soon as they are written."""
        for i, request in enumerate(requests):
            token_ids = list(self.stream(request))
            text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
            yield i, [Reply(token_ids, text, "eos") for _ in range(request.params.n)]

    def check(self, request: Request) -> None:
        """Raise UserError if `request` cannot be answered."""
        self._build_prompt(request)

    def stream(self, request: Request) -> Iterator[int]:
        """Yield the token ids of the first reply, each as soon as it is drawn."""
        return self._decode(self._build_prompt(request), request.params)

    def _build_prompt(self, request: Request) -> Prompt:
        room = self.prompt_room(request.params)
        vocab_size = self.model.config.vocab_size
        return build_prompt(request, self.tokenizer, self.special_ids, vocab_size, room)

    @torch.inference_mode()
    def _decode(self, prompt: Prompt, params: SamplingParams) -> Iterator[int]:
        weight = next(self.model.parameters())
        # The last token of a reply is never fed back, so max_length - 1 of them are cached.
        cache = KVCache(
            self.model.config,
            batch_size=1,
            max_length=len(prompt.input_ids) + params.max_length - 1,
            dtype=weight.dtype,
            device=weight.device,
        )
        logits = self._next_logits(prompt.input_ids, prompt.token_type_ids, cache)
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
