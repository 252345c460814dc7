"""Batches of at most so many tokens, of examples of similar length."""

import numpy as np

from convai_fast.data.gathered import CANDIDATE_COUNT
from convai_fast.data.index import ExampleIndex
from convai_fast.data.options import Layout
from convai_fast.data.shuffle import permutation

# Lengths are rounded up to a multiple of this, so that there are many examples of each to change
# places, for a fiftieth of the room in a batch.
_GRAIN = 8


class BudgetedBatches:
    """Cuts examples into batches under a budget once, and deals them out anew in each epoch.

    In the order of their rounded lengths, batches are cut by lengths alone, whichever of the
    examples with one length comes first: so all epochs have equally many. With a budget of 40, of
    examples a to e with the rounded lengths 8, 8, 16, 16 and 24:

        8  8 16 | 16 24        one epoch: a b c | d e        another: c e | b a d

    Args:
        rows: of the index, the examples of an epoch; one may stand there twice.
        max_tokens: of a batch as it is collated, in the padded layout with its padding. A longer
            example is a batch of its own.
    """

    def __init__(
        self, index: ExampleIndex, rows: np.ndarray, max_tokens: int, layout: Layout
    ) -> None:
        is_padded = layout == "padded"
        lengths = (index.padded_lengths if is_padded else index.shared_lengths)[rows]
        lengths = -(-lengths.astype(np.int64) // _GRAIN) * _GRAIN
        counts = index.plan[rows, CANDIDATE_COUNT] if is_padded else np.zeros_like(lengths)
        order = np.lexsort((counts, lengths))
        self._rows, lengths, counts = rows[order], lengths[order], counts[order]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = (lengths[1:] != lengths[:-1]) | (counts[1:] != counts[:-1])
        self._kinds = is_new.cumsum()  # examples of one kind may change places
        begins: list[int] = []
        begin = most = tokens = 0
        for i, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
            most = max(most, count)
            tokens = (i + 1 - begin) * most * length if is_padded else tokens + length
            if i == 0 or tokens > max_tokens:
                begin, most, tokens = i, count, length
                begins.append(i)
        self._begins = np.array(begins, np.int64)
        self._sizes = np.diff(self._begins, append=len(rows))

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._begins)

    def epoch(self, seed: int, epoch: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch, batch after batch, and the batch of each, from 0.

        With `shuffle` both are drawn from (seed, epoch), else the shortest come first.
        """
        examples, batches = np.arange(len(self._rows)), np.arange(len(self))
        if shuffle:
            examples = permutation(len(examples), "examples", seed, epoch)
            examples = examples[self._kinds[examples].argsort(kind="stable")]
            batches = permutation(len(batches), "batches", seed, epoch)
        sizes = self._sizes[batches]
        shifts = self._begins[batches] - (sizes.cumsum() - sizes)
        places = np.arange(len(examples)) + np.repeat(shifts, sizes)
        return self._rows[examples[places]], np.repeat(np.arange(len(batches)), sizes)
