"""Many devices: one process each, started by torchrun or accelerate, that work as one run.

A launcher tells every process its place in the environment (RANK, WORLD_SIZE, LOCAL_RANK); without
it there is one rank, and nothing here does anything. What the ranks decide together, an error or a
signal, is agreed upon through the CPU (gloo), so that no device is waited for.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convai_fast.errors import UserError
from convai_fast.hardware import resolve_device
from convai_fast.model.double_heads import DoubleHeadsModel

T = TypeVar("T")

# Long enough for rank 0 to tokenise any dataset while the others wait. A rank that dies ends the
# others at once: its connections close, and the launcher stops them.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0; rank 0 prints, tokenises and saves.
        world_size: how many there are.
        local_rank: its number on this machine, which is that of its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """What the launcher says; one rank without a launcher."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in os.environ for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and saves."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """This rank's device: `name` as in `resolve_device`, on CUDA the GPU of its local rank.

        Raises UserError when it is not there, or when `name` is one GPU for several ranks.
        """
        device = resolve_device(name)
        if self.world_size == 1 or device.type != "cuda":
            return device
        if name not in ("auto", "cuda"):
            raise UserError(f"`device` {name} names one GPU for several ranks: use cuda or auto")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"there is no GPU for local rank {self.local_rank}: start no more processes than "
                f"the {torch.cuda.device_count()} GPUs of this machine"
            )
        return resolve_device(f"cuda:{self.local_rank}")

    def wrap(self, model: DoubleHeadsModel, device: torch.device, fsdp: bool) -> nn.Module:
        """What to call instead of `model`, so that its gradients are means over ranks.

        The weights become those of rank 0. With `fsdp`, `model` itself is sharded. Collective.

        Raises UserError for `fsdp` with a single rank.
        """
        if fsdp and self.world_size == 1:
            raise UserError(
                "`fsdp` shards over several processes: start them with torchrun --nproc_per_node"
            )
        if self.world_size == 1:
            return model
        if fsdp:
            from convai_fast.training.sharding import shard

            shard(model, device, self.world_size)
            return model
        # With device_ids it would move to the device what the model reads on the CPU.
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def exchange_gradients(self, wrapped: nn.Module, enabled: bool) -> None:
        """Whether the next backward pass ends with the mean over ranks, or only accumulates."""
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = enabled
        elif self.world_size > 1:
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(wrapped, FSDPModule)
            wrapped.set_requires_gradient_sync(enabled)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, the same bits on each. Collective."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest of the ranks' values. Collective."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks pass through, or all raise the UserError that the first of them met.

        What is done within must not be collective. Collective.
        """
        if self.world_size == 1:
            yield
            return
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        for message in self.gather(str(error) if error else None):
            if message is not None:
                raise UserError(message) from error

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; its UserError, if any. Collective."""
        value: Any = None
        with self.together():
            if self.is_main:
                value = make()
        if self.world_size > 1:
            values = [value]
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
            (value,) = values
        return value


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other processes of this run, if a launcher says that there are any.

    A UserError, which by `Ranks.together` all ranks meet, remains one on rank 0 and is a silent
    exit with code 2 on the others.

    Keep no DistributedDataParallel beyond the end. It owns the group too, and the last owner to go
    waits for the group's threads. `destroy_process_group` waits without the interpreter's lock; a
    DistributedDataParallel holds the lock, for which a thread may be waiting to free the tensor of
    the last exchange: a deadlock.
    """
    ranks = Ranks.from_environment()
    if ranks.world_size == 1:
        yield ranks
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield ranks
    except UserError:
        if not ranks.is_main:
            raise SystemExit(2) from None
        raise
    # After any other exception the group is left alone: to leave it properly takes all ranks.
    gc.collect()  # importing torch._dynamo leaves frames in a cycle, and in them what was wrapped
    dist.destroy_process_group()
