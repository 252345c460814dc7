"""The keys and values of tokens already seen, so that each token is computed once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.errors import UserError
from convai_fast.model.config import TransformerConfig
from convai_fast.ops.reference import PANEL

_MULTIPLE = 64  # of a slot's capacity and of a value's width: what `cached_attention` reads at once


class KVCache:
    """Slots for the keys and values of sequences, which come, grow and go one by one.

    A slot remembers which tokens it holds, also when its sequence is done, so that another sequence
    that begins alike can copy what they share. A token is known by its key, an int64 that stands
    for token id and segment id together.

    Args:
        config: gives the number of layers and heads, and their width.
        num_slots: number of sequences that can be held at a time.
        capacity: tokens of a sequence, rounded up; `reserve` makes room for more.
        dtype, device: what the model computes in, and where.

    Example:
        >>> cache = KVCache(model.config, num_slots=2, capacity=64)
        >>> step = cache.extend([0, 1], [prompt_keys, other_keys])   # one sequence in each slot
        >>> hidden = transformer(input_ids, token_type_ids, kv_cache=step)   # [1, tokens, n_embd]
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
        self._head_dim = config.head_dim
        self._options = {"dtype": dtype, "device": device}
        self.lengths = np.zeros(num_slots, np.int64)
        self.keys, self.values, self.tokens = self._allocate(capacity)

    def _allocate(self, capacity: int) -> tuple[Tensor, Tensor, np.ndarray]:
        capacity = -(-capacity // _MULTIPLE) * _MULTIPLE
        width = -(-self._head_dim // _MULTIPLE) * _MULTIPLE
        blocks = (capacity // PANEL, self._head_dim, PANEL)
        try:
            # Empty: memory that no token was written to is not taken from the machine.
            keys = torch.empty(*self._heads, *blocks, **self._options)
            values = torch.empty(*self._heads, capacity, width, **self._options)
            return keys, values, np.full((self.num_slots, capacity), -1, np.int64)
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"there is no memory for the keys and values of {self.num_slots} sequences of "
                f"{capacity} tokens: choose a smaller batch size"
            ) from error

    @property
    def capacity(self) -> int:
        """Tokens that a slot can hold."""
        return self.values.shape[-2]

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of `capacity` tokens; what the slots hold stays.

        Raises:
            UserError: there is not the memory.
        """
        if capacity <= self.capacity:
            return
        keys, values, tokens = self._allocate(max(capacity, 2 * self.capacity))
        keys[..., : self.keys.shape[-3], :, :] = self.keys
        values[..., : self.capacity, :] = self.values
        tokens[:, : self.capacity] = self.tokens
        self.keys, self.values, self.tokens = keys, values, tokens

    def shared_lengths(self, keys: np.ndarray) -> np.ndarray:
        """How many of the first tokens each slot has in common with `keys`: int64 [num_slots].

        Those of a slot's tokens that are promised but not computed yet count too.
        """
        differs = self.tokens[:, : len(keys)] != keys
        return np.where(differs.any(1), differs.argmax(1), len(keys))

    def begin(self, slot: int, keys: np.ndarray, source: int, shared: int) -> None:
        """Give `slot` to a new sequence, whose first `shared` tokens are those of `source`.

        `keys` are all the tokens that it is going to begin with: others may wait for them.
        """
        if source != slot and shared > 0:
            self.lengths[slot] = 0  # what an interrupted copy leaves is nobody's
            blocks = -(-shared // PANEL)
            self.keys[:, slot, :, :blocks] = self.keys[:, source, :, :blocks]
            self.values[:, slot, :, :shared] = self.values[:, source, :, :shared]
        self.lengths[slot] = shared
        self.tokens[slot] = -1
        self.tokens[slot, : len(keys)] = keys

    def extend(self, slots: Sequence[int], keys: Sequence[np.ndarray]) -> "CacheStep":
        """What `Transformer.forward` needs to add these tokens, `keys[i]` to the slot `slots[i]`.

        They count as computed from here on.

        Raises:
            ValueError: they do not fit.
        """
        slots = np.asarray(slots, np.int64)
        counts = np.array([len(tokens) for tokens in keys], np.int64)
        lengths = self.lengths[slots]
        if len(slots) and (lengths + counts).max() > self.capacity:
            raise ValueError(
                f"{(lengths + counts).max()} tokens do not fit a slot made for {self.capacity}."
            )
        for slot, length, tokens in zip(slots, lengths, keys, strict=True):
            self.tokens[slot, length : length + len(tokens)] = tokens
        self.lengths[slots] += counts
        return CacheStep(self, slots, counts, lengths)


class CacheStep:
    """The tokens of one forward pass: several sequences' new tokens, one sequence after another.

    Attributes:
        position_ids: int64 [tokens], each token's place in its own sequence.
        last: int64 [sequences], the row of each sequence's last token.
    """

    def __init__(
        self, cache: KVCache, slots: np.ndarray, counts: np.ndarray, lengths: np.ndarray
    ) -> None:
        self._cache = cache
        offsets = np.concatenate([[0], counts.cumsum()])
        device = cache.keys.device
        self._tables = [torch.from_numpy(table) for table in (slots, offsets, lengths)]
        # 5 and 6 for two tokens after 5, then 0, 1 and 2 for three of a new sequence.
        positions = np.arange(offsets[-1]) + np.repeat(lengths - offsets[:-1], counts)
        self.position_ids = torch.from_numpy(positions).to(device)
        self.last = torch.from_numpy(offsets[1:] - 1).to(device)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Store the keys and values in `qkv` [1, tokens, 3 * n_embd]; attend to all so far.

        Returns [1, tokens, n_embd].
        """
        cache = self._cache
        return ops.cached_attention(
            qkv.flatten(0, -2), cache.keys[layer], cache.values[layer], *self._tables
        )[None]
