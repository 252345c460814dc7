"""What attention knows of the world: which tokens a query looks at."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from convai_fast import ops
from convai_fast.model.layers import to_device

_FEW = 4  # branches, for which a second call of attention costs more than keys that are repeated


class Context(Protocol):
    """Where tokens stand, and what they look at: `Causal`, `Branches`, or a step of a cache.

    Attributes:
        position_ids: int64, broadcastable to the tokens, each one's place in its own sequence.
    """

    position_ids: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Attention of a layer's queries to the keys and values of what they look at.

        Args:
            layer: its number, by which a cache keeps keys and values.
            q: [..., num_heads, head_dim], a row a token.
            k, v: [..., num_kv_heads, head_dim], each head for as many heads of queries.
            dropout_p: dropout of the attention weights.

        Returns:
            the shape of `q`.
        """
        ...


def without_plans(device: torch.device) -> AbstractContextManager:
    """Within, torch's `scaled_dot_product_attention` does not take cuDNN's kernels.

    cuDNN, which newer GPUs prefer, makes a plan for every new shape, in tens of milliseconds; our
    batches are of a new shape nearly every time.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


class Causal:
    """Rows padded on the right, [batch, seq]: a token attends to itself and those before it."""

    def __init__(self, position_ids: Tensor) -> None:
        self.position_ids = position_ids

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """See `Context`."""
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        is_grouped = q.shape[-3] != k.shape[-3]
        with without_plans(q.device):
            x = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=is_grouped
            )
        return x.transpose(-3, -2)


class Branches:
    """The rows of a batch in the shared-prefix layout, and their branches; see `branch_attention`.

    Args:
        offsets: int64 [batch + 1] on the CPU; row r is the tokens `offsets[r]:offsets[r + 1]`.
        branch_ids: int64 [num_tokens].
        position_ids: int64 [num_tokens].
        key_index: what `branch_attention` on CUDA reads beside, so that nothing is searched there.
    """

    def __init__(
        self,
        offsets: Tensor,
        branch_ids: Tensor,
        position_ids: Tensor,
        key_index: ops.KeyIndex | None = None,
    ) -> None:
        # FSDP hands over all tensors on its device; with an index nothing reads them.
        self.offsets = offsets.cpu() if key_index is None else offsets
        self.branch_ids = branch_ids
        self.position_ids, self.key_index = position_ids, key_index

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """See `Context`."""
        seed = ops.draw_seed() if dropout_p else None
        return ops.branch_attention(
            q, k, v, self.offsets, self.branch_ids, dropout_p, seed, self.key_index
        )


def key_index(
    offsets: Tensor, branch_ids: Tensor, device: torch.device, with_gradient: bool = True
) -> ops.KeyIndex | None:
    """What `branch_attention` reads on CUDA of a batch that is on the CPU; None elsewhere.

    Without a gradient, the keys of what many candidates share are not repeated for each of them.
    """
    if device.type != "cuda":
        return None
    is_shared_by_many = not with_gradient and branch_ids.max() > _FEW
    index = (ops.index_prefixes if is_shared_by_many else ops.index_keys)(offsets, branch_ids)
    return index._replace(
        key_ids=to_device(index.key_ids, device),
        cu_queries=to_device(index.cu_queries, device),
        cu_keys=to_device(index.cu_keys, device),
    )
