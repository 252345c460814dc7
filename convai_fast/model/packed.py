"""A model for inference, its linear layers' weights laid out once for this CPU's products.

There are two ways to lay them out:

- `pack_decoder`, for our operators: a row's sums are made in one order whatever stands beside it,
  so that a reply does not depend on its batch; in float32, bfloat16 or int8. Generation takes it.
- `throughput`, oneDNN's product as torch's own compiler calls it: faster for thousands of rows,
  which it may round differently than a few. Evaluation takes it.

A product by an ordinary weight lays it out anew at every call, and an activation reads and writes
once more what a product has just written: together an eighth of the time of scoring.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from convai_fast import ops
from convai_fast._native import use_huge_pages
from convai_fast.errors import UserError
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import Linear

Module = TypeVar("Module", bound=nn.Module)


class Packing(NamedTuple):
    """How layers are packed.

    Attributes:
        pack: makes the module that stands for a layer and for the activation after it, if any.
        activations: those that it can compute along with the layer.
    """

    pack: Callable[[nn.Linear, str | None], nn.Module]
    activations: Collection[str]


# Our name of an activation -> oneDNN's, and which formula of it.
_ONEDNN_ACTIVATIONS = {
    "gelu_new": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


class OneDnnLinear(nn.Module):
    """A linear layer, and an activation if there is one, by oneDNN's product."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, activation: str | None) -> None:
        super().__init__()
        self.dtype = dtype
        weight = layer.weight.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.activation, self.formula = _ONEDNN_ACTIVATIONS.get(activation or "", ("none", ""))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features] in the dtype of the weight."""
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, self.activation, [], self.formula
        )


def throughput(dtype: torch.dtype) -> Packing | None:
    """Layers in float32 or bfloat16 for many rows; None in another dtype or without oneDNN."""
    is_there = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    if not is_there or dtype not in (torch.float32, torch.bfloat16):
        return None
    return Packing(
        lambda layer, activation: OneDnnLinear(layer, dtype, activation), _ONEDNN_ACTIVATIONS
    )


def for_inference(
    module: Module, dtype: torch.dtype, packing: Packing | None = None, activation: str = ""
) -> Module:
    """`module` in eval mode and in `dtype`; the original stays as it is.

    What has the dtype already is shared with it, not copied. With `packing`, its linear layers are
    packed, and lose their forward hooks; each with the model's `activation` where that follows it
    and can be computed while the layer's results are still in the processor's cache.
    """
    twin = type(module).__new__(type(module))
    twin.__dict__.update(
        module.__dict__
    )  # not `copy`, which a module with parametrizations refuses
    twin.training = False
    twin.__dict__.pop("_compiled_call_impl", None)  # which computes with the original's weights
    twin._modules = {}
    for name, child in module._modules.items():
        if packing and isinstance(child, nn.Linear) and type(child) in (Linear, nn.Linear):
            fused = None
            if name == getattr(module, "activated_layer", "") and activation in packing.activations:
                fused, twin.activation = activation, _same  # type: ignore[assignment]
            twin._modules[name] = packing.pack(child, fused)
        else:
            twin._modules[name] = child and for_inference(child, dtype, packing, activation)
    twin._parameters = {
        name: parameter if parameter is None else nn.Parameter(parameter.to(dtype), False)
        for name, parameter in module._parameters.items()
    }
    return twin


def _same(x: Tensor) -> Tensor:
    return x


class _Room:
    """Memory for packed weights side by side, in the order they are read, in huge pages."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        use_huge_pages(self._memory)
        self._used = 0

    def keep(self, weight: ops.PackedWeight) -> ops.PackedWeight:
        data = weight.data
        place = self._memory[self._used : self._used + data.nbytes].view(data.dtype).view_as(data)
        self._used += data.nbytes
        return weight._replace(data=place.copy_(data))

    def keep_stack(self, weights: Iterable[ops.PackedWeight]) -> ops.PackedWeight:
        """Weights of one shape as one, whose tensors have one more dimension before theirs."""
        begin = self._used
        kept = [self.keep(weight) for weight in weights]
        data = self._memory[begin : self._used].view(kept[0].data.dtype)
        return kept[0]._replace(
            data=data.view(-1, *kept[0].data.shape),
            scales=_stack(weight.scales for weight in kept),
            column_sums=_stack(weight.column_sums for weight in kept),
        )


def _stack(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """The same tensor of each layer as one; None where the layers do not have it."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None


def pack_decoder(
    model: DoubleHeadsModel, dtype: torch.dtype
) -> tuple[ops.PackedDecoder, ops.PackedWeight]:
    """A model's decoder for `convai_fast.ops.decoder_step`, and its language-model head.

    Linear layers are in `dtype`. Float32 embeddings are shared with the model, not copied.

    Raises:
        UserError: a linear layer is wrapped, as by an adapter that is not merged.
    """
    transformer, config, head = model.transformer, model.config, model.lm_head_weight
    linear_layers = [m.weight for m in transformer.modules() if isinstance(m, nn.Linear)]
    room = _Room(sum(ops.packed_bytes(w.shape, dtype) for w in [*linear_layers, head]))

    def floats(parameter: Tensor) -> Tensor:
        return parameter.detach().float().contiguous()

    def bias(module: Any) -> Tensor | None:
        return None if getattr(module, "bias", None) is None else floats(module.bias)

    def norm(module: Any) -> tuple[Tensor, Tensor | None]:
        return floats(module.weight), bias(module)

    def modules(name: str) -> list[Any]:
        return [block.get_submodule(name) for block in transformer.blocks]

    def norms(name: str) -> tuple[Tensor, Tensor | None]:
        weights, biases = zip(*map(norm, modules(name)), strict=True)
        return torch.stack(weights), _stack(biases)

    def qk_norm() -> tuple[Tensor, Tensor] | None:
        if not config.qk_norm:
            return None
        return norms("attention.q_norm")[0], norms("attention.k_norm")[0]

    def linear(name: str) -> tuple[ops.PackedWeight, Tensor | None]:
        layers = modules(name)
        for layer in layers:
            if not isinstance(layer, nn.Linear):  # whose weight is not all that it computes
                raise UserError(
                    f"a layer of the model is {type(layer).__name__} instead of Linear: merge "
                    "adapters into its weights first"
                )
        weights = (ops.pack_weight(layer.weight, dtype) for layer in layers)
        return room.keep_stack(weights), _stack(map(bias, layers))

    positions, rope = transformer.position_embedding, config.rope
    decoder = ops.PackedDecoder(
        token_embedding=floats(transformer.token_embedding.weight),
        position_embedding=None if positions is None else floats(positions.weight),
        rope_frequencies=None if rope is None else torch.tensor(rope.frequencies),
        final_norm=norm(transformer.final_norm) if config.final_norm else None,
        layers=ops.PackedLayers(
            attention_norm=norms("attention_norm"),
            mlp_norm=norms("mlp_norm"),
            qk_norm=qk_norm(),
            qkv=linear("attention.qkv"),
            out=linear("attention.out"),
            gate=linear("mlp.gate") if config.gated else None,
            up=linear("mlp.up"),
            down=linear("mlp.down"),
        ),
        num_heads=config.n_head,
        head_dim=config.head_dim,
        n_inner=config.n_inner,
        pre_norm=config.norm_position == "pre",
        rms_norm=config.norm == "rms",
        norm_eps=config.norm_eps,
        activation=config.activation,
        rope_scale=1.0 if rope is None else rope.scale,
    )
    return decoder, room.keep(ops.pack_weight(head, dtype))
