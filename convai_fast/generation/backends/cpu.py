"""Generation on a CPU: packed weights, and keys and values as `cached_attention` reads them."""

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.generation.backends.backend import WEIGHTS, Backend
from convai_fast.generation.scheduler import Copy, Step
from convai_fast.model.context import Context
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.packed import PackedLinear, for_inference, rows_alone

_MULTIPLE = 64  # of a slot's capacity and of a value's width: what `cached_attention` reads at once


class CpuBackend(Backend):
    """Weights are packed in the format asked for, and multiplied in it; the rest is float32.

    int8 is an approximation. Unless weights are float32, keys and values are kept in bfloat16.
    """

    def __init__(self, model: DoubleHeadsModel, num_slots: int, weights: str = "float32") -> None:
        config, dtype = model.config, WEIGHTS[weights]
        self.transformer = for_inference(
            model.transformer, torch.float32, rows_alone(dtype), config.activation
        )
        self.lm_head = PackedLinear(model.transformer.token_embedding.weight, None, dtype)
        self._heads = (config.n_layer, num_slots, config.n_kv_head)
        self._head_dim = config.head_dim
        self._dtype = dtype if dtype == torch.float32 else torch.bfloat16
        self.keys, self.values = self._allocate(num_slots, capacity=1)

    def _make(self, capacity: int) -> tuple[Tensor, Tensor]:
        capacity = -(-capacity // _MULTIPLE) * _MULTIPLE
        width = -(-self._head_dim // _MULTIPLE) * _MULTIPLE
        blocks = (capacity // ops.PANEL, self._head_dim, ops.PANEL)
        # Empty: memory that no token was written to is not taken from the machine.
        keys = torch.empty(*self._heads, *blocks, dtype=self._dtype)
        return keys, torch.empty(*self._heads, capacity, width, dtype=self._dtype)

    @property
    def capacity(self) -> int:
        """See `Backend`."""
        return self.values.shape[-2]

    def copy_prefix(self, copy: Copy) -> None:
        """See `Backend`."""
        blocks = -(-copy.length // ops.PANEL)
        self.keys[:, copy.slot, :, :blocks] = self.keys[:, copy.source, :, :blocks]
        self.values[:, copy.slot, :, : copy.length] = self.values[:, copy.source, :, : copy.length]

    def context(self, step: Step) -> Context:
        """See `Backend`."""
        return CpuStep(self.keys, self.values, step)


class CpuStep:
    """The new tokens of several sequences, one sequence after another; a `Context`."""

    def __init__(self, keys: Tensor, values: Tensor, step: Step) -> None:
        self._keys, self._values = keys, values
        offsets = np.concatenate([[0], step.counts.cumsum()])
        self._tables = [torch.from_numpy(table) for table in (step.slots, offsets, step.past)]
        self.position_ids = torch.from_numpy(step.position_ids)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Store a layer's new keys and values, and attend to them and to those before."""
        return ops.cached_attention(q, k, v, self._keys[layer], self._values[layer], *self._tables)
