"""What a decoder can be that no family here is yet, against transformers' Llama."""

import dataclasses

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama as llama

from convai_fast.evaluation.packing import packed
from convai_fast.model import DoubleHeadsModel, TransformerConfig
from convai_fast.model.transformer import MLP, Block, GatedMLP

LLAMA = dict(
    n_inner=56,
    activation="silu",
    gated=True,
    norm="rms",
    norm_eps=1e-3,
    qkv_bias=False,
    bias=False,
    initializer_range=0.2,
)
PEER = dict(
    vocab_size=101,
    max_position_embeddings=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=56,
    rms_norm_eps=1e-3,
)
IDS = torch.arange(2 * 12).view(2, 12) * 7 % 101


def make_config(**changes):
    settings = {"model_type": "gpt2", "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    sizes = dict(n_embd=32, n_head=4, n_layer=2, vocab_size=101, n_positions=48)
    config = TransformerConfig.from_transformers(settings | sizes)
    return dataclasses.replace(config, **changes)


def randomised(module):
    """`module` with random values in every parameter: norms and biases too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def mlp_weights(theirs):
    names = {"gate": theirs.gate_proj, "up": theirs.up_proj, "down": theirs.down_proj}
    return {f"{name}.{k}": v for name, part in names.items() for k, v in part.named_parameters()}


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rms_norm_is_llamas():
    norm = randomised(Block(make_config(norm="rms", norm_eps=1e-2), layer=0).mlp_norm)
    peer = llama.LlamaRMSNorm(32, eps=1e-2)
    peer.load_state_dict(norm.state_dict())
    x = torch.randn(3, 5, 32)
    assert_close(norm(x), peer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp_is_llamas(bias):
    peer = randomised(llama.LlamaMLP(transformers.LlamaConfig(**PEER, mlp_bias=bias)))
    mlp = GatedMLP(make_config(**(LLAMA | dict(bias=bias)))).eval()
    mlp.load_state_dict(mlp_weights(peer))
    x = torch.randn(3, 5, 32)
    assert_close(mlp(x), peer(x))


def test_plain_mlp_may_have_no_bias():
    mlp = MLP(make_config(bias=False)).eval()
    assert [name for name, _ in mlp.named_parameters()] == ["up.weight", "down.weight"]


def test_a_gated_model_without_biases_is_drawn_packed_and_compiled():
    torch.manual_seed(0)
    model = DoubleHeadsModel(make_config(**LLAMA)).eval()
    parameters = dict(model.named_parameters())
    assert not [n for n in parameters if n.startswith("transformer") and n.endswith("bias")]
    assert parameters["transformer.blocks.1.mlp.gate.weight"].std().item() == pytest.approx(
        0.2, 0.1
    )
    with torch.no_grad():
        expected = model(IDS)
        with packed(model, torch.float32):
            assert_close(model(IDS).logits, expected.logits)
        compiled = torch.compile(model.transformer, backend="eager", fullgraph=True)
        assert_close(compiled(IDS), model.transformer(IDS))
