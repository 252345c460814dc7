"""What a decoder can be that no family here is yet, against transformers' Llama and Qwen2."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from convai_fast.generation.backends import CpuBackend, CudaBackend, TorchBackend
from convai_fast.generation.scheduler import Step
from convai_fast.model import DoubleHeadsModel, Transformer, TransformerConfig
from convai_fast.model.config import Rope
from convai_fast.model.context import Branches, Causal
from convai_fast.model.packed import for_inference, throughput
from convai_fast.model.transformer import MLP, Attention, Block, GatedMLP
from convai_fast.ops import rotary

ROPE = Rope(tuple(500.0 ** -(k / 4) for k in range(4)), 1.0, {})  # for heads of 8
LLAMA = dict(
    n_inner=56,
    activation="silu",
    gated=True,
    norm="rms",
    norm_eps=1e-3,
    n_kv_head=2,
    rope=ROPE,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    segments=False,
    initializer_range=0.2,
)
PEER = dict(
    vocab_size=101,
    max_position_embeddings=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=56,
    rms_norm_eps=1e-3,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
IDS = torch.arange(2 * 12).view(2, 12) * 7 % 101
POSITIONS = torch.arange(12)
# Of a GPT-2: every field, and what else it may be.
CHANGES = dict(
    family="openai-gpt",
    vocab_size=102,
    n_positions=47,
    n_embd=36,
    n_layer=1,
    n_head=8,
    n_kv_head=2,
    head_dim=10,
    n_inner=127,
    activation="gelu",
    gated=True,
    norm="rms",
    norm_position="post",
    final_norm=False,
    norm_eps=0.5,
    rope=ROPE,
    qk_norm=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied=False,
    segments=False,
    embd_pdrop=0.5,
    attn_pdrop=0.5,
    resid_pdrop=0.5,
    summary_first_dropout=0.5,
    initializer_range=0.1,
)


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


def attention_weights(theirs):
    """Of one layer of theirs, as ours has them: queries, keys and values in one."""
    projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    weights = {
        f"qkv.{kind}": torch.cat([getattr(p, kind) for p in projections])
        for kind in ("weight", "bias")
        if getattr(projections[0], kind) is not None
    }
    return weights | {f"out.{kind}": value for kind, value in theirs.o_proj.named_parameters()}


def mlp_weights(theirs):
    names = {"gate": theirs.gate_proj, "up": theirs.up_proj, "down": theirs.down_proj}
    return {f"{name}.{k}": v for name, part in names.items() for k, v in part.named_parameters()}


def block_weights(theirs):
    return {
        **{f"attention.{k}": v for k, v in attention_weights(theirs.self_attn).items()},
        **{f"mlp.{k}": v for k, v in mlp_weights(theirs.mlp).items()},
        "attention_norm.weight": theirs.input_layernorm.weight,
        "mlp_norm.weight": theirs.post_attention_layernorm.weight,
    }


@pytest.fixture
def models():
    """Our decoder with the weights of transformers' LlamaModel, and that."""
    peer = randomised(llama.LlamaModel(transformers.LlamaConfig(**PEER, initializer_range=0.2)))
    weights = {
        "token_embedding.weight": peer.embed_tokens.weight,
        "final_norm.weight": peer.norm.weight,
        **{
            f"blocks.{i}.{name}": value
            for i, layer in enumerate(peer.layers)
            for name, value in block_weights(layer).items()
        },
    }
    ours = Transformer(make_config(**LLAMA)).eval()
    ours.load_state_dict(weights)
    return ours, peer


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_change_of_every_field_is_tried():
    assert list(CHANGES) == [field.name for field in dataclasses.fields(TransformerConfig)]


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_what_a_new_model_is_or_computes(field):
    plain = make_config(summary_first_dropout=0.0)
    seen = []
    for config in (plain, dataclasses.replace(plain, **{field: CHANGES[field]})):
        torch.manual_seed(0)
        model = DoubleHeadsModel(config)
        torch.manual_seed(0)
        output = model(IDS, token_type_ids=IDS.flip(0))
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        seen.append((shapes, output.logits.tolist(), output.mc_logits.tolist()))
    assert seen[0] != seen[1]


def test_rms_norm_is_llamas():
    norm = randomised(Block(make_config(norm="rms", norm_eps=1e-2), layer=0).mlp_norm)
    peer = llama.LlamaRMSNorm(32, eps=1e-2)
    peer.load_state_dict(norm.state_dict())
    x = torch.randn(3, 5, 32)
    assert_close(norm(x), peer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp_is_llamas(bias):
    peer = randomised(llama.LlamaMLP(transformers.LlamaConfig(**PEER, mlp_bias=bias)))
    mlp = GatedMLP(make_config(**(LLAMA | dict(mlp_bias=bias)))).eval()
    mlp.load_state_dict(mlp_weights(peer))
    x = torch.randn(3, 5, 32)
    assert_close(mlp(x), peer(x))


def test_plain_mlp_may_have_no_bias():
    mlp = MLP(make_config(mlp_bias=False)).eval()
    assert [name for name, _ in mlp.named_parameters()] == ["up.weight", "down.weight"]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["no bias", "bias", "qkv bias"])
def test_attention_with_rotary_positions_is_llamas_and_qwens(num_kv_heads, kind):
    settings = PEER | dict(num_key_value_heads=num_kv_heads, attn_implementation="sdpa")
    if kind == "qkv bias":
        config = transformers.Qwen2Config(**settings)
        peer = randomised(qwen2.Qwen2Attention(config, layer_idx=0))
    else:
        config = transformers.LlamaConfig(**settings, attention_bias=kind == "bias")
        peer = randomised(llama.LlamaAttention(config, layer_idx=0))
    changes = dict(n_kv_head=num_kv_heads, qkv_bias=kind != "no bias", out_bias=kind == "bias")
    attention = Attention(make_config(**(LLAMA | changes)), layer=0).eval()
    attention.load_state_dict(attention_weights(peer))

    x, positions = torch.randn(2, 12, 32), torch.stack([POSITIONS, POSITIONS * 3])
    theirs, _ = peer(x, llama.LlamaRotaryEmbedding(config)(x, positions), None)
    rotation = rotary.rotation(positions, ROPE.frequencies)
    assert_close(attention(x, Causal(positions), rotation), theirs)


def test_a_rotation_keeps_the_dtype_and_the_length():
    x = torch.randn(12, 4, 8, dtype=torch.bfloat16)
    turned = rotary.rotate(x, rotary.rotation(POSITIONS, ROPE.frequencies))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-2, atol=0)


def test_hidden_states_and_gradients_are_llamas(models):
    ours, peer = models
    hidden, expected = ours(IDS), peer(IDS).last_hidden_state
    assert_close(hidden, expected)
    weights = torch.randn_like(hidden)
    (hidden * weights).mean().backward()
    (expected * weights).mean().backward()
    assert_close(ours.token_embedding.weight.grad, peer.embed_tokens.weight.grad)
    for block, layer in zip(ours.blocks, peer.layers, strict=True):
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        gradient = torch.cat([projection.weight.grad for projection in projections])
        assert_close(block.attention.qkv.weight.grad, gradient)


def test_position_ids_turn_as_llamas_do(models):
    ours, peer = models
    positions = torch.stack([POSITIONS * 2, POSITIONS + 30])
    theirs = peer(IDS, position_ids=positions).last_hidden_state
    assert_close(ours(IDS, context=Causal(positions)), theirs)


def test_without_segments_their_ids_change_nothing(models):
    ours, _ = models
    assert torch.equal(ours(IDS, token_type_ids=IDS + 1), ours(IDS))


def test_the_shared_prefix_layout_gives_what_whole_rows_give(models):
    """Two candidates of 5 and 4 tokens after a prefix of 3."""
    ours, _ = models
    ids = torch.arange(12) * 7 % 101
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6])
    branch_ids = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)
    hidden = ours(ids, context=Branches(torch.tensor([0, 12]), branch_ids, positions))
    first, second = ours(ids[None, :8])[0], ours(torch.cat([ids[:3], ids[8:]])[None])[0]
    assert_close(hidden, torch.cat([first, second[3:]]))


@pytest.mark.parametrize("kind", [CpuBackend, CudaBackend, TorchBackend])
def test_a_cache_gives_what_whole_rows_give(models, kind):
    ours, _ = models
    model, parts = DoubleHeadsModel(ours.config), []
    model.transformer = ours
    backend = kind(model, num_slots=2)
    backend.allocate(12)
    for begin, part in ((0, IDS[:, :7]), (7, IDS[:, 7:])):
        past, offsets = np.full(2, begin), np.arange(3) * part.shape[1]
        ids = part.flatten().numpy()
        with torch.inference_mode():
            parts.append(backend.forward(Step([], [], np.arange(2), past, offsets, ids, ids)))
    assert_close(torch.stack(parts, dim=1), ours(IDS)[:, [6, 11]])


def test_checkpointed_gradients_are_the_same(models):
    ours, _ = models
    gradients = []
    for checkpointing in (False, True):
        ours.gradient_checkpointing = checkpointing
        ours.train().zero_grad()
        ours(IDS).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


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
        packed = for_inference(model, torch.float32, throughput(torch.float32), "silu")
        assert_close(packed(IDS).logits, expected.logits)
        compiled = torch.compile(model.transformer, backend="eager", fullgraph=True)
        assert_close(compiled(IDS), model.transformer(IDS))
