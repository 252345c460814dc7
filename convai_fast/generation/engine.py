"""Replies in bulk: sequences come and go in the slots of a cache, one forward pass a step for all.

A step gives every sequence its next token: those under way by their last token, new ones by what
of their prompt no slot holds yet. What a reply becomes depends on its request alone: bit for bit
with the compiled CPU operators, and otherwise as far as a matrix product's rounding does not depend
on its number of rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from convai_fast import ops
from convai_fast.dialogue.prompt import Prompt
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError
from convai_fast.generation.cache import KVCache
from convai_fast.generation.constraints import Constraints, constrain
from convai_fast.generation.decoder import Decoder
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Reply, Request, build_prompt, prompt_room
from convai_fast.loading import check_fit
from convai_fast.model.double_heads import DoubleHeadsModel

_WINDOW = 1024  # replies that are planned together, to bring those next to each other that share
_PREFILL_TOKENS = 1024  # of prompts in one step, if there is more than one
_WORTH_WAITING_FOR = 16  # tokens of a prompt that another sequence is about to compute

_DAMAGED = "no token can be drawn, since its logits are no numbers: the model's weights are damaged"
_ALL_BANNED = (
    "no token can be drawn, since no_repeat_ngram_size bans them all: give a larger one, or a "
    "smaller min_length"
)
_ALL_TAKEN = "all slots of the engine are taken: give it a larger max_batch_size"


class _Sequence:
    """One reply in the making."""

    def __init__(
        self,
        request: int,
        sample: int,
        prompt: Prompt,
        keys: np.ndarray,
        order: bytes,
        params: SamplingParams,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.keys = keys
        self.order = order  # the keys again, as bytes that sort as they do
        self.params = params
        # Replies to one request are drawn from one seed, by counters that never meet.
        self.step = sample << 32
        self.slot = -1
        self.constraints: Constraints | None = None  # from when it has a slot
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason = ""
        self.failure = ""  # why there will be no reply
        self.stop_at = -1  # where in the text a stop text begins


class GenerationEngine:
    """Writes replies with `model`.

    Args:
        model: on a CPU its weights are packed now: make a new engine after changing them.
        tokenizer: turns requests into token ids and replies into text; its special tokens end them.
        max_batch_size: sequences that are under way at a time, at most.
        weights: "float32", "bfloat16", or "int8", an approximation for the CPU.

    Raises:
        UserError: the model does not embed exactly the tokenizer's tokens, with the special ones
            among them (`convai_fast.load` gives two that fit), or a number is out of range.

    Example:
        >>> engine = GenerationEngine(model, tokenizer)
        >>> request = Request(persona=["i like tea ."], history=["hello , how are you ?"])
        >>> [[reply]] = engine.generate([request])
        >>> reply.text

    Sources: sequences that join and leave at every step, Yu et al., "Orca" (OSDI 2022); a cache in
    which prefixes are found again, Zheng et al., "SGLang" (arXiv 2312.07104).
    """

    def __init__(
        self,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_batch_size: int = 64,
        weights: str = "float32",
    ) -> None:
        if not 1 <= max_batch_size <= 4096:
            raise UserError(f"max_batch_size is {max_batch_size}, but must be between 1 and 4,096")
        check_fit(tokenizer, model.config.vocab_size, "this model")
        self.model = model
        self.tokenizer = tokenizer
        self.special_ids = special_ids(tokenizer)
        self._decoder = Decoder(model, weights)
        self._free_slots = list(range(max_batch_size))  # the one longest free first
        self._cache = KVCache(
            model.config,
            max_batch_size,
            capacity=1,
            dtype=self._decoder.cache_dtype,
            device=self._decoder.device,
        )

    def check(self, request: Request) -> None:
        """Raise UserError if `request` cannot be answered."""
        self._build_prompt(request)

    def generate(self, requests: Iterable[Request]) -> list[list[Reply]]:
        """The replies to each request, `params.n` of them, in the order of the requests.

        Raises:
            UserError: a request cannot be answered.
        """
        replies = dict(self.serve(requests))
        return [replies[i] for i in range(len(replies))]

    def serve(
        self,
        requests: Iterable[Request],
        on_failure: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, list[Reply]]]:
        """Yield each request's number, counted from 0, and its replies, as soon as all are written.

        Args:
            requests: they are taken when they are needed, for about a thousand replies at a time.
            on_failure: called with the number of a request that cannot be answered and the reason;
                the others are answered all the same.

        Raises:
            UserError: without `on_failure`, that a request cannot be answered; what has been
                yielded stands.
        """

        def fail(i: int, reason: str) -> None:
            if on_failure is None:
                raise UserError(f"request {i}: {reason}")
            on_failure(i, reason)

        source = enumerate(requests)
        waiting: list[_Sequence] = []
        active: list[_Sequence] = []
        unfinished: dict[int, list[_Sequence]] = {}
        try:
            while True:
                if not waiting:
                    while len(waiting) < _WINDOW and (following := next(source, None)):
                        i, request = following
                        try:
                            unfinished[i] = self._sequences(i, request)
                        except UserError as error:
                            fail(i, str(error))
                        else:
                            waiting += unfinished[i]
                    # Prompts that begin alike come one after another.
                    waiting.sort(key=lambda sequence: sequence.order)
                self._admit(waiting, active)
                if not active:
                    if waiting:
                        raise UserError(_ALL_TAKEN)
                    return
                self._step(active)
                for i, reason in {
                    each.request: each.failure for each in active if each.failure
                }.items():
                    del unfinished[i]
                    waiting = [sequence for sequence in waiting if sequence.request != i]
                    for sequence in [each for each in active if each.request == i]:
                        self._release(sequence, active)
                    fail(i, reason)
                finished = [sequence for sequence in active if sequence.finish_reason]
                for sequence in finished:
                    self._release(sequence, active)
                for i in dict.fromkeys(sequence.request for sequence in finished):
                    if all(sequence.finish_reason for sequence in unfinished[i]):
                        yield i, [self._reply(sequence) for sequence in unfinished.pop(i)]
        finally:
            for sequence in list(active):
                self._release(sequence, active)

    def stream(self, request: Request) -> Iterator[int]:
        """Yield the token ids of the first reply, each as soon as it is drawn.

        Where a stop text may have begun they are held back until it is certain that it has not.

        Raises:
            UserError: at once, when the request cannot be answered; with a token, when all slots
                are taken or nothing can be drawn.
        """
        return self._stream(self._sequences(0, request)[0])

    def _stream(self, sequence: _Sequence) -> Iterator[int]:
        active: list[_Sequence] = []
        num_yielded = 0
        try:
            self._admit([sequence], active)
            if not active:
                raise UserError(_ALL_TAKEN)
            while not sequence.finish_reason:
                self._step(active)
                if sequence.failure:
                    raise UserError(sequence.failure)
                ready = self._num_certain(sequence)
                yield from sequence.token_ids[num_yielded:ready]
                num_yielded = max(num_yielded, ready)
        finally:
            for each in list(active):
                self._release(each, active)

    # --- sequences ------------------------------------------------------------------------------

    def _build_prompt(self, request: Request) -> Prompt:
        config = self.model.config
        room = prompt_room(config.n_positions, request.params)
        return build_prompt(request, self.tokenizer, self.special_ids, config.vocab_size, room)

    def _sequences(self, i: int, request: Request) -> list[_Sequence]:
        prompt = self._build_prompt(request)
        keys = self._keys(prompt.input_ids, prompt.token_type_ids)
        order = keys.astype(">i8").tobytes()
        params = request.params
        return [_Sequence(i, sample, prompt, keys, order, params) for sample in range(params.n)]

    def _keys(self, input_ids: Sequence[int], token_type_ids: Sequence[int]) -> np.ndarray:
        """A number for each token that stands for its id and its segment's."""
        ids, segments = np.asarray(input_ids, np.int64), np.asarray(token_type_ids, np.int64)
        return ids + segments * self.model.config.vocab_size

    @torch.inference_mode()  # as the tensors of the cache are made and written to
    def _admit(self, waiting: list[_Sequence], active: list[_Sequence]) -> None:
        """Move sequences from `waiting` to `active` while there are free slots.

        One whose prompt begins like that of a sequence admitted just now waits for the next step,
        in which it can copy what they share.
        """
        budget = _PREFILL_TOKENS
        passed_over = []
        while waiting and self._free_slots and budget > 0 and len(passed_over) < _WINDOW // 8:
            sequence = waiting.pop(0)
            length = len(sequence.keys)
            self._cache.reserve(length + sequence.params.max_length - 1)
            # The last token is always computed: its logits are what the reply begins with.
            promised = np.minimum(self._cache.shared_lengths(sequence.keys), length - 1)
            shared = np.minimum(promised, self._cache.lengths)
            source = int(shared.argmax())
            if promised.max() >= shared[source] + _WORTH_WAITING_FOR:
                passed_over.append(sequence)
                continue
            # In place where nothing is lost by it, as when a conversation goes on.
            is_whole = shared[source] == self._cache.lengths[source]
            slot = source if is_whole and source in self._free_slots else self._free_slots[0]
            sequence.slot = slot
            sequence.constraints = Constraints(
                sequence.params, sequence.prompt.input_ids, self.special_ids
            )
            self._free_slots.remove(slot)
            active.append(sequence)
            self._cache.begin(slot, sequence.keys, source, int(shared[source]))
            budget -= length - int(shared[source])
        waiting[:0] = passed_over

    def _release(self, sequence: _Sequence, active: list[_Sequence]) -> None:
        active.remove(sequence)
        self._free_slots.append(sequence.slot)
        # Nobody shall wait for what it promised to compute and did not.
        self._cache.tokens[sequence.slot, self._cache.lengths[sequence.slot] :] = -1

    # --- one step -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self, active: list[_Sequence]) -> None:
        """Draw the next token of every sequence."""
        logits = self._next_logits(active)
        constrain(logits, [sequence.constraints for sequence in active])
        largest = logits.amax(1)
        is_bad = ~largest.isfinite()
        if is_bad.any():
            for row in is_bad.nonzero().flatten().tolist():
                active[row].failure = _ALL_BANNED if largest[row] == -torch.inf else _DAMAGED
            logits[is_bad] = 0  # of which something can be drawn, for nobody
        params = [sequence.params for sequence in active]

        def column(values: Iterable[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(list(values), dtype=dtype, device=logits.device)

        token_ids, logprobs = ops.sample(
            logits,
            temperature=column(
                (0.0 if p.no_sample else p.temperature for p in params), torch.float32
            ),
            top_k=column((p.top_k for p in params), torch.int64),
            top_p=column((p.top_p for p in params), torch.float32),
            min_p=column((p.min_p for p in params), torch.float32),
            seeds=column((p.seed for p in params), torch.int64),
            steps=column((sequence.step for sequence in active), torch.int64),
            return_logprobs=any(p.logprobs for p in params),
        )
        for i, (sequence, token) in enumerate(zip(active, token_ids.tolist(), strict=True)):
            if not sequence.failure:
                self._add_token(sequence, token, None if logprobs is None else logprobs[i])

    def _next_logits(self, active: list[_Sequence]) -> torch.Tensor:
        slots, input_ids, token_type_ids = [], [], []
        for sequence in active:
            slots.append(sequence.slot)
            if sequence.token_ids:
                input_ids.append(sequence.token_ids[-1:])
                token_type_ids.append([self.special_ids.speaker1])
            else:
                start = int(self._cache.lengths[sequence.slot])
                input_ids.append(sequence.prompt.input_ids[start:])
                token_type_ids.append(sequence.prompt.token_type_ids[start:])
        keys = [self._keys(*pair) for pair in zip(input_ids, token_type_ids, strict=True)]

        def flat(lists: list[list[int]]) -> torch.Tensor:
            ids = [token for tokens in lists for token in tokens]
            return torch.tensor(ids, device=self._decoder.device)

        try:
            step = self._cache.extend(slots, keys)
            return self._decoder.next_logits(flat(input_ids), flat(token_type_ids), step)
        except BaseException:  # Ctrl-C, say: only some of the layers may hold the new tokens
            self._cache.lengths[slots] = 0
            raise

    def _add_token(self, sequence: _Sequence, token: int, logprob: torch.Tensor | None) -> None:
        params = sequence.params
        sequence.step += 1
        if token in self.special_ids:
            sequence.finish_reason = "eos"
            return
        sequence.token_ids.append(token)
        if params.logprobs:
            sequence.logprobs.append(float(logprob))
        sequence.constraints.add(token)
        if params.stop and len(sequence.token_ids) >= params.min_length:
            text = self._text(sequence.token_ids)
            # What had to be written could not stop the reply, nor can it now.
            free = len(self._text(sequence.token_ids[: max(params.min_length, 1) - 1]).rstrip("�"))
            starts = [(stop, max(free + 1 - len(stop), 0)) for stop in params.stop]
            found = [at for stop, start in starts if (at := text.find(stop, start)) >= 0]
            if found:
                sequence.finish_reason = "stop"
                sequence.stop_at = min(found)
                return
        if len(sequence.token_ids) == params.max_length:
            sequence.finish_reason = "length"

    # --- text -----------------------------------------------------------------------------------

    def _text(self, token_ids: list[int]) -> str:
        # Some tokenizers' files ask for spaces to be tidied away, which changes what was written.
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _reply(self, sequence: _Sequence) -> Reply:
        text = self._text(sequence.token_ids)
        if sequence.finish_reason == "stop":
            text = text[: sequence.stop_at]
        logprobs = sequence.logprobs if sequence.params.logprobs else None
        return Reply(sequence.token_ids, text, sequence.finish_reason, logprobs)

    def _num_certain(self, sequence: _Sequence) -> int:
        """How many of the tokens drawn so far lie before whatever may be a stop text."""
        count = len(sequence.token_ids)
        text = self._text(sequence.token_ids) if sequence.params.stop else ""
        end = sequence.stop_at
        if sequence.finish_reason != "stop":
            if not sequence.params.stop or sequence.finish_reason:
                return count
            # "wait <st" may go on to "<stop>": its last three characters are not certain, nor is
            # one of which only some bytes have come.
            whole = text.rstrip("�")
            open_lengths = [
                n
                for stop in sequence.params.stop
                for n in range(1, len(stop))
                if whole.endswith(stop[:n])
            ]
            end = len(whole) - max(open_lengths, default=0)
        while count > 0 and len(self._text(sequence.token_ids[:count])) > end:
            count -= 1
        return count
