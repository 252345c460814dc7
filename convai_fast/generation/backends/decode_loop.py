"""Decoding that runs ahead of the host: every step draws a token a row, and the host fetches later.

What a reply needs is kept on the device, a row a slot: its last token, where it stands, how it is
drawn. A step reads and writes that alone, and its shapes are fixed by the number of rows: so it is
recorded once as a CUDA graph and then launched as one (NVIDIA, "Getting Started with CUDA Graphs").
On other devices the same step runs without being recorded.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.model.layers import to_device

if TYPE_CHECKING:
    from convai_fast.generation.backends.torch import TorchBackend

ENDED = -2  # instead of a token, of a row that has ended before


class RowState(NamedTuple):
    """One reply, as the loop keeps it.

    Attributes:
        slot: where its keys and values are.
        length: tokens before the last one, which has just been computed, too.
        counter, last_counter: of the random numbers for its next token, and for its last.
        first_end: the counter from which on a special token may end it.
        temperature, top_k, top_p, min_p, seed, repetition_penalty: as in
            `SamplingParams`.
    """

    slot: int
    length: int
    counter: int
    last_counter: int
    first_end: int
    top_k: int
    seed: int
    temperature: float
    top_p: float
    min_p: float
    repetition_penalty: float


_NUM_INTEGERS = 7  # of the fields, which come first
_LENGTH, _COUNTER, _LAST_COUNTER, _FIRST_END, _TOP_K, _SEED, _TOKEN, _RUNS = range(8)
_TEMPERATURE, _TOP_P, _MIN_P, _PENALTY = range(4)


class Attend:
    """What the one new token of each row looks at: those before it in its slot; a `Context`."""

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> None:
        self._keys, self._values, self._slots = keys, values, slots
        self.position_ids = lengths

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Store a layer's new keys and values, and attend to them and to those before."""
        return ops.decode_attention(
            q, k, v, self._keys[layer], self._values[layer], self._slots, self.position_ids
        )


class DecodeLoop:
    """The state of the rows, and the steps that change it.

    Args:
        backend: has the model for inference and the cache, with a slot more than rows; rows that
            have ended write to the last one, which is nobody's.
        ends: the tokens that end a reply.
        segment: the segment of what is drawn.
    """

    def __init__(
        self,
        backend: "TorchBackend",
        ends: Sequence[int],
        segment: int,
    ) -> None:
        self._backend = backend
        self.device, num_rows = backend.keys.device, backend.keys.shape[1]
        self.nobodys_slot = num_rows - 1
        self._ends = torch.tensor(list(ends), device=self.device)
        self._segment = torch.tensor(segment, device=self.device)
        self._integers = torch.zeros(num_rows, 8, dtype=torch.int64, device=self.device)
        self._floats = torch.ones(num_rows, 4, device=self.device)
        self._seen: Tensor | None = None  # [rows, vocab_size], once a penalty needs it
        self._graphs: dict[tuple[int, bool, bool], _Recorded] = {}
        self._recorded_capacity = backend.capacity
        if self.device.type == "cuda":
            # Graphs run one after another, and so may use the same memory. It is shared only where
            # they are recorded on one stream, and torch's own is the first device's.
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    def enter(self, rows: Sequence[RowState]) -> Tensor:
        """Keep new rows, of which no token is drawn yet; returns their slots on the device."""
        integers = torch.tensor([row[:_NUM_INTEGERS] for row in rows], dtype=torch.int64)
        floats = torch.tensor([row[_NUM_INTEGERS:] for row in rows], dtype=torch.float32)
        integers = to_device(integers, self.device)
        slots = integers[:, 0].contiguous()
        runs = torch.ones_like(integers[:, :2])  # and a token that `draw` overwrites
        self._integers.index_copy_(0, slots, torch.cat([integers[:, 1:], runs], 1))
        self._floats.index_copy_(0, slots, to_device(floats, self.device))
        return slots

    def remember(self, rows: Tensor, tokens: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Note the tokens of rows that make these less likely, in place of what was noted."""
        if self._seen is None:
            shape = len(self._integers), vocab_size
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._seen.index_fill_(0, rows, False)
        places = [(i, token) for i, row in enumerate(tokens) for token in row]
        which, token_ids = to_device(torch.tensor(places), self.device).unbind(1)
        self._seen.index_put_((rows[which], token_ids), torch.ones_like(which, dtype=torch.bool))

    def draw(
        self, hidden: Tensor, slots: Tensor, *, penalise: bool = False, logprobs: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw the next token of rows from their hidden states, and keep it.

        Args:
            hidden: [rows, n_embd].
            slots: int64 [rows].
            penalise: whether there are rows with a repetition penalty.
            logprobs: whether to return log-probabilities.

        Returns:
            int64 [rows], the token; -1 where none can be drawn, `ENDED` where the row had ended;
            and float32 [rows], its log-probability, or [0].
        """
        state, how = self._integers.index_select(0, slots), self._floats.index_select(0, slots)
        logits = self._backend.lm_head(hidden)
        if penalise:
            assert self._seen is not None  # `remember` was called
            seen, penalty = self._seen.index_select(0, slots), how[:, _PENALTY, None]
            lower = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen, lower.to(logits.dtype), logits)
        counter, runs = state[:, _COUNTER], state[:, _RUNS] > 0
        may_not_end = (counter < state[:, _FIRST_END])[:, None]
        logits[:, self._ends] = logits[:, self._ends].masked_fill(may_not_end, -torch.inf)
        tokens, known = ops.sample(
            logits,
            temperature=how[:, _TEMPERATURE],
            top_k=state[:, _TOP_K],
            top_p=how[:, _TOP_P],
            min_p=how[:, _MIN_P],
            seeds=state[:, _SEED],
            steps=counter,
            return_logprobs=logprobs,
        )
        ends = (tokens < 0) | (tokens[:, None] == self._ends).any(1)
        ends |= counter >= state[:, _LAST_COUNTER]
        state[:, _LENGTH] += runs
        state[:, _COUNTER] += runs
        state[:, _TOKEN] = tokens.clamp(min=0)
        state[:, _RUNS] = runs & ~ends
        self._integers.index_copy_(0, slots, state)
        if penalise and self._seen is not None:
            self._seen.index_put_((slots, state[:, _TOKEN]), torch.ones_like(runs))
        return tokens.masked_fill(~runs, ENDED), hidden.new_empty(0) if known is None else known

    def step(
        self, rows: Tensor, *, penalise: bool = False, logprobs: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the last token of each row, and draw the next one: see `draw`."""
        state = self._integers.index_select(0, rows)
        runs = state[:, _RUNS] > 0
        slots = rows.masked_fill(~runs, self.nobodys_slot)
        lengths = state[:, _LENGTH].masked_fill(~runs, 0)
        context = Attend(self._backend.keys, self._backend.values, slots, lengths)
        segments = self._segment.expand(len(rows))
        hidden = self._backend.transformer(state[:, _TOKEN], segments, context)
        return self.draw(hidden, rows, penalise=penalise, logprobs=logprobs)

    def steps(
        self, slots: Sequence[int], count: int, *, penalise: bool, logprobs: bool
    ) -> tuple[Tensor, Tensor]:
        """Take `count` steps of the rows in these slots.

        Returns:
            int64 [count, rows], and float32 [count, rows] or [count, 0], as `step` returns them.
        """
        num_rows = _bucket(len(slots), self.nobodys_slot)
        padding = [self.nobodys_slot] * (num_rows - len(slots))
        rows = to_device(torch.tensor([*slots, *padding]), self.device)
        if self.device.type == "cuda":
            if self._backend.capacity != self._recorded_capacity:  # another cache than they read
                self._graphs.clear()
                self._recorded_capacity = self._backend.capacity
            key = (num_rows, penalise, logprobs)
            if key not in self._graphs:
                self._graphs[key] = _Recorded(self, *key)
            step = self._graphs[key].of(rows)
        else:
            step = partial(self.step, rows, penalise=penalise, logprobs=logprobs)
        drawn = [tuple(x.clone() for x in step()) for _ in range(count)]
        tokens, known = (torch.stack(part)[:, : len(slots)] for part in zip(*drawn, strict=True))
        return tokens, known


class _Recorded:
    """A step of so many rows as a graph, whose tensors stay where they are."""

    def __init__(self, loop: DecodeLoop, num_rows: int, penalise: bool, logprobs: bool) -> None:
        self._rows = torch.full((num_rows,), loop.nobodys_slot, device=loop.device)
        step = partial(loop.step, self._rows, penalise=penalise, logprobs=logprobs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(loop.device):
            current = torch.cuda.current_stream()
            loop.stream.wait_stream(current)
            with torch.cuda.stream(loop.stream):  # libraries make what they need at a first call
                for _ in range(2):
                    step()
            current.wait_stream(loop.stream)
            with torch.cuda.graph(
                self._graph,
                pool=loop.pool,
                stream=loop.stream,
                capture_error_mode="thread_local",  # others may use CUDA, for another model say
            ):
                self._drawn = step()

    def of(self, rows: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """A function that launches the step of these rows; what it returns the next overwrites."""
        self._rows.copy_(rows)
        return self._replay

    def _replay(self) -> tuple[Tensor, Tensor]:
        self._graph.replay()
        return self._drawn


def _bucket(count: int, most: int) -> int:
    """How many rows a step has that is to hold `count`: the next power of two, or `most`."""
    return min(1 << (count - 1).bit_length(), most)
