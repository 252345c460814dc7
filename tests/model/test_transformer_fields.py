"""What may vary in a decoder; that it computes what transformers does is held family by family."""

import dataclasses

import pytest
import torch

from convai_fast import ops
from convai_fast.model import DoubleHeadsModel, Transformer, TransformerConfig
from convai_fast.model.config import Rope
from convai_fast.model.packed import for_inference, throughput
from convai_fast.model.transformer import MLP

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


@pytest.fixture
def ours():
    """A decoder in the manner of Llama."""
    return randomised(Transformer(make_config(**LLAMA)))


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


def test_plain_mlp_may_have_no_bias():
    mlp = MLP(make_config(mlp_bias=False)).eval()
    assert [name for name, _ in mlp.named_parameters()] == ["up.weight", "down.weight"]


def test_a_rotation_keeps_the_dtype_and_the_length():
    x = torch.randn(12, 4, 8, dtype=torch.bfloat16)
    turned = ops.rotate(x, ops.rotation(POSITIONS, ROPE.frequencies))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-2, atol=0)


def test_without_segments_their_ids_change_nothing(ours):
    assert torch.equal(ours(IDS, token_type_ids=IDS + 1), ours(IDS))


def test_checkpointed_gradients_are_the_same(ours):
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
