"""The requests under way: what a step makes of their drafts, and what there is to tell of them."""

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import replace

from convai_fast.dialogue.layout import Layout
from convai_fast.dialogue.prompt import Prompt
from convai_fast.generation.detokenizer import Detokenizer, TextPieces
from convai_fast.generation.draft import Draft, Job
from convai_fast.generation.events import Done, Event, Failed, Tokens
from convai_fast.generation.launch import Outcome
from convai_fast.generation.request import FinishReason, Reply, Request
from convai_fast.generation.sampler import ALL_BANNED
from convai_fast.generation.scheduler import Scheduler, TokenSequence

_NO_SCORE = "no draft can be ranked, since its score is no number: the model's weights are damaged"


class Jobs:
    """Gives a request its drafts, lets each go on or end as a step comes out, and tells of it.

    Attributes:
        under_way: the requests that are not done, by their ids.
        mailboxes: where the events of some requests go, those that a loop has added.
        events: those of the others, until somebody takes them.
    """

    def __init__(self, scheduler: Scheduler, detokenizer: Detokenizer, layout: Layout) -> None:
        self._scheduler, self._detokenizer, self._layout = scheduler, detokenizer, layout
        self.under_way: dict[Hashable, Job] = {}
        self.mailboxes: dict[Hashable, deque[Event]] = {}
        self.events: list[Event] = []

    @property
    def num_unfinished(self) -> int:
        """How many requests are under way, or done without anybody having heard of it."""
        return len(self.under_way) + sum(not isinstance(event, Tokens) for event in self.events)

    def knows(self, id: Hashable) -> bool:
        """Whether a request with this id is under way, or has events that nobody has taken."""
        return id in self.under_way or any(event.id == id for event in self.events)

    def add(self, id: Hashable, request: Request, prompt: Prompt, stream: bool) -> None:
        """Have the scheduler run the drafts of a request."""
        keys = self._scheduler.keys_of(*prompt)
        job = Job(id, request)
        tokens = TokenSequence(id, *prompt, keys)
        job.drafts = [Draft(job, index, tokens) for index in range(job.params.num_drafts)]
        if stream:
            for draft in job.drafts:
                draft.pieces = TextPieces(self._detokenizer)
        self.under_way[id] = job
        self._scheduler.add(job.drafts)

    def cancel(self, id: Hashable) -> None:
        """Forget a request, if it is under way, and what there was to tell of it."""
        if self.under_way.pop(id, None) is not None:
            self._scheduler.cancel(id)
        self.events = [event for event in self.events if event.id != id]

    def take(self, outcome: Outcome) -> None:
        """Let a draft go on, end or fail, as it came out."""
        draft, flight, tokens, logprobs, ending, score = outcome
        # A job that failed with another of its replies, or a draft that ended before.
        if self.under_way.get(draft.id) is not draft.job or draft.flight != flight:
            return
        if score is not None:
            if math.isnan(score):
                self._fail(draft, _NO_SCORE)
            else:
                assert draft.reply is not None  # which has waited for its score
                self._complete(draft, replace(draft.reply, score=score))
            return
        # Where a text may end it, or somebody waits for it, one at a time.
        size = 1 if draft.job.params.stop or draft.pieces else len(tokens)
        for i in range(0, len(tokens), size or 1):
            self._extend(draft, tokens[i : i + size], logprobs[i : i + size])
            if draft.slot < 0 or draft.reply:
                return
        if ending == "eos":
            self._finish(draft, "eos")
        elif ending:
            self._fail(draft, ending)

    def _extend(self, draft: Draft, tokens: list[int], logprobs: list[float]) -> None:
        """Let a reply go on with tokens that do not end it, unless by their number or a text."""
        params, length = draft.job.params, len(draft.input_ids)
        try:
            draft.logprobs[draft.num_drawn :] = logprobs
            draft.extend(tokens, self._layout.speaker1)
            stop_at = self._detokenizer.find_stop(draft.token_ids, params) if params.stop else -1
            if stop_at >= 0:
                self._finish(draft, "stop", stop_at)
            elif draft.num_drawn == params.max_length:
                self._finish(draft, "length")
            elif draft.pieces:
                certain = self._detokenizer.num_certain(draft.token_ids, params.stop)
                self._tell_tokens(draft, certain)
        except BaseException:  # of the detokenizer: the next step draws the tokens again
            self._scheduler.truncate(draft, length)
            raise

    def _finish(self, draft: Draft, reason: FinishReason, stop_at: int | None = None) -> None:
        token_ids, params = draft.token_ids, draft.job.params
        text = self._detokenizer.text(token_ids)[:stop_at]
        reply = Reply(token_ids, text, reason, draft.logprobs if params.logprobs else None)
        count = len(token_ids)
        if reason == "stop" and (draft.pieces or params.best_of > 1):
            count = self._detokenizer.num_within(token_ids, len(text))
        if draft.pieces:
            self._tell_tokens(draft, count, text)
        if params.best_of > 1:
            # Ranked as in training: at the <eos> after what is returned, in the next step.
            draft.reply = reply
            self._scheduler.truncate(draft, draft.prompt_length + count)
            draft.extend([self._layout.eos], self._layout.speaker1)
        else:
            self._complete(draft, reply)

    def _fail(self, draft: Draft, reason: str) -> None:
        # What is no number in the cache has spread within it, also to tokens that others share.
        self._scheduler.cancel(draft.id, keep_prefixes=False)
        self.cancel(draft.id)
        self._tell(Failed(draft.id, reason, is_requests_fault=reason == ALL_BANNED))

    def _complete(self, draft: Draft, reply: Reply) -> None:
        job = draft.job
        self._scheduler.remove(draft)
        job.replies[draft.index] = reply
        if len(job.replies) < len(job.drafts):
            return
        del self.under_way[job.id]
        self._tell(Done(job.id, job.result(), draft.prompt_length))

    def _tell_tokens(self, draft: Draft, count: int, whole_text: str | None = None) -> None:
        """Tell the first `count` tokens, of which some have been told; at the end all of the text.

        The count never falls: what was certain stays so.
        """
        assert draft.pieces is not None  # it is streamed
        first = len(draft.pieces.token_ids)
        new = draft.token_ids[first:count]
        logprobs = draft.logprobs[first:count] if draft.job.params.logprobs else None
        text = draft.pieces.add(new)
        if whole_text is not None:
            text += draft.pieces.end(whole_text)
        if new or text:
            self._tell(Tokens(draft.id, draft.index, new, text, logprobs))

    def _tell(self, event: Event) -> None:
        self.mailboxes.get(event.id, self.events).append(event)
