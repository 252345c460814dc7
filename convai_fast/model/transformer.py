"""One transformer decoder for all families of models, which differ in what `config` says."""

from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convai_fast.model import families, rotary
from convai_fast.model.attention import Branches, causal_attention
from convai_fast.model.config import TransformerConfig
from convai_fast.model.layers import Dropout, Linear

_ACTIVATIONS = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class KeyValueCache(Protocol):
    """What `Transformer` needs of a cache; `convai_fast.generation.cache.CacheStep` is one."""

    position_ids: Tensor

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Store a layer's new keys and values, and attend to them and to those before."""
        ...


class Attention(nn.Module):
    """Causal self-attention of several heads, groups of which may share their keys and values."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.n_head, config.n_kv_head
        width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.qkv = Linear(config.n_embd, width, bias=config.qkv_bias)
        self.out = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_pdrop = config.attn_pdrop
        self.dropout = Dropout(config.resid_pdrop)

    def forward(
        self,
        x: Tensor,
        kv_cache: KeyValueCache | None = None,
        branches: Branches | None = None,
        wanted: Tensor | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """[..., n_embd] to the same.

        `rotation` is `rotary.rotation` of the positions; see `Transformer.forward` for the rest.
        """
        qkv = self.qkv(x)
        if rotation is not None or self.num_kv_heads < self.num_heads:
            qkv = self._for_operators(qkv, rotation)
        dropout_p = self.attn_pdrop if self.training else 0.0
        if kv_cache is not None:
            x = kv_cache.attend(self.layer, qkv)
        elif branches is not None:
            x = branches.attend(qkv, self.num_heads, dropout_p)
        else:
            x = causal_attention(qkv, self.num_heads, dropout_p)
        if wanted is not None:
            x = x.index_select(0, wanted)
        return self.dropout(self.out(x))

    def _for_operators(self, qkv: Tensor, rotation: Tensor | None) -> Tensor:
        """Queries and keys turned, and `num_heads` each of queries, keys and values."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = qkv.unflatten(-1, (sum(counts), -1)).split(counts, dim=-2)
        if rotation is not None:
            query, key = rotary.rotate(query, rotation), rotary.rotate(key, rotation)
        # `branch_attention` and `cached_attention` take as many heads of keys as of queries.
        group = self.num_heads // self.num_kv_heads
        key, value = (part.repeat_interleave(group, dim=-2) for part in (key, value))
        return torch.cat([query, key, value], dim=-2).flatten(-2)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.activation = _ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_embd] to the same."""
        return self.dropout(self.down(self.activation(self.up(x))))


class GatedMLP(nn.Module):
    """An MLP whose middle layer is multiplied by a gate, which alone is activated (SwiGLU).

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.up = Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.activation = _ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_embd] to the same."""
        return self.dropout(self.down(self.activation(self.gate(x)) * self.up(x)))


def _norm(config: TransformerConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


class Block(nn.Module):
    """Attention and MLP, each with a residual connection and a norm before or after it."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention = Attention(config, layer)
        self.attention_norm = _norm(config)
        self.mlp = GatedMLP(config) if config.gated else MLP(config)
        self.mlp_norm = _norm(config)

    def forward(
        self,
        x: Tensor,
        kv_cache: KeyValueCache | None = None,
        branches: Branches | None = None,
        wanted: Tensor | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """[..., n_embd] to the same; the arguments are those of `Attention.forward`."""
        attended = self.attention(
            self.attention_norm(x) if self.pre_norm else x, kv_cache, branches, wanted, rotation
        )
        x = (x if wanted is None else x.index_select(0, wanted)) + attended
        if self.pre_norm:
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x)
        return self.mlp_norm(x + self.mlp(x))


class Transformer(nn.Module):
    """Token ids to hidden states; new weights are drawn as the model's family draws them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = (
            nn.Embedding(config.n_positions, config.n_embd) if config.rope_theta is None else None
        )
        self.dropout = Dropout(config.embd_pdrop)
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = _norm(config) if config.final_norm else nn.Identity()
        families.of(config).initialise(self)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        kv_cache: KeyValueCache | None = None,
        branches: Branches | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [batch, seq, n_embd] of `input_ids` [batch, seq].

        Every position attends to itself and those before it. Padding belongs on the right, where
        nothing that counts can see it. With `gradient_checkpointing` set, training keeps only what
        enters a block, and computes the rest again in the backward pass.

        Args:
            input_ids: int64 [batch, seq], or [num_tokens] with `branches`.
            token_type_ids: shaped like `input_ids`; a token's segment, as the id of the speaker's
                token: it is looked up in the same embedding, if the config has segments.
            position_ids: int64, broadcastable to `input_ids`, each below `n_positions` (which is
                not checked: it would make the host wait for the device). Default: from 0, or those
                of `kv_cache`; required with `branches`.
            kv_cache: what came before, in a cache that the keys and values of `input_ids` join;
                [batch, seq] is then [1, tokens], the new tokens of several sequences side by side.
            branches: the rows of a batch in the shared-prefix layout; hidden states are then
                [num_tokens, n_embd].
            wanted: int64 [num_wanted], with `branches`: the tokens whose hidden states are needed,
                which spares the last block the others; the result is [num_wanted, n_embd].

        Raises:
            ValueError: there are more tokens than positions.
        """
        if position_ids is None and kv_cache is not None:
            position_ids = kv_cache.position_ids
        elif position_ids is None:
            seq_len = input_ids.shape[1]
            if seq_len > self.config.n_positions:
                raise ValueError(
                    f"the sequence has {seq_len} tokens, "
                    f"but the model has only {self.config.n_positions} positions."
                )
            position_ids = torch.arange(seq_len, device=input_ids.device)
        if token_type_ids is None or not self.config.segments:
            x = self.token_embedding(input_ids)
        else:
            # One look-up, so that the gradient of the embedding is made once.
            x = self.token_embedding(torch.stack([input_ids, token_type_ids])).sum(0)
        rotation = None
        if self.config.rope_theta is None:
            x = x + self.position_embedding(position_ids)
        else:
            head_dim, theta = self.config.head_dim, self.config.rope_theta
            rotation = rotary.rotation(position_ids, head_dim, theta)
        x = self.dropout(x)
        for block in self.blocks:
            is_last = block is self.blocks[-1]
            arguments = (x, kv_cache, branches, wanted if is_last else None, rotation)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.final_norm(x)
