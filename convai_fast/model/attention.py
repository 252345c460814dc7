"""What a token looks at: all that stands before it, in its own branch where there are several."""

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast import ops
from convai_fast.model.layers import draw_seed, has_kernel, to_device


def causal_attention(qkv: Tensor, num_heads: int, dropout_p: float) -> Tensor:
    """Every token attends to itself and those before it: [batch, seq, 3 * width] to [..., width].

    `qkv` holds query, key and value, each of `num_heads` heads side by side; `dropout_p` is the
    dropout of the attention weights.
    """
    query, key, value = (
        part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
    )  # [batch, num_heads, seq, head_dim] each
    x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True)
    return x.transpose(1, 2).flatten(2)


class Branches:
    """The rows of a batch in the shared-prefix layout, and their branches.

    Token i attends to token k of its own row if `k <= i` and k is in the prefix, branch 0, or in
    the branch of i.

    Args:
        offsets: int64 [batch + 1] on the CPU; row r is the tokens `offsets[r]:offsets[r + 1]`.
        branch_ids: int64 [num_tokens].
    """

    def __init__(self, offsets: Tensor, branch_ids: Tensor) -> None:
        # FSDP hands over all tensors on its device: this waits for it then.
        self.offsets, self.branch_ids = offsets.cpu(), branch_ids
        self._padding: _Padding | None = None

    def attend(self, qkv: Tensor, num_heads: int, dropout_p: float) -> Tensor:
        """[num_tokens, 3 * width], as for `causal_attention`, to [num_tokens, width]."""
        if has_kernel(qkv):
            seed = draw_seed() if dropout_p else None
            return ops.branch_attention(
                qkv, self.offsets, self.branch_ids, num_heads, dropout_p, seed
            )
        if self._padding is None:
            self._padding = _Padding(self.offsets, self.branch_ids)
        padding = self._padding
        query, key, value = (
            part.unflatten(-1, (num_heads, -1)).transpose(1, 2)
            for part in padding.pad(qkv).chunk(3, dim=-1)
        )
        x = F.scaled_dot_product_attention(
            query, key, value, attn_mask=padding.mask, dropout_p=dropout_p
        )
        return padding.unpad(x.transpose(1, 2).flatten(2))


class _Padding:
    """Rows padded to the longest, and the mask of what their tokens see; once for all layers.

    All sizes come from `offsets`, which is on the CPU: nothing here waits for the device.
    """

    def __init__(self, offsets: Tensor, branch_ids: Tensor) -> None:
        lengths = offsets.diff()
        batch, seq_len = len(lengths), int(lengths.max()) if len(lengths) else 0
        self.shape = (batch, seq_len)
        shift = torch.arange(batch) * seq_len - offsets[:-1]
        num_tokens = len(branch_ids)
        place = torch.arange(num_tokens) + shift.repeat_interleave(lengths, output_size=num_tokens)
        self.place = to_device(place, branch_ids.device)  # of each token among the padded ones
        padded = branch_ids.new_full((batch * seq_len,), -1).index_copy(0, self.place, branch_ids)
        branch = padded.view(batch, seq_len)
        # Padding stands on the right, where no token of a row looks.
        visible = (branch[:, None, :] <= 0) | (branch[:, None, :] == branch[:, :, None])
        self.mask = visible.tril_()[:, None]  # [batch, 1, seq_len, seq_len]

    def pad(self, x: Tensor) -> Tensor:
        """[num_tokens, width] to [batch, seq_len, width]."""
        batch, seq_len = self.shape
        padded = x.new_zeros(batch * seq_len, x.shape[1]).index_copy(0, self.place, x)
        return padded.view(batch, seq_len, x.shape[1])

    def unpad(self, x: Tensor) -> Tensor:
        """[batch, seq_len, width] to [num_tokens, width]."""
        return x.flatten(0, 1).index_select(0, self.place)
