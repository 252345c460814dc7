"""Models with rotary positions, of all families that have them, against transformers' own."""

import logging
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.errors import UserError
from convai_fast.model import DoubleHeadsModel, TransformerConfig
from tests.helpers.batches import make_batches
from tests.helpers.checkpoint_edits import edit_config, edit_weights
from tests.helpers.model_peers import (
    ROTARY,
    SIZES,
    assert_gradients,
    make_peer,
    relative_error,
)

IDS = torch.arange(2 * 3 * 20).view(2, 3, 20) * 7 % 101
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
# What config.json of a model says, as it lies on the Hub, in part under names of older versions.
PUBLISHED = {
    "TinyLlama": dict(
        model_type="llama",
        hidden_size=2048,
        intermediate_size=5632,
        max_position_embeddings=2048,
        num_attention_heads=32,
        num_hidden_layers=22,
        num_key_value_heads=4,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        vocab_size=32000,
    ),
    "SmolLM2-135M": dict(
        model_type="llama",
        hidden_act="silu",
        hidden_size=576,
        initializer_range=0.041666666666666664,
        intermediate_size=1536,
        is_llama_config=True,
        max_position_embeddings=8192,
        num_attention_heads=9,
        num_hidden_layers=30,
        num_key_value_heads=3,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        vocab_size=49152,
    ),
    "Llama-3.2-1B": dict(
        model_type="llama",
        attention_bias=False,
        head_dim=64,
        hidden_size=2048,
        intermediate_size=8192,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=16,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        tie_word_embeddings=True,
        eos_token_id=[128001, 128008, 128009],
        vocab_size=128256,
    ),
    "Mistral-7B-v0.3": dict(
        model_type="mistral",
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rope_theta=1000000.0,
        sliding_window=None,
        vocab_size=32768,
    ),
    "Qwen2.5-0.5B": dict(
        model_type="qwen2",
        hidden_size=896,
        intermediate_size=4864,
        max_position_embeddings=32768,
        max_window_layers=24,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        use_mrope=False,
        use_sliding_window=False,
        vocab_size=151936,
    ),
    "Qwen3-0.6B": dict(
        model_type="qwen3",
        attention_bias=False,
        head_dim=128,
        hidden_size=1024,
        intermediate_size=3072,
        max_position_embeddings=40960,
        max_window_layers=28,
        num_attention_heads=16,
        num_hidden_layers=28,
        num_key_value_heads=8,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        tie_word_embeddings=True,
        use_sliding_window=False,
        vocab_size=151936,
    ),
}
# n_embd, n_head, n_kv_head, head_dim, n_inner, tied, the rope_theta.
EXPECTED = {
    "TinyLlama": (2048, 32, 4, 64, 5632, False, 10000.0),
    "SmolLM2-135M": (576, 9, 3, 64, 1536, True, 100000),
    "Llama-3.2-1B": (2048, 32, 8, 64, 8192, True, 500000.0),
    "Mistral-7B-v0.3": (4096, 32, 8, 128, 14336, False, 1000000.0),
    "Qwen2.5-0.5B": (896, 14, 2, 64, 4864, True, 1000000.0),
    "Qwen3-0.6B": (1024, 16, 8, 128, 3072, True, 1000000),
}
SMALL = {"model_type": "llama", **SIZES}


def read(**settings):
    return TransformerConfig.from_transformers(settings)


@pytest.fixture(params=list(ROTARY))
def peer(request):
    return make_peer(request.param)


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    dialogues = builtin_dialogues(num_train=4, num_valid=1)
    return build_store(dialogues, tokenizer, tmp_path_factory.mktemp("s") / "store")


@pytest.mark.parametrize("name", ROTARY)
def test_losses_logits_and_every_gradient_are_those_of_transformers(
    name, store, tokenizer, to_ours
):
    peer = make_peer(name, vocab_size=len(tokenizer))
    padded, shared = (
        make_batches(store, num_candidates=3, layout=layout) for layout in ("padded", "shared")
    )
    batch = padded.collate(padded.rows[-4:])
    expected = peer(**batch)
    (expected.loss + 0.5 * expected.mc_loss).backward()
    model = to_ours(peer)
    for inputs in (batch, shared.collate(padded.rows[-4:])):
        model.zero_grad()
        actual = model(**inputs)
        (actual.loss + 0.5 * actual.mc_loss).backward()
        assert relative_error(actual.loss, expected.loss) < 1e-5
        assert relative_error(actual.mc_loss, expected.mc_loss) < 1e-5
        assert relative_error(actual.mc_logits, expected.mc_logits) < 1e-4
        assert_gradients(model, peer)
    with torch.no_grad():
        logits = model(**batch, return_logits=True).logits
    assert relative_error(logits, expected.logits) < 1e-4


@torch.no_grad()
def test_far_positions_are_those_of_transformers(peer, to_ours):
    model = to_ours(peer)
    position_ids = torch.arange(39980, 40000) - 3000 * torch.arange(6)[:, None]
    expected = peer(IDS, position_ids=position_ids)
    actual = model(IDS, position_ids=position_ids.view_as(IDS))
    assert relative_error(actual.logits, expected.logits) < 1e-4
    assert relative_error(actual.mc_logits, expected.mc_logits) < 1e-4


@torch.no_grad()
def test_transformers_loads_what_is_saved_but_for_the_head_it_lacks(peer, to_ours, tmp_path):
    model = to_ours(peer)
    model.save_pretrained(tmp_path / "ours")
    causal, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    head = {"multiple_choice_head.weight", "multiple_choice_head.bias"}
    assert set(found.pop("unexpected_keys")) == head
    assert not any(found.values())
    logits = causal(IDS.flatten(0, 1)).logits.view(2, 3, 20, 101)
    assert relative_error(logits, model(IDS).logits) < 1e-5
    again = DoubleHeadsModel.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(again(IDS).mc_logits, model(IDS).mc_logits)
    assert (again.head_is_new, model.head_is_new) == (False, False)


@torch.no_grad()
def test_a_language_model_in_shards_of_bfloat16_gets_a_new_head(tmp_path, caplog):
    peer = make_peer("llama-3.1")
    del peer.multiple_choice_head
    peer.bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with caplog.at_level(logging.WARNING):
        model = DoubleHeadsModel.from_pretrained(tmp_path)
    assert "has no multiple-choice head" in caplog.text
    assert model.head_is_new
    weights = dict(peer.float().named_parameters())
    qkv = [weights[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(model.transformer.blocks[1].attention.qkv.weight, torch.cat(qkv))
    assert torch.equal(model.lm_head, weights["lm_head.weight"])


def test_a_body_without_heads_and_with_frequencies_is_read(tmp_path):
    peer = make_peer("llama")
    peer.model.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    name = "layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(tmp_path, lambda tensors: tensors | {name: 100.0 ** -(torch.arange(6) / 6)})
    model = DoubleHeadsModel.from_pretrained(tmp_path)
    assert torch.equal(model.transformer.token_embedding.weight, peer.lm_head.weight)
    edit_weights(tmp_path, lambda tensors: tensors | {name: torch.ones(6)})
    with pytest.raises(UserError, match=r"inv_freq holds something else .* the model of Llama"):
        DoubleHeadsModel.from_pretrained(tmp_path)


def test_a_head_that_config_json_ties_is_the_embedding_once_more(tmp_path):
    make_peer("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert DoubleHeadsModel.from_pretrained(tmp_path).lm_head is None
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the token embedding"):
        DoubleHeadsModel.from_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert torch.equal(DoubleHeadsModel.from_pretrained(tmp_path).lm_head, embedding + 1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks tensors .*: lm_head.weight"):
        DoubleHeadsModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_config_means_what_it_means_in_transformers(model):
    config = read(**PUBLISHED[model])
    sizes = (config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.n_inner)
    assert (*sizes, config.tied, config.rope.parameters["rope_theta"]) == EXPECTED[model]
    assert config.n_positions == PUBLISHED[model]["max_position_embeddings"]
    assert config.qkv_bias == (config.family == "qwen2")
    assert config.qk_norm == (config.family == "qwen3")
    assert all(a > b for a, b in pairwise(config.rope.frequencies))
    theirs = AutoConfig.for_model(**config.to_transformers())
    assert read(**theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive whole number"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a positive whole number"),
        ({"num_attention_heads": 5}, "transformers refuses .*not a multiple of"),
        ({"num_key_value_heads": 3}, "the 4 attention heads must be a multiple of the 3 of keys"),
        ({"head_dim": 7}, "transformers refuses .*even"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported for llama; use one of"),
        ({"rms_norm_eps": "small"}, "transformers refuses the settings .*'rms_norm_eps'"),
        ({"quantization_config": {"bits": 4}}, "get the model before it was quantised"),
        ({"pretraining_tp": 2}, "pretraining_tp 2 is not supported; only 1 is"),
        ({"num_local_experts": 8}, "num_local_experts 8 is not supported"),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types 'chunked_attention' is not supported; only 'full_attention' is",
        ),
        (
            {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        (
            {"rope_scaling": {"type": "su", "factor": 2.0}},
            "'su'.* are not supported; only a rope_type of default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, "transformers refuses .*factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "make no numbers"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "for all layers alike"),
        ({"model_type": "mistral"}, "sliding_window 4096 .* max_position_embeddings; set that to"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "sliding_window 4096 hides tokens of the 40000",
        ),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported; use one of .*llama"),
    ],
)
def test_what_would_change_the_results_is_refused_in_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence):
        read(**SMALL | change)


def test_a_window_over_all_positions_hides_nothing():
    settings = SMALL | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    assert read(**settings, sliding_window=40000) == read(**SMALL | {"model_type": "qwen2"})
