"""One transformer decoder for all families of models, which differ in what `config` says."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convai_fast import ops
from convai_fast.model import families
from convai_fast.model.config import TransformerConfig
from convai_fast.model.context import Causal, Context
from convai_fast.model.layers import Dropout, Linear, RMSNorm


class Attention(nn.Module):
    """Self-attention of several heads, groups of which may share their keys and values."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = (config.n_head, config.n_kv_head, config.n_kv_head)  # of q, k and v
        self.qkv = Linear(
            config.n_embd, sum(self.num_heads) * config.head_dim, bias=config.qkv_bias
        )
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
            for _ in "qk"
        )
        self.out = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.out_bias)
        self.attn_pdrop = config.attn_pdrop
        self.dropout = Dropout(config.resid_pdrop)

    def forward(
        self,
        x: Tensor,
        context: Context,
        rotation: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """[..., n_embd] to the same; the arguments are those of `Block.forward`."""
        qkv = self.qkv(x).unflatten(-1, (sum(self.num_heads), -1))
        q, k, v = qkv.split(self.num_heads, dim=-2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = (ops.rotate(x.flatten(0, -3), rotation).view(x.shape) for x in (q, k))
        dropout_p = self.attn_pdrop if self.training else 0.0
        x = context.attend(self.layer, q, k, v, dropout_p).flatten(-2)
        return self.dropout(self.out(_only(wanted, x)))


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    activated_layer = "up"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)
        self.activation = ops.ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_embd] to the same."""
        return self.dropout(self.down(self.activation(self.up(x))))


class GatedMLP(nn.Module):
    """An MLP whose middle layer is multiplied by a gate, which alone is activated (SwiGLU).

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """

    activated_layer = "gate"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.up = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)
        self.activation = ops.ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_embd] to the same."""
        gate, up = self.gate(x), self.up(x)
        is_silu = self.activation is F.silu
        return self.dropout(
            self.down(ops.swiglu(gate, up) if is_silu else self.activation(gate) * up)
        )


def _only(wanted: Tensor | None, x: Tensor) -> Tensor:
    """The rows of `x` [..., n_embd] that are wanted, [num_wanted, n_embd]; None for `x` itself."""
    return x if wanted is None else x.flatten(0, -2).index_select(0, wanted)


def _norm(config: TransformerConfig, *, feeds_products: bool = False) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps)
    return RMSNorm(config.n_embd, config.norm_eps, feeds_products)


def add_norm(x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`x + residual`, and its norm: without a gradient on a GPU by one kernel."""
    if not torch.is_grad_enabled() and has_fused_norm(x) and x.dtype == residual.dtype:
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm) and norm.eps is not None
        if norm.weight.dtype == x.dtype:
            bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
            is_rms = isinstance(norm, nn.RMSNorm)
            return ops.add_norm(x, residual, norm.weight, bias, eps=norm.eps, rms_norm=is_rms)
    x = x + residual
    return x, norm(x)


def has_fused_norm(x: Tensor) -> bool:
    """Whether `add_norm` has a kernel for rows like these."""
    return x.device.type == "cuda" and x.shape[-1] <= 8192


class Block(nn.Module):
    """Attention and MLP, each with a residual connection and a norm before or after it."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention = Attention(config, layer)
        self.attention_norm = _norm(config, feeds_products=self.pre_norm)
        self.mlp = GatedMLP(config) if config.gated else MLP(config)
        self.mlp_norm = _norm(config, feeds_products=self.pre_norm)

    def forward(
        self,
        x: Tensor,
        context: Context,
        rotation: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """[..., n_embd] to the same, or to [num_wanted, n_embd].

        `rotation` is `ops.rotation` of the positions; see `Transformer.forward` for the rest.
        """
        attended = self.attention(
            self.attention_norm(x) if self.pre_norm else x, context, rotation, wanted
        )
        x = _only(wanted, x)
        if self.pre_norm:
            x, normed = add_norm(x, attended, self.mlp_norm)
            return x + self.mlp(normed)
        _, x = add_norm(x, attended, self.attention_norm)
        return add_norm(x, self.mlp(x), self.mlp_norm)[1]


class Transformer(nn.Module):
    """Token ids to hidden states; new weights are drawn as the model's family draws them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = (
            nn.Embedding(config.n_positions, config.n_embd) if config.rope is None else None
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
        context: Context | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [..., n_embd] of `input_ids` [...].

        With `gradient_checkpointing` set, training keeps only what enters a block, and computes the
        rest again in the backward pass.

        Args:
            input_ids: int64 [batch, seq], or [num_tokens] where `context` says what rows they are.
            token_type_ids: shaped like `input_ids`; a token's segment, as the id of the speaker's
                token: it is looked up in the same embedding, if the config has segments.
            context: where the tokens stand, each below `n_positions` (which is not checked: it
                would make the host wait for the device), and what they look at. Default: rows
                padded on the right, where nothing that counts can see it, from position 0.
            wanted: int64 [num_wanted], the tokens, numbered over all rows, whose hidden states are
                needed, which spares the last block the others: [num_wanted, n_embd].

        Raises:
            ValueError: there are more tokens in a row than positions.
        """
        if context is None:
            seq_len = input_ids.shape[-1]
            if seq_len > self.config.n_positions:
                raise ValueError(
                    f"the sequence has {seq_len} tokens, "
                    f"but the model has only {self.config.n_positions} positions."
                )
            context = Causal(torch.arange(seq_len, device=input_ids.device))
        if token_type_ids is None or not self.config.segments:
            x = self.token_embedding(input_ids)
        else:
            # One look-up, so that the gradient of the embedding is made once.
            x = self.token_embedding(torch.stack([input_ids, token_type_ids])).sum(0)
        rotation = None
        if self.position_embedding is not None:
            x = x + self.position_embedding(context.position_ids)
        if self.config.rope is not None:
            frequencies, scale = self.config.rope.frequencies, self.config.rope.scale
            positions = context.position_ids.expand(input_ids.shape).flatten()
            rotation = ops.rotation(positions, frequencies, scale)
        x = self.dropout(x)
        for block in self.blocks:
            arguments = (x, context, rotation, wanted if block is self.blocks[-1] else None)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.final_norm(x)
