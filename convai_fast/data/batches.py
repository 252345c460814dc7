"""Batches of examples, in an order that depends on (seed, epoch) alone."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.data.index import ExampleIndex, index_examples
from convai_fast.data.store import DialogueStore
from convai_fast.dialogue.format import IGNORED

# Examples are sorted by length within pools of this many batches: enough to leave little padding,
# few enough that batches of one length do not follow one another.
_BATCHES_PER_POOL = 64

_CANDIDATE_COUNT = ops.PLAN_COLUMNS.index("candidate_count")


Layout = Literal["shared", "padded"]


class Batch(TypedDict):
    """A batch in either layout, with the names of the model's arguments: `model(**batch)`.

    In the shared-prefix layout (see `convai_fast.ops.collate_shared`) all but the last two are
    int64 [num_tokens], or [batch + 1] for `offsets`, which stay on the CPU. In the padded layout
    `input_ids`, `token_type_ids` and `labels` are int64 [batch, num_candidates, seq_len].
    `mc_token_ids`: int64 [batch, num_candidates], -1 where an example has no such candidate.
    `mc_labels`: int64 [batch], the position of the true reply.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: NotRequired[Tensor]
    branch_ids: NotRequired[Tensor]
    offsets: NotRequired[Tensor]
    labels: Tensor
    mc_token_ids: Tensor
    mc_labels: Tensor


def count_tokens(batch: Batch) -> int:
    """Tokens that the model reads in a batch, without padding."""
    if "offsets" in batch:
        return len(batch["input_ids"])
    return int((batch["mc_token_ids"] + 1).sum())


def spread(num_rows: int, max_rows: int) -> np.ndarray:
    """`max_rows` of `num_rows` rows, spread evenly; all where there are no more, or if it is 0."""
    if 0 < max_rows < num_rows:
        return np.arange(max_rows) * num_rows // max_rows
    return np.arange(num_rows)


def _weighted(rows: np.ndarray, counts: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """`rows` of the plan with those of each source as often as its weight says.

    One weight holds for all sources: those of a store of several, which is named once.
    A weight of 2.5 repeats each row twice, and half of them, spread evenly, once more.
    """
    ends = np.cumsum(counts)
    source_of = np.searchsorted(ends, rows % ends[-1], "right")
    parts = []
    for source, weight in enumerate(np.broadcast_to(weights, len(counts))):
        own, whole = rows[source_of == source], int(weight)
        num_more = round((weight - whole) * len(own))
        parts += [own] * whole + ([own[spread(len(own), num_more)]] if num_more else [])
    return np.concatenate(parts)


class Share(NamedTuple):
    """How much a rank's means of a batch count in the mean over ranks, 1 being an equal part.

    With d ranks, `tokens` is d times the rank's labelled tokens over all ranks', and `examples` d
    times its examples over theirs: the ranks' mean of share times mean is the mean over the whole
    batch.
    """

    tokens: float
    examples: float


class DialogueBatches:
    """Iterates over one split of a store in batches of examples of similar length.

    With `shuffle`, the order is drawn anew for each epoch from (seed, epoch). After
    `set_epoch(epoch, start)` the next iteration begins at batch `start`, which is how a run
    continues where it was stopped.

    Over `world_size` ranks, a batch is what one rank with `batch_size * world_size` would have, and
    each rank takes every world_size-th example of it; `shares` says what its part counts. Where
    nothing is left for a rank, it gets an example without labels, so that all have equally many
    batches.

    Args:
        store, split: where the examples are.
        batch_size: examples a batch and rank.
        num_candidates: candidates an example, the last ones; 0 for all.
        max_history: exchanges of history: an example keeps `2 * max_history + 1` turns.
        max_length: positions of the model; what is cut to fit is counted in `cuts`.
        layout: "shared" for one copy of what an example's candidates share and no padding, or
            "padded". The same seed gives the same batches in both.
        personality_permutations: how often each example is seen, each time with its persona
            rotated by one sentence more.
        max_examples: keep only so many examples, spread evenly over the split (0: all).
        weights: how often an epoch sees the examples of each of the store's sources: 2 is twice,
            0.5 every other one; a single weight holds for all sources.
    """

    def __init__(
        self,
        store: DialogueStore,
        split: str,
        *,
        batch_size: int,
        num_candidates: int,
        max_history: int,
        max_length: int,
        layout: Layout = "shared",
        personality_permutations: int = 1,
        max_examples: int = 0,
        weights: Sequence[float] = (),
        shuffle: bool = False,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.store, self.tables = store, store.splits[split]
        self.batch_size, self.max_length, self.layout = batch_size, max_length, layout
        self.shuffle, self.seed, self.pin_memory = shuffle, seed, pin_memory
        self.rank, self.world_size = rank, world_size
        index = index_examples(
            store,
            split,
            max_history=max_history,
            num_candidates=num_candidates,
            max_length=max_length,
            personality_permutations=personality_permutations,
        )
        self.index, self.plan, self.cuts = index, index.plan, index.cuts
        self.rows = spread(len(self.plan), max_examples)
        if any(weight != 1 for weight in weights):
            counts = store.meta["num_examples"][split]
            self.rows = _weighted(self.rows, counts, weights)
        self.set_epoch(0)

    @property
    def num_examples(self) -> int:
        """Examples an epoch, over all ranks; each persona permutation counts."""
        return len(self.rows)

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return -(-len(self.rows) // (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw the order of `epoch`, and begin the next iteration at batch `start`."""
        rows, size = self.rows, self.batch_size * self.world_size
        generator = np.random.default_rng((self.seed, epoch))
        if self.shuffle:
            rows = generator.permutation(rows)
            pool = size * _BATCHES_PER_POOL
        else:
            pool = max(1, len(rows))
        lengths = self.index.shared_lengths
        pools = [rows[i : i + pool] for i in range(0, len(rows), pool)]
        rows = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools] or [rows])
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        if self.shuffle:
            batches = [batches[i] for i in generator.permutation(len(batches))]
        self._batches = [batch[self.rank :: self.world_size] for batch in batches]
        self._start = start

        pairs = list(zip(self._batches, batches, strict=True))
        self.shares = [self._share(part, batch) for part, batch in pairs]
        self._epoch = _Gathered(
            self.index, [part if len(part) else batch[:1] for part, batch in pairs]
        )

    def _share(self, part: np.ndarray, batch: np.ndarray) -> Share:
        if self.world_size == 1:
            return Share(1.0, 1.0)
        num_labels = self.index.num_labels
        tokens = float(num_labels[part].sum() / max(1, num_labels[batch].sum()))
        return Share(tokens * self.world_size, len(part) / len(batch) * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        for i in range(start, len(self)):
            yield self[i]

    def rows_of(self, i: int) -> np.ndarray:
        """Which rows of `plan` are the examples of batch `i`; empty where nothing is left for a
        rank."""
        return self._batches[i]

    def __getitem__(self, i: int) -> Batch:
        """Batch `i` of this epoch."""
        batch = self._collate(self._epoch, i)
        if len(self._batches[i]) == 0:
            batch["labels"].fill_(IGNORED)
            batch["mc_labels"] = torch.full_like(batch["mc_labels"], IGNORED)
        return batch

    def collate(self, rows: np.ndarray) -> Batch:
        """The batch of these rows of the plan."""
        return self._collate(_Gathered(self.index, [rows]), 0)

    def _collate(self, gathered: "_Gathered", i: int) -> Batch:
        begin, end, num_candidates, seq_len, num_tokens = gathered.batches[i]
        arguments = (
            self.store.tokens,
            self.store.utterance_offsets,
            self.tables.persona_ids,
            self.tables.history_ids,
            self.tables.candidate_ids,
            gathered.plan[begin:end],
            self.store.special_ids,
            num_candidates,
        )
        mc_labels = gathered.mc_labels[begin:end]
        if self.layout == "padded":
            input_ids, token_type_ids, labels, mc_token_ids = ops.collate(
                *arguments, seq_len, self.pin_memory
            )
            return Batch(
                input_ids=input_ids,
                token_type_ids=token_type_ids,
                labels=labels,
                mc_token_ids=mc_token_ids,
                mc_labels=mc_labels,
            )
        offsets = gathered.offsets[begin : end + 1] - gathered.offsets[begin]
        input_ids, token_type_ids, position_ids, branch_ids, labels, mc_token_ids = (
            ops.collate_shared(*arguments, offsets, num_tokens, self.max_length, self.pin_memory)
        )
        return Batch(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            branch_ids=branch_ids,
            offsets=offsets,
            labels=labels,
            mc_token_ids=mc_token_ids,
            mc_labels=mc_labels,
        )


class _Gathered:
    """The rows of many batches side by side, so that a batch costs a few slices and one call."""

    def __init__(self, index: ExampleIndex, batches: list[np.ndarray]) -> None:
        rows = np.concatenate([*batches, np.zeros(0, np.int64)])
        plan = index.plan[rows]
        counts, padded_lengths = plan[:, _CANDIDATE_COUNT], index.padded_lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(index.shared_lengths[rows], dtype=np.int64)])
        self.plan = torch.from_numpy(plan)
        self.mc_labels = torch.from_numpy(counts - 1)
        self.offsets = torch.from_numpy(offsets)
        ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64).tolist()
        begins = [0, *ends][: len(ends)]
        self.batches = [  # first and last row, num_candidates, seq_len, num_tokens
            (
                begin,
                end,
                int(counts[begin:end].max(initial=0)),
                int(padded_lengths[begin:end].max(initial=0)),
                int(offsets[end] - offsets[begin]),
            )
            for begin, end in zip(begins, ends, strict=True)
        ]
