"""Generation on a GPU: one attention call a layer for all slots, and nothing waits for the device.

Correct and simple for now: a step's queries are padded to the sequence with the most new tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.generation.backends.torch import TorchBackend
from convai_fast.generation.scheduler import Copy, Step
from convai_fast.model.context import Context
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import to_device


class CudaBackend(TorchBackend):
    """The weights and the cache of `TorchBackend`, and attention of all slots at once."""

    def __init__(self, model: DoubleHeadsModel, num_slots: int, weights: str = "float32") -> None:
        super().__init__(model, num_slots, weights)
        self._used = np.zeros(num_slots, np.int64)  # tokens of each slot that were written to

    def context(self, step: Step) -> Context:
        """See `TorchBackend`."""
        self._clear(step)
        return CudaStep(self.keys, self.values, step)

    def _clear(self, step: Step) -> None:
        """Zero what a slot holds beyond its own tokens, which were another reply's.

        A mask hides it, but a weight of 0 times NaN is NaN.
        """
        begins, ends = step.past, self._used[step.slots]
        counts = np.maximum(ends - begins, 0)
        self._used[step.slots] = step.past + step.counts
        if not counts.any():
            return
        first = counts.cumsum() - counts
        places = np.arange(counts.sum()) + np.repeat(begins - first, counts)
        table = torch.from_numpy(np.stack([np.repeat(step.slots, counts), places]))
        slots, positions = to_device(table, self.keys.device)
        self.keys[:, slots, positions] = 0
        self.values[:, slots, positions] = 0

    def copy_prefix(self, copy: Copy) -> None:
        """See `Backend`."""
        super().copy_prefix(copy)
        self._used[copy.slot] = max(self._used[copy.slot], copy.length)


class CudaStep:
    """The new tokens of several sequences, one sequence after another; a `Context`.

    All slots are attended for, those without new tokens too: keys and values are read where they
    are. With two new tokens in slot 2 and one in slot 0, the queries are, by slot:

        slot 0   c .       slot 1   . .       slot 2   a b       slot_ids 2 2 0     place 4 5 0
    """

    def __init__(self, keys: Tensor, values: Tensor, step: Step) -> None:
        num_slots, device = keys.shape[1], keys.device
        width = int(step.counts.max())
        length = int((step.past + step.counts).max())
        slot_ids = np.repeat(step.slots, step.counts)
        place = slot_ids * width + step.position_ids - np.repeat(step.past, step.counts)
        positions = np.zeros(num_slots * width, np.int64)  # padding sees the first key
        positions[place] = step.position_ids
        tables = np.concatenate([slot_ids, place, step.position_ids, positions])
        count = len(place)
        self._slot_ids, self._place, self.position_ids, positions_of_all = to_device(
            torch.from_numpy(tables), device
        ).split([count, count, count, len(positions)])
        self._keys, self._values = keys[:, :, :length], values[:, :, :length]
        key_positions = torch.arange(length, device=device)
        self._shape = (num_slots, width)
        self._mask = key_positions <= positions_of_all.view(num_slots, 1, width, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Store a layer's new keys and values, and attend to them and to those before."""
        keys, values = self._keys[layer], self._values[layer]
        keys[self._slot_ids, self.position_ids] = k
        values[self._slot_ids, self.position_ids] = v
        num_slots, width = self._shape
        queries = q.new_zeros(num_slots * width, *q.shape[1:]).index_copy(0, self._place, q)
        out = F.scaled_dot_product_attention(
            queries.unflatten(0, self._shape).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self._mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # [num_slots, num_heads, width, head_dim]
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self._place)
