"""A store's arrays in a GPU's memory, where batches are made of them."""

import numpy as np
import torch
from torch import Tensor

from convai_fast.data.store import DialogueStore
from convai_fast.ops import LAYOUT_NUMBERS


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
        first = int(store.layout_numbers[LAYOUT_NUMBERS.index("reply")])
        # The last one is nobody's: it is looked up, and not used, where a prefix begins.
        self._replies = np.append(lengths[first + own.candidate_ids.numpy()], 0)

    def branch_ids(self, plan: Tensor, prefix_lengths: np.ndarray) -> Tensor:
        """`branch_ids` of the batch that `collate_shared` makes of these rows, int64 on the CPU.

        Args:
            prefix_lengths: int32 [batch], see `ExampleIndex`.
        """
        first, num_candidates = plan.numpy().T[-2:]
        num_parts = num_candidates + 1
        begins = num_parts.cumsum() - num_parts
        branch = np.arange(num_parts.sum()) - np.repeat(begins, num_parts)
        replies = self._replies[np.repeat(first - 1, num_parts) + branch]
        prefixes = np.repeat(prefix_lengths, num_parts)
        # Beside a reply stand the tokens before and after it.
        parts = np.minimum(replies, self._max_length - 2 - prefixes) + 2
        return torch.from_numpy(np.repeat(branch, np.where(branch > 0, parts, prefixes)))
