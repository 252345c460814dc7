"""The keys and values of tokens already seen, so that each token is computed once."""

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.errors import UserError
from convai_fast.generation.scheduler import Copy, Step
from convai_fast.model.config import TransformerConfig
from convai_fast.ops.reference import PANEL

_MULTIPLE = 64  # of a slot's capacity and of a value's width: what `cached_attention` reads at once


class KVCache:
    """Slots for the keys and values of sequences; which tokens are in them its scheduler knows.

    Args:
        config: gives the number of layers and heads, and their width.
        num_slots: number of sequences that can be held at a time.
        capacity: tokens of a sequence, rounded up; `reserve` makes room for more.
        dtype, device: what the model computes in, and where.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_slots: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_slots = num_slots
        self._heads = (config.n_layer, num_slots, config.n_head)
        self._head_dim, self._most = config.head_dim, config.n_positions
        self._options = {"dtype": dtype, "device": device}
        self.keys, self.values = self._allocate(capacity)

    def _allocate(self, capacity: int) -> tuple[Tensor, Tensor]:
        capacity = -(-capacity // _MULTIPLE) * _MULTIPLE
        width = -(-self._head_dim // _MULTIPLE) * _MULTIPLE
        blocks = (capacity // PANEL, self._head_dim, PANEL)
        try:
            # Empty: memory that no token was written to is not taken from the machine.
            keys = torch.empty(*self._heads, *blocks, **self._options)
            return keys, torch.empty(*self._heads, capacity, width, **self._options)
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"there is no memory for the keys and values of {self.num_slots} sequences of "
                f"{capacity} tokens: choose a smaller batch size"
            ) from error

    @property
    def capacity(self) -> int:
        """Tokens that a slot can hold."""
        return self.values.shape[-2]

    @torch.inference_mode()  # as they are written to
    def reserve(self, capacity: int) -> None:
        """Make room for sequences of `capacity` tokens; what the slots hold stays.

        Raises:
            UserError: there is not the memory.
        """
        if capacity <= self.capacity:
            return
        keys, values = self._allocate(max(capacity, min(2 * self.capacity, self._most)))
        keys[..., : self.keys.shape[-3], :, :] = self.keys
        values[..., : self.capacity, :] = self.values
        self.keys, self.values = keys, values

    def copy(self, copy: Copy) -> None:
        """Let a slot begin as another one does."""
        blocks = -(-copy.length // PANEL)
        self.keys[:, copy.slot, :, :blocks] = self.keys[:, copy.source, :, :blocks]
        self.values[:, copy.slot, :, : copy.length] = self.values[:, copy.source, :, : copy.length]


class CacheStep:
    """The tokens of one forward pass: several sequences' new tokens, one sequence after another.

    Attributes:
        position_ids: int64 [tokens], each token's place in its own sequence.
    """

    def __init__(self, cache: KVCache, step: Step) -> None:
        self._cache = cache
        offsets = np.concatenate([[0], step.counts.cumsum()])
        self._tables = [torch.from_numpy(table) for table in (step.slots, offsets, step.past)]
        self.position_ids = torch.from_numpy(step.position_ids).to(cache.keys.device)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Store the keys and values in `qkv` [1, tokens, 3 * n_embd]; attend to all so far.

        Returns [1, tokens, n_embd].
        """
        cache = self._cache
        return ops.cached_attention(
            qkv.flatten(0, -2), cache.keys[layer], cache.values[layer], *self._tables
        )[None]
