"""What a token looks at: all that stands before it, in its own branch where there are several."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from convai_fast import ops
from convai_fast.model.layers import draw_seed


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
        self.offsets, self.branch_ids = offsets, branch_ids
        if branch_ids.device.type != "cpu":
            self._prepare_padding()

    def attend(self, qkv: Tensor, num_heads: int, dropout_p: float) -> Tensor:
        """[num_tokens, 3 * width], as for `causal_attention`, to [num_tokens, width]."""
        if qkv.device.type == "cpu":
            seed = draw_seed() if dropout_p else None
            return ops.branch_attention(
                qkv, self.offsets, self.branch_ids, num_heads, dropout_p, seed
            )
        padded = qkv[self._token_of_place]  # [batch, seq, 3 * width]
        query, key, value = (
            part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in padded.chunk(3, dim=-1)
        )
        x = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self._mask, dropout_p=dropout_p
        )
        return x.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self._place_of_token)

    def _prepare_padding(self) -> None:
        """The mask and the places of the tokens in padded rows, once for all layers.

        All sizes come from `offsets`, which is on the CPU: nothing here waits for the device.
        """
        device = self.branch_ids.device
        tokens = torch.arange(int(self.offsets[-1]))
        rows = tokens.tensor_split(self.offsets[1:-1])
        token_of_place = pad_sequence(rows, batch_first=True)  # padding repeats token 0
        seq_len = token_of_place.shape[1]
        lengths = self.offsets.diff()
        starts = torch.arange(len(rows)) * seq_len - self.offsets[:-1]
        place_of_token = tokens + starts.repeat_interleave(lengths, output_size=len(tokens))
        self._token_of_place = token_of_place.to(device, non_blocking=True)
        self._place_of_token = place_of_token.to(device, non_blocking=True)
        branch = self.branch_ids[self._token_of_place]  # [batch, seq]
        visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        # Padding stands on the right, where no token looks; what it sees itself is its own row.
        self._mask = visible.tril_()[:, None]
