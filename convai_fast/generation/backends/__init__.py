"""Where replies are computed: each backend owns weights, keys and values, and how they lie."""

from convai_fast.generation.backends.backend import WEIGHTS, Backend, resolve_weights
from convai_fast.generation.backends.cpu import CpuBackend
from convai_fast.generation.backends.cuda import CudaBackend
from convai_fast.generation.backends.torch import TorchBackend
from convai_fast.model.double_heads import DoubleHeadsModel

__all__ = [
    "WEIGHTS",
    "Backend",
    "CpuBackend",
    "CudaBackend",
    "TorchBackend",
    "make_backend",
    "resolve_weights",
]


def make_backend(model: DoubleHeadsModel, num_slots: int, weights: str = "auto") -> Backend:
    """The backend of the device that `model` is on; `model` is left as it is.

    What needs no conversion is shared with it: after changing its weights, make a new backend.

    Raises:
        UserError: there are no such weights on this device, or not the memory.
    """
    device = model.transformer.token_embedding.weight.device
    backends: dict[str, type[Backend]] = {"cpu": CpuBackend, "cuda": CudaBackend}
    kind = backends.get(device.type, TorchBackend)
    return kind(model, num_slots, resolve_weights(weights, device))
