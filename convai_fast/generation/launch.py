"""What is computed of a step, and what comes of it: at once, or on a device that runs ahead."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convai_fast.dialogue.layout import Layout
from convai_fast.generation.backends import Backend, CudaBackend
from convai_fast.generation.backends.decode_loop import ENDED, RowState
from convai_fast.generation.constraints import Constraints
from convai_fast.generation.draft import Draft
from convai_fast.generation.sampler import DAMAGED, Draw, Drawn, Sampler
from convai_fast.generation.scheduler import Step
from convai_fast.model.layers import fetch_later, to_device

STEPS_AHEAD = 4  # tokens a row that one launch draws; a reply that ends wastes half of them


class Outcome(NamedTuple):
    """What came of a draft.

    Attributes:
        flight: what the draft's was then: this is not of one that has landed since.
        tokens, logprobs: what was drawn for it, none of which ends it; its logprobs, if they were
            asked for.
        ending: what comes after them: "eos", why no token could be drawn, or "" where it goes on.
        score: of one that is written; nothing was drawn for it.
    """

    draft: Draft
    flight: int
    tokens: list[int]
    logprobs: list[float]
    ending: str = ""
    score: float | None = None


Launch = Callable[[], list[Outcome]]  # waits for what was launched


class Launcher:
    """Lets a backend compute steps, one token a row, and draws.

    Args:
        backend: computes hidden states and logits.
        score: the multiple-choice head, [rows, n_embd] to [rows, 1].
        layout: tells what ends a reply, and the segment of its tokens.
    """

    ahead = 0  # launches that may be under way while another one is made

    def __init__(self, backend: Backend, score: Callable[[Tensor], Tensor], layout: Layout) -> None:
        self._backend, self._score, self._ends = backend, score, layout.ends
        self._sampler = Sampler()

    def launch(self, step: Step, *, must_wait: bool) -> Launch:
        """Compute the copies and the new tokens of `step`, and draw the tokens after them.

        Args:
            must_wait: whether the next step depends on tokens that the host has to see.
        """
        drafts, others, scores = self._forward(step)
        outcomes: list[Outcome] = []
        if drafts:
            logits = self._backend.logits(others)
            drawn = self._sampler.draw(logits, [self._how(draft) for draft in drafts])
            outcomes += map(self._outcome, drafts, drawn)
        if scores is not None:
            written, values = scores
            outcomes += [
                Outcome(draft, 0, [], [], score=score)
                for draft, score in zip(written, values.squeeze(-1).tolist(), strict=True)
            ]
        return lambda: outcomes

    def _outcome(self, draft: Draft, drawn: Drawn) -> Outcome:
        token, logprob, failure = drawn
        if failure or token in self._ends:
            return Outcome(draft, 0, [], [], failure or "eos")
        return Outcome(draft, 0, [token], [] if logprob is None else [logprob])

    def _forward(self, step: Step) -> tuple[list[Draft], Tensor, tuple[list[Draft], Tensor] | None]:
        """Those to draw for and their hidden states, and those that are written with their scores.

        These have waited for a step, which has computed the <eos> that they are ranked at.
        """
        for copy in step.copies:
            self._backend.copy_prefix(copy)
        drafts: list[Draft] = step.sequences  # type: ignore[assignment]
        hidden = self._backend.forward(step)
        num_written = sum(draft.reply is not None for draft in drafts)
        if not num_written:
            return drafts, hidden, None
        order = sorted(range(len(drafts)), key=lambda i: drafts[i].reply is None)
        hidden = hidden.index_select(0, to_device(torch.tensor(order), hidden.device))
        drafts = [drafts[i] for i in order]
        scores = self._score(hidden[:num_written])
        return drafts[num_written:], hidden[num_written:], (drafts[:num_written], scores)

    def _how(self, draft: Draft) -> Draw:
        if draft.constraints is None:
            prompt = draft.input_ids[: draft.prompt_length]
            draft.constraints = Constraints(draft.job.params, prompt, self._ends)
        draft.constraints.follow(draft.input_ids)
        return Draw(draft.job.params, draft.constraints, draft.step)


class AheadLauncher(Launcher):
    """Lets a backend draw several tokens a row, and more while the host looks at those before.

    A reply that ends is noticed late: what was drawn after its end is dropped.
    """

    ahead = 1

    def __init__(
        self, backend: CudaBackend, score: Callable[[Tensor], Tensor], layout: Layout
    ) -> None:
        super().__init__(backend, score, layout)
        self._loop = backend.decode_loop(layout.ends, layout.speaker1)
        self._vocab_size = backend.vocab_size
        self._flights = count(1)

    def launch(self, step: Step, *, must_wait: bool) -> Launch:
        """See `Launcher`."""
        if must_wait:
            return super().launch(step, must_wait=True)
        # Those that are written wait for their score.
        drafts: list[Draft] = step.flying  # type: ignore[assignment]
        flying = [draft for draft in drafts if not draft.reply]
        new: list[Draft] = []
        scores = None
        if step.sequences:
            new, hidden, scores = self._forward(step)
        written = scores[0] if scores else []
        for draft in new + written:
            draft.flight = next(self._flights)
        everyone = new + flying
        options = {
            "penalise": any(draft.job.params.repetition_penalty != 1 for draft in everyone),
            "logprobs": any(draft.job.params.logprobs for draft in everyone),
        }
        parts = [scores[1]] if scores else []
        if new:
            rows = self._loop.enter([_row_of(draft) for draft in new])
            if options["penalise"]:
                tokens = [draft.input_ids for draft in new]
                self._loop.remember(rows, tokens, self._vocab_size)
            parts += self._loop.draw(hidden, rows, **options)
        if everyone:
            slots = [draft.slot for draft in everyone]
            parts += self._loop.steps(slots, STEPS_AHEAD, **options)
        flights = [draft.flight for draft in written + everyone]
        wait = fetch_later(*parts)

        def outcomes() -> list[Outcome]:
            fetched = [part.numpy() for part in wait()]
            scored = fetched.pop(0).ravel().tolist() if written else []
            found = [
                Outcome(draft, flight, [], [], score=score)
                for draft, flight, score in zip(written, flights, scored, strict=False)
            ]
            if everyone:
                first = fetched[:2] if new else (np.zeros(0),) * 2
                rows = zip(everyone, flights[len(written) :], strict=True)
                found += self._of_rows(rows, first, fetched[-2:])
            return found

        return outcomes

    def _of_rows(
        self,
        rows: Iterable[tuple[Draft, int]],
        first: Sequence[np.ndarray],
        more: Sequence[np.ndarray],
    ) -> Iterator[Outcome]:
        """What was drawn for each draft, for some one token more than for the others.

        Args:
            rows: drafts and their flights.
            first: int64 [new drafts], the first tokens of the first drafts, and float32, their
                log-probabilities, or [0].
            more: int64 [steps, drafts], and float32 [steps, drafts] or [steps, 0].
        """
        tokens, logprobs = more
        columns = tokens.T.tolist()
        known = logprobs.T.tolist() if logprobs.size else [[] for _ in columns]
        for whole, before in zip((columns, known), first, strict=True):
            for column, value in zip(whole, before.tolist(), strict=False):
                column.insert(0, value)
        # Few end within a launch: only those are looked through.
        ends: np.ndarray = np.any((tokens < 0) | np.isin(tokens, self._ends), axis=0)
        ends[: len(first[0])] = True
        for i, (draft, flight) in enumerate(rows):
            drawn, ending = self._until_end(columns[i]) if ends[i] else (columns[i], "")
            yield Outcome(draft, flight, drawn, known[i][: len(drawn)], ending)

    def _until_end(self, column: list[int]) -> tuple[list[int], str]:
        """The tokens before the one that ends a reply, if one does, and how it ends."""
        for i, token in enumerate(column):
            if token in self._ends:
                return column[:i], "eos"
            if token < 0:
                return column[:i], "" if token == ENDED else DAMAGED
        return column, ""


def make_launcher(backend: Backend, score: Callable[[Tensor], Tensor], layout: Layout) -> Launcher:
    """The launcher that makes most of `backend`."""
    kind = AheadLauncher if isinstance(backend, CudaBackend) else Launcher
    return kind(backend, score, layout)  # type: ignore[arg-type]


def _row_of(draft: Draft) -> RowState:
    params = draft.job.params
    return RowState(
        slot=draft.slot,
        length=len(draft.input_ids) - 1,
        counter=draft.step,
        last_counter=draft.first_step + params.max_length - 1,
        first_end=draft.first_step + params.min_length,
        top_k=params.top_k,
        seed=params.seed,
        temperature=0.0 if params.no_sample else params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
    )
