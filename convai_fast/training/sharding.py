"""FSDP2: weights, gradients and optimizer state in parts, one a rank.

Imported only with --fsdp: torch's own part of it takes most of a second to load. What is saved is
put together and taken apart here, in the form that one process has, and not by
`torch.distributed.checkpoint`, which takes three seconds to load in every run.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from convai_fast.model.double_heads import DoubleHeadsModel


def shard(model: DoubleHeadsModel, device: torch.device, world_size: int) -> None:
    """Keep only this rank's part of every parameter of `model`, as rank 0 has them.

    A block's weights are gathered while it computes; what is not in a block stays gathered between
    a forward pass and its backward pass: the embedding stands at both ends of the model. Weights
    stay float32 under autocast, as without shards, so that the arithmetic is the same; what
    autocast rounds for the backward pass is whole, unless blocks are computed again for it
    (gradient checkpointing). Collective.
    """
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    mesh = init_device_mesh(device.type, (world_size,))
    for block in model.transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(state: Any) -> Any:
    """`state`, a tensor or nested dicts and lists of them, put together from the ranks' parts.

    What was in parts is on the CPU then, so that no device needs room for all of it. Collective.
    """
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state


def shard_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """`state`, whole on every rank as `whole` made it, in parts as `optimizer` has its parameters.

    What is not shaped like its parameter, such as a count of steps, stays as it is. Collective.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value: Tensor, parameter: DTensor) -> Tensor:
        if value.shape != parameter.shape:
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)

    parts = {
        i: {name: part(value, parameters[i]) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": parts}
