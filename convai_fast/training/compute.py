"""Where a model computes, and in which number format (mixed precision)."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from convai_fast.data.batches import Batch, tensors_of
from convai_fast.errors import UserError
from convai_fast.hardware import resolve_precision
from convai_fast.model.context import key_index
from convai_fast.model.layers import to_device
from convai_fast.training.distributed import Ranks
from convai_fast.training.options import TrainOptions


@contextmanager
def repeatable(device: torch.device, enabled: bool) -> Iterator[None]:
    """Within, if `enabled`, `device` makes the same bits of the same step; a CPU always does.

    Around the first product on a GPU, whose library reads its settings then. An operation that has
    no such kernel raises RuntimeError.
    """
    if not enabled or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


class Compute:
    """The device of this rank, and what autocast computes in.

    Attributes:
        device: as `Ranks.device` gives it.
        dtype: of matrix products; weights are float32.
    """

    def __init__(self, options: TrainOptions, ranks: Ranks) -> None:
        """Raises UserError where the device is not there or cannot compute so. Collective."""
        with ranks.together():
            self.device = ranks.device(options.device)
        self.dtype = resolve_precision(options.precision, self.device)
        self.is_sharded = options.fsdp
        if self.device.type == "cpu" and self.dtype == torch.float16:
            raise UserError("`precision` fp16 needs a CUDA device: use bf16 or fp32 on the CPU")
        if options.fsdp and self.dtype == torch.float16:
            raise UserError("`fsdp` and `precision` fp16 do not go together: use bf16 or fp32")

    def autocast(self) -> torch.autocast:
        """Within, matrix products are computed in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def weights_cast_once(self) -> AbstractContextManager:
        """Around several passes with the same weights, so that they are cast once."""
        # Autocast forgets the weights that it has cast when the outermost block ends: this is one.
        # With shards it must forget them sooner, or each rank would keep the whole model.
        if self.is_sharded:
            return nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def to_device(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments; what it must count stays on the CPU, where it need not wait."""
        stays = ("labels", "label_positions", "offsets")
        arguments: dict[str, Any] = {
            name: tensor if name in stays else to_device(tensor, self.device)
            for name, tensor in tensors_of(batch)
        }
        if "offsets" in batch:
            arguments["key_index"] = key_index(batch["offsets"], batch["branch_ids"], self.device)
        return arguments
