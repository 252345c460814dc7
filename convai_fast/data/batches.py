"""Batches of examples, in an order that depends on (seed, epoch) alone.

Not on the number of processes, nor on how a step's examples are cut into batches: 2 processes, 8
batches of 1 and 2 batches of 4 take the same steps, and a run may go on with others than it began.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict, cast, final, get_args

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.data.gathered import Gathered
from convai_fast.data.index import index_examples
from convai_fast.data.on_device import StoreOnDevice
from convai_fast.data.options import Layout
from convai_fast.data.shuffle import permutation
from convai_fast.data.store import DialogueStore
from convai_fast.data.token_budget import BudgetedBatches
from convai_fast.dialogue.format import IGNORED
from convai_fast.errors import UserError

# Examples are sorted by length within pools, and stay together in runs of similar length, which are
# shuffled: long enough to leave little padding, short enough that a step sees many lengths.
_POOL = 1024
_RUN = 16


@final
class PaddedBatch(TypedDict):
    """A batch in the padded layout: the arguments of transformers' double-heads classes.

    Attributes:
        input_ids, token_type_ids, labels: int64 [batch, num_candidates, seq_len].
        mc_token_ids: int64 [batch, num_candidates], the position of each candidate's last token;
            -1 where an example has no such candidate.
        mc_labels: int64 [batch], which candidate is the true reply.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    labels: Tensor
    mc_token_ids: Tensor
    mc_labels: Tensor


@final
class SharedBatch(TypedDict):
    """A batch in the shared-prefix layout (see `convai_fast.ops.collate_shared`).

    As in the padded layout its names are those of the model's arguments: `model(**batch)`.

    Attributes:
        input_ids, token_type_ids, position_ids, branch_ids, labels: int64 [num_tokens].
        offsets: int64 [batch + 1], where each example begins.
        label_positions: int64 [num_labels], the tokens that have a label, so that nobody has to
            search for them.
        mc_token_ids: int64 [batch, num_candidates], which of the tokens is a candidate's last; -1
            where an example has no such candidate.
        mc_labels: int64 [batch], which candidate is the true reply.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    branch_ids: Tensor
    offsets: Tensor
    labels: Tensor
    label_positions: Tensor
    mc_token_ids: Tensor
    mc_labels: Tensor


Batch = SharedBatch | PaddedBatch


def tensors_of(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that is in a batch."""
    for name, tensor in batch.items():
        assert isinstance(tensor, Tensor)
        yield name, tensor


def count_tokens(batch: Batch) -> int:
    """Tokens that the model reads in a batch, without padding."""
    if "offsets" in batch:
        return len(batch["input_ids"])
    return int((batch["mc_token_ids"] + 1).sum())


def count_labels(batch: Batch) -> int:
    """Labelled tokens of a batch."""
    if "label_positions" in batch:
        return len(batch["label_positions"])
    return int((batch["labels"] != IGNORED).sum())


def count_examples(batch: Batch) -> int:
    """Labelled examples of a batch."""
    return int((batch["mc_labels"] != IGNORED).sum())


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
    """How much a rank's means of a batch count in the means of the optimizer step.

    With d ranks, `tokens` is d times the batch's labelled tokens over the step's, and `examples` d
    times its examples over those of the step: summed over its batches, and averaged over ranks, as
    gradients are, share times mean is the mean over the whole step.
    """

    tokens: float
    examples: float


class DialogueBatches:
    """Iterates over one split of a store in batches of examples of similar length.

    With `shuffle`, the order is drawn anew for each epoch from (seed, epoch). After
    `set_epoch(epoch, start)` the batches are those of the examples from `start` on, which is how a
    run continues where it was stopped.

    A step takes the next `batch_size * batches_per_step * world_size` examples, in batches of
    similar length; `steps` says which batches are one, `step_examples` how many examples it has
    over all ranks, and `shares` what each batch counts in it. Of each, a rank takes every
    world_size-th example. With `batch_tokens` a step takes the next
    `batches_per_step * world_size` of an epoch's batches, and a rank every world_size-th of them.
    Where nothing is left for a rank, it gets an example without labels, so that all have equally
    many batches.

    Args:
        store, split: where the examples are.
        batch_size: examples a batch and rank, unless `batch_tokens` is given.
        batch_tokens: tokens a batch and rank, as they are collated, at most; a longer example is a
            batch of its own. 0: go by `batch_size`.
        batches_per_step: batches whose gradients are added up in one optimizer step.
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
        pin_memory: make batches in page-locked memory, or of what lies in it, for CUDA transfers.
        device: keep the store's arrays there, and make batches there, but for what the host must
            know: `branch_ids`, `offsets`, `label_positions` and `mc_labels`. Not in the padded
            layout.

    Raises UserError for a split that is not there and a layout or size of batches that makes no
    sense; ValueError for what `index_examples` refuses.
    """

    def __init__(
        self,
        store: DialogueStore,
        split: str,
        *,
        batch_size: int,
        batch_tokens: int = 0,
        batches_per_step: int = 1,
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
        device: torch.device | None = None,
    ) -> None:
        if split not in store.splits:
            raise UserError(f"there is no split {split!r}: choose from {', '.join(store.splits)}")
        if layout not in get_args(Layout):
            raise UserError(f"layout is {layout!r}, but must be {' or '.join(get_args(Layout))}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("batch_tokens", batch_tokens, 0),
            ("batches_per_step", batches_per_step, 1),
        ):
            if value < least:
                raise UserError(f"{name} is {value}, but must be at least {least}")
        self.store, self.tables = store, store.splits[split]
        self._store_tables = (
            store.tokens,
            store.utterance_offsets,
            self.tables.persona_ids,
            self.tables.history_ids,
            self.tables.candidate_ids,
        )
        self._on_device = None
        if device is not None:
            if layout != "shared":
                raise UserError("batches are made on a device in the layout shared alone")
            self._on_device = StoreOnDevice(store, split, max_length, device)
        self.batch_size, self.max_length, self.layout = batch_size, max_length, layout
        self.batches_per_step = batches_per_step
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
        self._budgeted = (
            BudgetedBatches(index, self.rows, batch_tokens, layout) if batch_tokens else None
        )
        self.set_epoch(0)

    @property
    def num_examples(self) -> int:
        """Examples an epoch, over all ranks; each persona permutation counts."""
        return len(self.rows)

    def num_steps(self, epoch: int, start: int = 0) -> int:
        """Steps of `epoch` from its example `start` on; whole epochs have equally many."""
        batches_of_all = self.batches_per_step * self.world_size
        if self._budgeted is None:
            return -(-(self.num_examples - start) // (self.batch_size * batches_of_all))
        _, batch_of = self._budgeted.epoch(self.seed, epoch, self.shuffle)
        left = len(self._budgeted) - batch_of[start] if start < len(batch_of) else 0
        return -(-int(left) // batches_of_all)

    def __len__(self) -> int:
        """Batches that `set_epoch` has set, the same on every rank."""
        return len(self._batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw the order of `epoch`, and set the batches of its examples from `start` on."""
        rows, batch_of, is_own = self._deal(epoch, start)
        step_of = batch_of // self.batches_per_step
        count = int(batch_of[-1]) + 1 if len(rows) else 0
        firsts = range(0, count, self.batches_per_step)
        self.steps = [range(i, min(i + self.batches_per_step, count)) for i in firsts]
        self.step_examples: list[int] = np.bincount(step_of).tolist()

        own, own_batch = rows[is_own], batch_of[is_own]
        num_own = np.bincount(own_batch, minlength=count)
        self._batches = np.split(own, num_own.cumsum()[:-1]) if count else []
        num_labels = self.index.num_labels
        own_labels = np.bincount(own_batch, num_labels[own], count)
        step_of_batch = np.arange(count) // self.batches_per_step
        labels = np.maximum(1, np.bincount(step_of, num_labels[rows]))[step_of_batch]
        examples = np.bincount(step_of)[step_of_batch]
        shares = zip(own_labels / labels, num_own / examples, strict=True)
        self.shares = [Share(*(float(self.world_size * part) for part in pair)) for pair in shares]
        any_of = rows[np.searchsorted(batch_of, np.arange(count))]  # the first of each batch
        parts = zip(self._batches, any_of[:, None], strict=True)
        self._epoch = Gathered(
            self.index, [part if len(part) else another for part, another in parts]
        )

    def _deal(self, epoch: int, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of the plan from example `start` of `epoch` on, in which batch of a rank each
        is, from 0, and whether that is this rank."""
        if self._budgeted is not None:
            rows, batch_of = self._budgeted.epoch(self.seed, epoch, self.shuffle)
            rows, number = rows[start:], batch_of[start:] - batch_of[start : start + 1]
            return rows, number // self.world_size, number % self.world_size == self.rank
        rows, size = self._order(epoch)[start:], self.batch_size * self.world_size
        place = np.arange(len(rows))
        step_of = place // (size * self.batches_per_step)
        rows = rows[np.lexsort((self.index.shared_lengths[rows], step_of))]
        return rows, place // size, place % size % self.world_size == self.rank

    def _order(self, epoch: int) -> np.ndarray:
        """The rows of the plan as `epoch` takes them."""
        rows, lengths = self.rows, self.index.shared_lengths
        if not self.shuffle:
            return rows[np.argsort(lengths[rows], kind="stable")]
        rows = rows[permutation(len(rows), "examples", self.seed, epoch)]
        runs = []
        for begin in range(0, len(rows), _POOL):
            pool = rows[begin : begin + _POOL]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            runs += [pool[i : i + _RUN] for i in range(0, len(pool), _RUN)]
        # A shorter run comes last, lest the steps after it be of two lengths each.
        whole = len(rows) // _RUN
        order = [*permutation(whole, "runs", self.seed, epoch), *range(whole, len(runs))]
        return np.concatenate([*(runs[i] for i in order), rows[:0]])

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
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
            if self.layout == "shared":
                batch = cast(SharedBatch, batch)
                batch["label_positions"] = batch["label_positions"][:0]
        return batch

    def shared(self, i: int) -> SharedBatch:
        """Batch `i` of batches in the shared-prefix layout."""
        assert self.layout == "shared"
        return cast(SharedBatch, self[i])

    def collate(self, rows: np.ndarray) -> Batch:
        """The batch of these rows of the plan."""
        return self._collate(Gathered(self.index, [rows]), 0)

    def _collate(self, gathered: Gathered, i: int) -> Batch:
        *_, num_candidates, seq_len, num_tokens = gathered.batches[i]
        plan, mc_labels, offsets, label_positions = gathered.tables(i)
        tables = self._store_tables
        if self._on_device is not None:
            tables = self._on_device.tables
            if self.pin_memory:
                plan, offsets = plan.pin_memory(), offsets.pin_memory()
        arguments = (*tables, plan, self.store.layout_numbers, num_candidates)
        if self.layout == "padded":
            input_ids, token_type_ids, labels, mc_token_ids = ops.collate(
                *arguments, seq_len, self.pin_memory
            )
            return PaddedBatch(
                input_ids=input_ids,
                token_type_ids=token_type_ids,
                labels=labels,
                mc_token_ids=mc_token_ids,
                mc_labels=mc_labels,
            )
        input_ids, token_type_ids, position_ids, branch_ids, labels, mc_token_ids = (
            ops.collate_shared(*arguments, offsets, num_tokens, self.max_length, self.pin_memory)
        )
        if self._on_device is not None:
            branch_ids = self._on_device.branch_ids(plan, gathered.prefix_lengths(i))
        return SharedBatch(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            branch_ids=branch_ids,
            offsets=offsets,
            labels=labels,
            label_positions=label_positions,
            mc_token_ids=mc_token_ids,
            mc_labels=mc_labels,
        )
