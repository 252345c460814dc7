"""A store's arrays in a GPU's memory, where batches are made of them."""

import numpy as np
import torch
from torch import Tensor

from convai_fast.data.store import DialogueStore


class StoreOnDevice:
    """What `collate_shared` reads, on a device, and on the host what must be known of its results.

    Args:
        max_length: positions of the model, by which replies are cut.

    Attributes:
        tables: the first five arguments of `collate_shared`, on the device.
    """

    def __init__(
        self, store: DialogueStore, split: str, max_length: int, device: torch.device
    ) -> None:
        own = store.splits[split]
        self.tables = (
            store.tokens.to(device),
            store.utterance_offsets.to(device),
            own.persona_ids.to(device),
            own.history_ids.to(device),
            own.candidate_ids.to(device),
        )
        self._max_length = max_length
        lengths = np.diff(store.utterance_offsets.numpy())
        # Tokens of all sentences, turns and candidates before each.
        self._persona, self._history, self._candidates = (
            np.append(0, np.cumsum(lengths[ids.numpy()]))
            for ids in (own.persona_ids, own.history_ids, own.candidate_ids)
        )

    def branch_ids(self, plan: Tensor) -> Tensor:
        """`branch_ids` of the batch that `collate_shared` makes of these rows, int64 on the CPU."""
        first, count, rotated, kept, turn, num_turns, skipped, candidate, num_candidates = (
            plan.numpy().T
        )

        def tokens(before: np.ndarray, begin: np.ndarray, count: np.ndarray) -> np.ndarray:
            return before[begin + count] - before[begin]

        # A rotation moves the last sentences to the front.
        moved = np.minimum(kept, rotated)
        prefix = 1 + num_turns - skipped + tokens(self._history, turn, num_turns)
        prefix += tokens(self._persona, first + count - rotated, moved)
        prefix += tokens(self._persona, first, kept - moved)

        num_segments = num_candidates + 1
        begins = num_segments.cumsum() - num_segments
        branch = np.arange(num_segments.sum()) - np.repeat(begins, num_segments)
        replies = np.repeat(candidate - 1, num_segments) + branch
        replies = tokens(self._candidates, np.maximum(replies, 0), (branch > 0).astype(np.int64))
        prefixes = np.repeat(prefix, num_segments)
        # Beside a reply stand <speaker1> and <eos>.
        parts = np.minimum(replies, self._max_length - 2 - prefixes) + 2
        return torch.from_numpy(np.repeat(branch, np.where(branch > 0, parts, prefixes)))
