"""What the batches of an epoch have in common, computed for all of them at once."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.data.index import ExampleIndex

_LABEL_BATCHES = 256  # whose labels are found at once, so that a batch costs a slice

_CANDIDATE_COUNT = ops.PLAN_COLUMNS.index("candidate_count")


class _Labels(NamedTuple):
    """Where the labels of `_LABEL_BATCHES` batches are, one batch after another."""

    number: int  # of these batches among all, counted so many at a time
    positions: Tensor
    bounds: list[int]  # where each batch's begin among them, and where the last one's end


class Gathered:
    """The rows of many batches side by side, so that a batch costs a few slices and one call."""

    def __init__(self, index: ExampleIndex, batches: list[np.ndarray]) -> None:
        rows = np.concatenate([*batches, np.zeros(0, np.int64)])
        plan = index.plan[rows]
        counts, padded_lengths = plan[:, _CANDIDATE_COUNT], index.padded_lengths[rows]
        tokens = np.append(0, np.cumsum(index.shared_lengths[rows], dtype=np.int64))
        sizes = np.array([len(batch) for batch in batches], np.int64)
        ends = sizes.cumsum()
        begins = ends - sizes
        # Of each batch, from 0 to its number of tokens: one more than it has rows.
        offsets = np.zeros(len(rows) + len(batches), np.int64)
        places = np.arange(len(rows)) + np.repeat(np.arange(len(batches)), sizes) + 1
        offsets[places] = tokens[1:] - np.repeat(tokens[begins], sizes)
        self.plan = torch.from_numpy(plan)
        self.mc_labels = torch.from_numpy(counts - 1)
        self.offsets = torch.from_numpy(offsets)
        # The labels of a row are one run of its last tokens, but for the <eos> of a reply that was
        # cut, which has none.
        self._num_labels = index.num_labels[rows].astype(np.int64)
        self._label_ends = offsets[places] - index.is_cut[rows]
        self._labels = _Labels(-1, torch.zeros(0, dtype=torch.int64), [])
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

    def label_positions(self, i: int) -> Tensor:
        """int64 [num_labels], those of batch `i`, counted from its first token."""
        number, place = divmod(i, _LABEL_BATCHES)
        labels = self._labels
        if labels.number != number:
            labels = self._labels = self._find_labels(number)
        return labels.positions[labels.bounds[place] : labels.bounds[place + 1]]

    def _find_labels(self, number: int) -> _Labels:
        """Two rows of a batch that end at 7 and at 12, with 2 and 3 labels: 5, 6, 9, 10, 11."""
        batches = self.batches[number * _LABEL_BATCHES :][:_LABEL_BATCHES]
        first, last = batches[0][0], batches[-1][1]
        counts = self._num_labels[first:last]
        totals = np.append(0, counts.cumsum())
        row_ends = self._label_ends[first:last]
        places = np.arange(totals[-1]) + np.repeat(row_ends - totals[1:], counts)
        bounds = [0, *(int(totals[end - first]) for _, end, *_ in batches)]
        return _Labels(number, torch.from_numpy(places), bounds)
