"""Generation in plain PyTorch on any device: what the other backends must equal."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.errors import UserError
from convai_fast.generation.backends.backend import WEIGHTS, Backend
from convai_fast.generation.scheduler import Copy, Step
from convai_fast.model.context import Context
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import to_device, vocabulary_head
from convai_fast.model.packed import for_inference


class TorchBackend(Backend):
    """The model's own layers, in its dtype or in bfloat16, and attention a sequence at a time.

    Attributes:
        keys, values: [layers, slots, capacity, num_kv_heads, head_dim].
    """

    def __init__(
        self, model: DoubleHeadsModel, num_slots: int, weights: str = "float32", capacity: int = 1
    ) -> None:
        embedding, config = model.transformer.token_embedding.weight, model.config
        if weights == "int8":
            raise UserError(f"int8 weights are for the CPU, and the model is on {embedding.device}")
        dtype = embedding.dtype if weights == "float32" else WEIGHTS[weights]
        self.transformer = for_inference(model.transformer, dtype)
        tied = self.transformer.token_embedding.weight  # in one memory, also in another dtype
        head = tied if model.lm_head is None else model.lm_head.detach().to(dtype)
        self.lm_head = vocabulary_head(head)
        self.n_positions = config.n_positions
        self._shape = (config.n_layer, num_slots, config.n_kv_head, config.head_dim)
        self.keys, self.values = self._allocate(num_slots, capacity)

    def _make(self, capacity: int) -> tuple[Tensor, Tensor]:
        layers, slots, *heads = self._shape
        weight = self.transformer.token_embedding.weight
        # Zeros, not NaN by chance: what a mask hides is multiplied by a weight of 0.
        make = partial(weight.new_zeros, (layers, slots, capacity, *heads))
        return make(), make()

    @property
    def capacity(self) -> int:
        """See `Backend`."""
        return self.keys.shape[2]

    def copy_prefix(self, copy: Copy) -> None:
        """See `Backend`."""
        for cache in (self.keys, self.values):
            cache[:, copy.slot, : copy.length] = cache[:, copy.source, : copy.length]

    def context(self, step: Step) -> Context:
        """What the new tokens look at: attending stores their keys and values as well."""
        return TorchStep(self.keys, self.values, step)

    def forward(self, step: Step) -> Tensor:
        """See `Backend`."""
        device = self.keys.device
        input_ids, token_type_ids, last = (
            to_device(torch.from_numpy(ids), device)
            for ids in (step.input_ids, step.token_type_ids, step.last)
        )
        wanted = None if len(last) == len(input_ids) else last
        return self.transformer(input_ids, token_type_ids, self.context(step), wanted)


class TorchStep:
    """The new tokens of several sequences, one sequence after another; a `Context`."""

    def __init__(self, keys: Tensor, values: Tensor, step: Step) -> None:
        self._keys, self._values = keys, values
        self._sequences = list(
            zip(step.slots.tolist(), step.past.tolist(), step.counts.tolist(), strict=True)
        )
        self.position_ids = torch.from_numpy(step.position_ids).to(keys.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Store a layer's new keys and values, and attend to them and to those before."""
        out, first = torch.empty_like(q), 0
        for slot, past, count in self._sequences:
            new, end = slice(first, first + count), past + count
            keys, values = self._keys[layer, slot, :end], self._values[layer, slot, :end]
            keys[past:], values[past:] = k[new], v[new]
            # Query i, at position past + i, sees the keys up to its own.
            mask = torch.ones(count, end, dtype=torch.bool, device=q.device).tril(past)
            out[new] = F.scaled_dot_product_attention(
                q[new].transpose(0, 1),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                attn_mask=mask,
                enable_gqa=q.shape[1] != k.shape[1],
            ).transpose(0, 1)
            first += count
        return out
