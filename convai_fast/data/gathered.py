"""What the batches of an epoch have in common, computed for all of them at once."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.data.index import ExampleIndex

_WINDOW = 256  # batches that are cut apart at once: tensor by tensor costs four times as much

CANDIDATE_COUNT = ops.PLAN_COLUMNS.index("candidate_count")


class BatchTables(NamedTuple):
    """What is known of a batch before it is collated.

    Attributes:
        plan: int64 [batch, 9], its rows of the plan.
        mc_labels: int64 [batch], which candidate is the true reply.
        offsets: int64 [batch + 1], where each example begins in the shared layout.
        label_positions: int64 [num_labels], the tokens that have a label there, counted from the
            batch's first.
    """

    plan: Tensor
    mc_labels: Tensor
    offsets: Tensor
    label_positions: Tensor


class Gathered:
    """The rows of many batches side by side, so that a batch costs a look-up and one call."""

    def __init__(self, index: ExampleIndex, batches: list[np.ndarray]) -> None:
        rows = np.concatenate([*batches, np.zeros(0, np.int64)])
        plan = index.plan[rows]
        counts, padded_lengths = plan[:, CANDIDATE_COUNT], index.padded_lengths[rows]
        tokens = np.append(0, np.cumsum(index.shared_lengths[rows], dtype=np.int64))
        sizes = np.array([len(batch) for batch in batches], np.int64)
        ends = sizes.cumsum()
        begins = ends - sizes
        # Of each batch, from 0 to its number of tokens: one more than it has rows.
        offsets = np.zeros(len(rows) + len(batches), np.int64)
        places = np.arange(len(rows)) + np.repeat(np.arange(len(batches)), sizes) + 1
        offsets[places] = tokens[1:] - np.repeat(tokens[begins], sizes)
        self._plan = torch.from_numpy(plan)
        self._mc_labels = torch.from_numpy(counts - 1)
        self._offsets = torch.from_numpy(offsets)
        self._prefix_lengths = index.prefix_lengths[rows]
        # The labels of a row are one run of its last tokens, but for the eos of a reply that was
        # cut, which has none.
        self._num_labels = index.num_labels[rows].astype(np.int64)
        self._label_ends = offsets[places] - index.is_cut[rows]
        self._window: tuple[int, list[BatchTables]] = (-1, [])  # its number, and what is in it
        self.batches = [  # first and last row, num_candidates, seq_len, num_tokens
            (
                begin,
                end,
                int(counts[begin:end].max(initial=0)),
                int(padded_lengths[begin:end].max(initial=0)),
                int(tokens[end] - tokens[begin]),
            )
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        ]

    def tables(self, i: int) -> BatchTables:
        """What is known of batch `i`."""
        number, place = divmod(i, _WINDOW)
        window = self._window
        if window[0] != number:
            window = self._window = number, self._cut_apart(number)
        return window[1][place]

    def prefix_lengths(self, i: int) -> np.ndarray:
        """Tokens that the candidates of each example of batch `i` share, int32 [batch]."""
        begin, end, *_ = self.batches[i]
        return self._prefix_lengths[begin:end]

    def _cut_apart(self, number: int) -> list[BatchTables]:
        batches = self.batches[number * _WINDOW :][:_WINDOW]
        first, last = batches[0][0], batches[-1][1]
        sizes = [end - begin for begin, end, *_ in batches]
        before = number * _WINDOW  # batches, each of which has one offset more than it has rows
        offsets = self._offsets[first + before : last + before + len(batches)]
        positions, num_labels = self._find_labels(first, [end for _, end, *_ in batches])
        parts = zip(
            self._plan[first:last].split(sizes),
            self._mc_labels[first:last].split(sizes),
            offsets.split([size + 1 for size in sizes]),
            positions.split(num_labels),
            strict=True,
        )
        return [BatchTables(*part) for part in parts]

    def _find_labels(self, first: int, ends: list[int]) -> tuple[Tensor, list[int]]:
        """Where the labels of the batches from row `first` to `ends` are, and how many of each.

        Two rows of a batch that end at 7 and at 12, with 2 and 3 labels: 5, 6, 9, 10, 11.
        """
        counts = self._num_labels[first : ends[-1]]
        totals = np.append(0, counts.cumsum())
        row_ends = self._label_ends[first : ends[-1]]
        places = np.arange(totals[-1]) + np.repeat(row_ends - totals[1:], counts)
        num_labels = np.diff(totals[np.array(ends) - first], prepend=0)
        return torch.from_numpy(places), num_labels.tolist()
