"""The model as the engine runs it: weights packed for the CPU, or in their own form on a GPU."""

import copy

import torch
from torch import Tensor, nn

from convai_fast import ops
from convai_fast.errors import UserError
from convai_fast.generation.cache import CacheStep
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.transformer import ACTIVATIONS, MLP

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed once; see `convai_fast.ops.packed_linear`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
    ) -> None:
        super().__init__()
        self.gelu = gelu
        self.weight = ops.pack_weight(weight, dtype)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in_features] to [..., out_features]."""
        return ops.packed_linear(x, self.weight, self.bias, self.gelu)


class Decoder:
    """Computes the logits of the next token, for several sequences at once.

    On a CPU everything is computed in float32 from weights packed in the format asked for, of which
    int8 is an approximation; they are copies, so that later changes to `model` do not show. Unless
    the weights are float32, keys and values are kept in bfloat16. On a GPU it is the model itself,
    or a bfloat16 copy.

    Raises UserError for a format that there is not.
    """

    def __init__(self, model: DoubleHeadsModel, weights: str = "float32") -> None:
        if weights not in WEIGHTS:
            raise UserError(f"weights is {weights!r}, but must be one of {', '.join(WEIGHTS)}")
        weight = model.transformer.token_embedding.weight
        self.device = weight.device
        if self.device.type == "cpu":
            self._transformer = _pack(model.transformer, WEIGHTS[weights])
            self._lm_head = PackedLinear(weight, None, WEIGHTS[weights])
            self.cache_dtype = torch.float32 if weights == "float32" else torch.bfloat16
            return
        if weights == "int8":
            raise UserError(f"int8 weights are for the CPU, and the model is on {self.device}")
        if weights == "bfloat16":
            model = copy.deepcopy(model).to(torch.bfloat16)
        model.eval()
        self.cache_dtype = model.transformer.token_embedding.weight.dtype
        self._transformer, self._lm_head = model.transformer, model.lm_logits

    def next_logits(self, input_ids: Tensor, token_type_ids: Tensor, step: CacheStep) -> Tensor:
        """Logits [sequences, vocab_size] after the last token of each sequence of `step`.

        `input_ids` and `token_type_ids` are int64 [tokens], the new tokens of all sequences.
        """
        hidden = self._transformer(input_ids[None], token_type_ids[None], kv_cache=step)
        return self._lm_head(hidden[0, step.last])


def _pack(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` for inference in float32, with every linear layer packed; the original stays."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight, module.bias, dtype)
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {name: _pack(child, dtype) for name, child in module._modules.items()}
    if isinstance(module, MLP) and module.activation is ACTIVATIONS["gelu_new"]:
        twin.up.gelu = True  # while the results are still in a cache
        twin.activation = nn.Identity()
    # What is float32 already is shared, not copied.
    twin._parameters = {
        name: parameter if parameter is None else nn.Parameter(parameter.float(), False)
        for name, parameter in module._parameters.items()
    }
    return twin
