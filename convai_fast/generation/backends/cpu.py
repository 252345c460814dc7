"""Generation on a CPU: packed weights, one operator a step, and keys and values packed too."""

from functools import partial

import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.generation.backends.backend import WEIGHTS, Backend
from convai_fast.generation.scheduler import Copy, Step
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.packed import pack_decoder


class CpuBackend(Backend):
    """Weights are packed in the format asked for, and multiplied in it; the rest is float32.

    int8 is an approximation. Unless weights are float32, keys and values are kept in bfloat16.
    """

    def __init__(self, model: DoubleHeadsModel, num_slots: int, weights: str = "float32") -> None:
        config, dtype = model.config, WEIGHTS[weights]
        self.decoder, head = pack_decoder(model, dtype)
        self.lm_head = partial(ops.packed_linear, weight=head)
        self.n_positions, self._has_segments = config.n_positions, config.segments
        self._heads = (config.n_layer, num_slots, config.n_kv_head)
        self._head_dim = config.head_dim
        self._dtype = dtype if dtype == torch.float32 else torch.bfloat16
        self.keys, self.values = self._allocate(num_slots, capacity=1)

    def _make(self, capacity: int) -> tuple[Tensor, Tensor]:
        return ops.make_cache(
            *self._heads, capacity=capacity, head_dim=self._head_dim, dtype=self._dtype
        )

    @property
    def capacity(self) -> int:
        """See `Backend`."""
        return self.keys.shape[3] * ops.BLOCK

    def copy_prefix(self, copy: Copy) -> None:
        """See `Backend`."""
        blocks = -(-copy.length // ops.BLOCK)
        self.keys[:, copy.slot, :, :blocks] = self.keys[:, copy.source, :, :blocks]
        words = -(-copy.length // self.values.shape[-1])
        self.values[:, copy.slot, ..., :words, :, :] = self.values[
            :, copy.source, ..., :words, :, :
        ]

    def forward(self, step: Step) -> Tensor:
        """See `Backend`."""
        return ops.decoder_step(
            self.decoder,
            torch.from_numpy(step.input_ids),
            torch.from_numpy(step.token_type_ids) if self._has_segments else None,
            torch.from_numpy(step.slots),
            torch.from_numpy(step.offsets),
            torch.from_numpy(step.past),
            self.keys,
            self.values,
        )
