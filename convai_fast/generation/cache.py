"""The keys and values of tokens already seen, so that each token is computed once."""

import torch
from torch import Tensor

from convai_fast.model.config import TransformerConfig


class KVCache:
    """Preallocated keys and values of every layer, [n_layer, batch, n_head, max_length, head_dim].

    `Transformer.forward` calls `update` in each layer and then `advance` once. All rows of the
    batch have the same `length`. The tensors are written in place: use it without autograd.

    Args:
        config: gives the number of layers and heads, and their width.
        batch_size: number of rows.
        max_length: how many tokens a row can hold.
        dtype: what the model computes its keys in: bfloat16 under bfloat16 autocast.
        device: where the model is.

    Example:
        >>> cache = KVCache(model.config, batch_size=1, max_length=64)
        >>> hidden = model.transformer(prompt_ids, kv_cache=cache)   # [1, len(prompt), n_embd]
        >>> hidden = model.transformer(next_id, kv_cache=cache)      # [1, 1, n_embd]
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_head, max_length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store `key` and `value` [batch, n_head, new, head_dim] of one layer after what is there.

        Returns views [batch, n_head, length + new, head_dim] of all keys and all values so far.

        Raises:
            ValueError: they do not fit, or are of another batch size.
        """
        if key.shape[0] != self.keys.shape[1]:
            raise ValueError(
                f"the cache was made for {self.keys.shape[1]} rows, not for {key.shape[0]}."
            )
        end = self.length + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"{end} tokens do not fit a cache made for {self.max_length}.")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n: int) -> None:
        """Count the `n` tokens that every layer has now stored."""
        self.length += n

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            ValueError: there are not that many.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length} tokens: the cache holds {self.length}.")
        self.length = length

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        self.length = 0
