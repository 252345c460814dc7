"""The engine: requests are added, a step gives every reply its next token, events tell of them.

What a reply becomes depends on its request alone: bit for bit with the compiled CPU operators, and
otherwise as far as a matrix product's rounding does not depend on its number of rows.
"""

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.prompt import Prompt
from convai_fast.errors import UserError
from convai_fast.generation.backends import make_backend
from convai_fast.generation.detokenizer import Detokenizer
from convai_fast.generation.events import Done, Event, Failed
from convai_fast.generation.interruption import deferred_signals
from convai_fast.generation.jobs import Jobs
from convai_fast.generation.launch import Launch, make_launcher
from convai_fast.generation.ranking import RankedCandidate, rank
from convai_fast.generation.request import (
    FinishReason,
    Reply,
    Request,
    Texts,
    build_prompt,
    check_ranking,
    prompt_room,
)
from convai_fast.generation.scheduler import Scheduler
from convai_fast.loading import check_fit, layout_for
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.generation_config import ends_of

_AHEAD = 1024  # requests that `serve` takes before there is a slot for them


class Load(NamedTuple):
    """What an engine has to do.

    Attributes:
        running, waiting: sequences in a slot, and those without one.
        prompt_tokens: of all prompts so far that got a slot.
        copied_tokens: those of them that were not computed, since a slot held them.
    """

    running: int
    waiting: int
    prompt_tokens: int
    copied_tokens: int


class GenerationEngine:
    """Writes replies with `model`.

    Any number of callers share a batch: `add` requests and call `step` until nothing is under way,
    or use the loops over these two, `generate`, `serve` and `stream`, also several at a time. From
    several threads use `AsyncEngine`.

    Args:
        model: on a CPU its weights are packed now: make a new engine after changing them.
        tokenizer: turns requests into token ids and replies into text.
        max_batch_size: sequences that are under way at a time, at most.
        weights: "float32", "bfloat16", or "int8", an approximation for the CPU; "auto" is bfloat16
            on a GPU and float32 elsewhere.

    Raises:
        UserError: the model does not embed exactly the tokenizer's tokens, with the special ones
            among them (`convai_fast.load` gives two that fit), or a number is out of range.

    Example:
        >>> engine = GenerationEngine(model, tokenizer)
        >>> request = Request(persona=["i like tea ."], history=["hello , how are you ?"])
        >>> [[reply]] = engine.generate([request])
        >>> reply.text
    """

    def __init__(
        self,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_batch_size: int = 64,
        weights: str = "auto",
    ) -> None:
        if not 1 <= max_batch_size <= 4096:
            raise UserError(f"max_batch_size is {max_batch_size}, but must be between 1 and 4,096")
        check_fit(tokenizer, model.config, "this model")
        self.model = model
        self.tokenizer = tokenizer
        layout = layout_for(tokenizer, model.config)
        ends = {*layout.ends, *ends_of(model.generation_config, tokenizer)}
        self.layout = replace(layout, ends=tuple(sorted(ends)))
        self._backend = make_backend(model, max_batch_size, weights)
        self._launcher = make_launcher(self._backend, model.multiple_choice_head, self.layout)
        self._launched: list[Launch] = []  # what is not looked at yet, in order
        self._scheduler = Scheduler(
            max_batch_size, model.config.vocab_size, self._backend.prefill_tokens
        )
        self._jobs = Jobs(self._scheduler, Detokenizer(tokenizer), self.layout)
        self._is_stepping = False
        self._abandoned: list[Hashable] = []  # meanwhile, by a loop that Python cleared away

    # --- requests -------------------------------------------------------------------------------

    def add(self, id: Hashable, request: Request, *, stream: bool = False) -> None:
        """Take a request; events will tell of it under `id`.

        Args:
            stream: also tell tokens as they are drawn, not only whole replies.

        Raises:
            UserError: it cannot be answered.
            ValueError: a request with this id is under way.
        """
        self._enter(id, request, self._prompt(request, stream), stream)

    @deferred_signals()
    def _enter(self, id: Hashable, request: Request, prompt: Prompt, stream: bool) -> None:
        if self._jobs.knows(id):
            raise ValueError(f"a request with the id {id!r} is under way")
        params = request.params
        # What is drawn last is computed only where it is ranked, and then an <eos> after it.
        capacity = len(prompt.input_ids) + params.max_length + (1 if params.best_of > 1 else -1)
        self._backend.allocate(capacity)
        self._scheduler.reserve(capacity)
        self._jobs.add(id, request, prompt, stream)

    def check(self, request: Request) -> None:
        """Raise UserError if `request` cannot be answered."""
        self._prompt(request)

    def _prompt(self, request: Request, stream: bool = False) -> Prompt:
        params, config = request.params, self.model.config
        check_ranking(params, self.model)
        if params.best_of > 1 and stream:
            raise UserError("best_of chooses among whole replies: they cannot be streamed")
        room = prompt_room(config.n_positions, params, self.layout)
        return build_prompt(request, self.tokenizer, self.layout, config.vocab_size, room)

    @deferred_signals()
    def cancel(self, id: Hashable) -> None:
        """Forget a request, if it is under way: there will be no more events of it."""
        self._jobs.cancel(id)

    @deferred_signals()
    def clear_prefixes(self) -> None:
        """Copy nothing from the prompts seen so far, as a new engine would."""
        self._scheduler.clear_free_slots()

    @property
    def num_unfinished(self) -> int:
        """How many requests are under way, or done without `step` having told of it."""
        return self._jobs.num_unfinished

    @property
    def load(self) -> Load:
        """What the engine has to do, and what prompts had in common so far."""
        scheduler = self._scheduler
        return Load(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            prompt_tokens=scheduler.num_prompt_tokens,
            copied_tokens=scheduler.num_copied_tokens,
        )

    # --- loops over `add` and `step` ------------------------------------------------------------

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

        source = enumerate(requests)
        mailbox: deque[Event] = deque()
        numbers: dict[Hashable, int] = {}  # of the requests that are under way, by their ids

        def fail(i: int, reason: str) -> None:
            if on_failure is None:
                raise UserError(f"request {i}: {reason}")
            on_failure(i, reason)

        def take() -> bool:
            """Take a request; False where there are no more."""
            i, request = next(source, (-1, None))
            if request is None:
                return False
            id = object()
            numbers[id], self._jobs.mailboxes[id] = i, mailbox
            try:
                self.add(id, request)
            except UserError as error:
                del numbers[id], self._jobs.mailboxes[id]
                fail(i, str(error))
            return True

        is_exhausted = False
        try:
            while True:
                if not (numbers and self._scheduler.num_waiting):
                    is_exhausted = is_exhausted or not take()
                    while not is_exhausted and self._scheduler.num_waiting < _AHEAD:
                        is_exhausted = not take()
                if not numbers and is_exhausted:
                    return
                self._advance()
                while mailbox:
                    event = mailbox.popleft()
                    del self._jobs.mailboxes[event.id]
                    i = numbers.pop(event.id)
                    if isinstance(event, Failed):
                        fail(i, event.reason)
                    else:
                        assert isinstance(event, Done)  # none of these is streamed
                        yield i, event.replies
        finally:
            self._abandon(numbers)

    def stream(self, request: Request) -> Generator[int, None, FinishReason]:
        """Yield the token ids of the first reply, each as soon as it is drawn.

        Where a stop text may have begun they are held back until it is certain that it has not.
        Returns, as the value of `yield from`, the reply's `finish_reason`.

        Raises:
            UserError: at once, when the request cannot be answered; with a token, when nothing can
                be drawn.
        """
        prompt = self._prompt(request, stream=True)
        return self._stream(replace(request, params=replace(request.params, n=1)), prompt)

    def _stream(self, request: Request, prompt: Prompt) -> Generator[int, None, FinishReason]:
        mailbox: deque[Event] = deque()
        id = object()
        try:
            self._jobs.mailboxes[id] = mailbox
            self._enter(id, request, prompt, stream=True)
            while True:
                while not mailbox:
                    self._advance()
                event = mailbox.popleft()
                if isinstance(event, Failed):
                    raise UserError(event.reason)
                if isinstance(event, Done):
                    return event.replies[0].finish_reason
                yield from event.token_ids
        finally:
            self._abandon([id])

    @deferred_signals()
    def _abandon(self, ids: Iterable[Hashable]) -> None:
        if self._is_stepping:
            self._abandoned += ids
            return
        for id in ids:
            self.cancel(id)
            self._jobs.mailboxes.pop(id, None)

    def rank(self, request: Request, candidates: Texts) -> list[RankedCandidate]:
        """The candidates as replies to `request`, the best first by the multiple-choice head.

        They are read after the same prompt as a reply would be, of which they share the
        computation: `build_prompt` leaves out what leaves no room for the longest of them, and one
        too long by itself loses its end. It is computed with the model's own weights, whatever
        those of the replies, and `request.params` do not matter.

        Args:
            candidates: texts, none of them blank, or token ids.

        Raises:
            UserError: there are none, the request cannot be answered, or the multiple-choice head
                has learnt nothing.

        Example:
            >>> request = Request(persona=["i like tea ."], history=["what do you drink ?"])
            >>> best, *_ = engine.rank(request, ["tea , always .", "i have a dog ."])
            >>> best.index, best.text, best.probability
        """
        return rank(self.model, self.tokenizer, self.layout, request, candidates)

    # --- one step -------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Give every reply under way its next token; what there is to tell of it.

        Events of requests that a loop has added (`generate`, `serve`, `stream`) are that loop's.
        """
        self._advance()
        events, self._jobs.events = self._jobs.events, []
        return events

    @deferred_signals()
    def _advance(self) -> None:
        self._is_stepping = True
        try:
            self._take_step()
        finally:
            self._is_stepping = False
            while self._abandoned:
                self._abandon([self._abandoned.pop()])

    @torch.inference_mode()  # as the tensors of the cache are made and written to
    def _take_step(self) -> None:
        launcher, params = self._launcher, (job.params for job in self._jobs.under_way.values())
        # Which n-grams are banned next, the host has to see.
        must_wait = not launcher.ahead or any(each.no_repeat_ngram_size > 0 for each in params)
        ahead = 0 if must_wait else launcher.ahead
        self._collect(ahead)
        if must_wait:
            self._land()
        try:
            step = self._scheduler.schedule()
            if step is None:
                self._launched.clear()  # what was drawn after the end of replies
                return
            self._launched.append(launcher.launch(step, must_wait=must_wait))
        except BaseException:  # no memory, say: only some of the layers may hold the new tokens
            self._launched.clear()
            self._scheduler.forget()
            raise
        self._collect(ahead)

    def _collect(self, ahead: int) -> None:
        """Take what was launched, but for the `ahead` last launches."""
        while len(self._launched) > ahead:
            try:
                outcomes = self._launched[0]()
                del self._launched[0]
            except BaseException:
                self._launched.clear()
                self._scheduler.forget()
                raise
            try:
                for outcome in outcomes:
                    self._jobs.take(outcome)
            except BaseException:  # of the detokenizer: the others' tokens are drawn again, too
                self._launched.clear()
                self._land()
                raise

    def _land(self) -> None:
        for sequence in self._scheduler.running:
            self._scheduler.land(sequence)
