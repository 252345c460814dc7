"""The model as the engine runs it: its linear layers packed for the CPU, or its own on a GPU."""

from copy import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convai_fast import _native, ops
from convai_fast.errors import UserError
from convai_fast.generation.cache import CacheStep, KVCache
from convai_fast.generation.scheduler import Step
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.transformer import MLP

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed once; see `convai_fast.ops.packed_linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.gelu = False
        self.weight = ops.pack_weight(weight, dtype)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in_features] to [..., out_features]."""
        return ops.packed_linear(x, self.weight, self.bias, self.gelu)


class Decoder:
    """Computes the logits of the next token, for several sequences at once.

    On a CPU everything is computed in float32 from linear layers packed in the format asked for, of
    which int8 is an approximation; unless they are float32, keys and values are kept in bfloat16.
    On a GPU the layers are the model's own, in its dtype or in bfloat16. `model` is left as it is,
    in training mode too, and what needs no conversion is shared with it: after changing its
    weights, make a new decoder.

    Raises UserError for a format that there is not.
    """

    def __init__(self, model: DoubleHeadsModel, num_slots: int, weights: str = "float32") -> None:
        if weights not in WEIGHTS:
            raise UserError(f"weights is {weights!r}, but must be one of {', '.join(WEIGHTS)}")
        embedding = model.transformer.token_embedding.weight
        self.device = embedding.device
        on_cpu = self.device.type == "cpu"
        if weights == "int8" and not on_cpu:
            raise UserError(f"int8 weights are for the CPU, and the model is on {self.device}")
        # What is computed in, and what is kept in the cache.
        dtype = torch.float32 if on_cpu else embedding.dtype
        cache_dtype = dtype if weights == "float32" else torch.bfloat16
        # Without the compiled operators a packed weight is unpacked at every call, which takes nine
        # times as long as the layer as it is.
        if on_cpu and (weights != "float32" or _native.host is not None):
            gelu = model.config.activation == "gelu_new"
            self._transformer = _twin(model.transformer, dtype, WEIGHTS[weights], gelu)
            self._lm_head = PackedLinear(embedding, None, WEIGHTS[weights])
        else:
            self._transformer = _twin(model.transformer, dtype if on_cpu else cache_dtype)
            self._lm_head = partial(F.linear, weight=self._transformer.token_embedding.weight)

        self.cache = KVCache(
            model.config, num_slots, capacity=1, dtype=cache_dtype, device=self.device
        )

    def reserve(self, capacity: int) -> None:
        """Make room in the cache for sequences of `capacity` tokens.

        Raises:
            UserError: there is not the memory.
        """
        self.cache.reserve(capacity)

    def forward(self, step: Step) -> Tensor:
        """Hidden states [sequences, n_embd] at the last token of each sequence of `step`."""
        for each in step.copies:
            self.cache.copy(each)
        input_ids, token_type_ids, last = (
            torch.from_numpy(ids).to(self.device)
            for ids in (step.input_ids, step.token_type_ids, step.last)
        )
        hidden = self._transformer(
            input_ids[None], token_type_ids[None], kv_cache=CacheStep(self.cache, step)
        )
        return hidden[0, last]

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [sequences, vocab_size] of hidden states."""
        return self._lm_head(hidden)


def _twin(
    module: nn.Module, dtype: torch.dtype, packed: torch.dtype | None = None, gelu: bool = False
) -> nn.Module:
    """`module` for inference in `dtype`; the original stays as it is.

    With `packed`, its linear layers are packed in that format, and with `gelu` the activation is
    computed with the layer before it, while the results are still in the processor's cache.
    """
    if packed is not None and isinstance(module, nn.Linear):
        return PackedLinear(module.weight, module.bias, packed)
    twin = copy(module)
    twin.training = False
    twin._modules = {
        name: _twin(child, dtype, packed, gelu) for name, child in module._modules.items()
    }
    # What has the dtype already is shared, not copied.
    twin._parameters = {
        name: parameter if parameter is None else nn.Parameter(parameter.to(dtype), False)
        for name, parameter in module._parameters.items()
    }
    if gelu and isinstance(module, MLP):
        twin.up.gelu = True
        twin.activation = nn.Identity()
    return twin
