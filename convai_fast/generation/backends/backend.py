"""What every backend does: slots that grow, and a step's tokens through the model."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from convai_fast.errors import UserError
from convai_fast.generation.scheduler import Copy, Step
from convai_fast.model.double_heads import DoubleHeadsModel

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def resolve_weights(weights: str, device: torch.device) -> str:
    """The number format that "auto" is on this device: bfloat16 on a GPU that multiplies it.

    Raises:
        UserError: there is no such format.
    """
    if weights == "auto":
        is_small = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if is_small else "float32"
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}, but must be one of auto, {', '.join(WEIGHTS)}")
    return weights


class Backend(ABC):
    """Slots for sequences, and the model that computes their next tokens.

    Which tokens are in the slots, the scheduler knows. All but `allocate` are called in torch's
    inference mode.

    Args:
        model: as it is; a backend computes with a copy for inference, or with what they share.
        num_slots: sequences that can be held at a time.
        weights: a name of `WEIGHTS`.

    Raises:
        UserError: there are no such weights here, or not the memory for the slots.
    """

    prefill_tokens = 1024  # of prompts in one step, if there is more than one
    n_positions: int
    keys: Tensor  # [layers, slots, …], as `values`
    values: Tensor
    lm_head: Callable[[Tensor], Tensor]

    @abstractmethod
    def __init__(self, model: DoubleHeadsModel, num_slots: int, weights: str) -> None: ...

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens that a slot can hold."""

    @abstractmethod
    def _make(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots with room for `capacity` tokens, at least."""

    def _allocate(self, num_slots: int, capacity: int) -> tuple[Tensor, Tensor]:
        try:
            return self._make(capacity)
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"there is no memory for the keys and values of {num_slots} sequences of "
                f"{capacity} tokens: choose a smaller batch size"
            ) from error

    @torch.inference_mode()  # as keys and values are written to
    def allocate(self, capacity: int) -> None:
        """Make room for sequences of `capacity` tokens; what the slots hold stays.

        Raises:
            UserError: there is not the memory.
        """
        if capacity <= self.capacity:
            return
        most, num_slots = self.n_positions, self.keys.shape[1]
        new = self._allocate(num_slots, max(capacity, min(2 * self.capacity, most)))
        for target, held in zip(new, (self.keys, self.values), strict=True):
            target[tuple(map(slice, held.shape))] = held
        self.keys, self.values = new

    @abstractmethod
    def copy_prefix(self, copy: Copy) -> None:
        """Let a slot begin as another one does."""

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """Hidden states [sequences, n_embd] at the last token of each sequence of `step`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [sequences, vocab_size] of hidden states."""
        return self.lm_head(hidden)
