"""Generation on a GPU: prompts in one pass without padding, and a loop that decodes by itself."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from convai_fast.generation.backends.decode_loop import DecodeLoop
from convai_fast.generation.backends.torch import TorchBackend
from convai_fast.generation.scheduler import Step
from convai_fast.model.context import Context
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import to_device
from convai_fast.ops.varlen_attention import varlen_attention


class CudaBackend(TorchBackend):
    """The weights of `TorchBackend`, and a cache that is made anew for long sequences alone.

    Attributes:
        keys, values: [layers, slots + 1, capacity, num_kv_heads, head_dim]. The last slot is
            nobody's: there the loop leaves what nobody wants.
    """

    prefill_tokens = 16_384
    first_capacity = 2048  # of models with more positions, which few sequences use

    def __init__(self, model: DoubleHeadsModel, num_slots: int, weights: str = "float32") -> None:
        capacity = min(model.config.n_positions, self.first_capacity)
        super().__init__(model, num_slots + 1, weights, capacity)
        self.vocab_size = model.config.vocab_size

    def decode_loop(self, ends: Sequence[int], segment: int) -> DecodeLoop:
        """Steps that draw by themselves, of tokens in this segment."""
        return DecodeLoop(self, ends, segment)

    def context(self, step: Step) -> Context:
        """See `TorchBackend`."""
        return CudaStep(self.keys, self.values, step)


class CudaStep:
    """The new tokens of several sequences, one sequence after another; a `Context`.

    A sequence's queries look at the keys of its slot up to their own, which are gathered. With two
    new tokens after three in slot 5, and one in slot 0, of slots for 100 tokens:

        cu_queries 0 2 3        places 500 501 502 503 504 | 0        cu_keys 0 5 6
    """

    def __init__(self, keys: Tensor, values: Tensor, step: Step) -> None:
        capacity, counts = keys.shape[2], step.counts
        num_keys = step.past + counts
        cu_keys = np.append(0, np.cumsum(num_keys))
        first = step.slots * capacity - cu_keys[:-1]
        places = np.arange(cu_keys[-1]) + np.repeat(first, num_keys)
        new = np.repeat(step.slots * capacity, counts) + step.position_ids
        tables = np.concatenate([step.position_ids, new, places])
        sizes = [len(new), len(new), len(places)]
        self.position_ids, self._new, self._places = to_device(
            torch.from_numpy(tables), keys.device
        ).split(sizes)
        bounds = to_device(
            torch.from_numpy(np.concatenate([step.offsets, cu_keys]).astype(np.int32)), keys.device
        )
        self._cu_queries, self._cu_keys = bounds.chunk(2)
        self._most = int(counts.max()), int(num_keys.max())
        self._keys, self._values = keys.flatten(1, 2), values.flatten(1, 2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Store a layer's new keys and values, and attend to them and to those before."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._new, k)
        values.index_copy_(0, self._new, v)
        past_keys, past_values = (x.index_select(0, self._places) for x in (keys, values))
        return varlen_attention(
            q, past_keys, past_values, self._cu_queries, self._cu_keys, *self._most
        )
