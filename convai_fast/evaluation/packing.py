"""Linear layers with their weights laid out for this CPU's matrix products, once for many batches.

A product by an ordinary weight lays it out anew at every call, and an activation reads and writes
once more what a product has just written: together an eighth of the time of scoring.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convai_fast.hardware import cpu_multiplies_bf16
from convai_fast.model.double_heads import DoubleHeadsModel

# Our name of an activation -> oneDNN's, and which formula of it.
_ACTIVATIONS = {
    "gelu_new": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


class _PackedLinear(nn.Module):
    """A linear layer, and an activation if there is one: [..., in_features] to [..., out_features].

    oneDNN's product as torch's own compiler calls it.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, activation: str | None) -> None:
        super().__init__()
        self.dtype = dtype
        weight = layer.weight.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.activation, self.formula = _ACTIVATIONS.get(activation, ("none", ""))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, self.activation, [], self.formula
        )


@contextmanager
def packed(model: DoubleHeadsModel, dtype: torch.dtype) -> Iterator[None]:
    """Within it, the layers of `model`'s blocks multiply by packed weights, without gradients.

    The results are those of autocast to `dtype`, but for rounding. Where a CPU multiplies bfloat16
    more slowly than float32, they are those of float32. Elsewhere than on a CPU, or without oneDNN,
    nothing changes.
    """
    if not _can_pack(model, dtype):
        yield
        return
    if dtype == torch.bfloat16 and not cpu_multiplies_bf16():
        dtype = torch.float32
    replaced = []
    try:
        for block in model.transformer.blocks:
            activation = block.mlp.activation
            activated = "gate" if model.config.gated else "up"
            for owner in (block.attention, block.mlp):
                for name, layer in list(owner.named_children()):
                    if isinstance(layer, nn.Linear):
                        fused = model.config.activation if name == activated else None
                        setattr(owner, name, _PackedLinear(layer, dtype, fused))
                        replaced.append((owner, name, layer))
            block.mlp.activation = _same
            replaced.append((block.mlp, "activation", activation))
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def _can_pack(model: DoubleHeadsModel, dtype: torch.dtype) -> bool:
    weight = model.transformer.token_embedding.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _same(x: Tensor) -> Tensor:
    return x
