import dataclasses

import pytest
from transformers import GPT2Config, OpenAIGPTConfig

from convai_fast.errors import UserError
from convai_fast.model import TransformerConfig
from convai_fast.model.config import Rope

CONFIG_CLASSES = {"openai-gpt": OpenAIGPTConfig, "gpt2": GPT2Config}
OLD_GPT = {"afn": "gelu", "n_ctx": 512, "n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 90}


def read(**settings):
    return TransformerConfig.from_transformers(settings)


def test_defaults_are_those_of_transformers(architecture):
    peer = CONFIG_CLASSES[architecture]().to_dict()
    assert read(model_type=architecture) == TransformerConfig.from_transformers(peer)


def test_every_field_survives_transformers_own_config_class(architecture):
    config = dataclasses.replace(
        read(model_type=architecture, n_embd=24, n_layer=3, n_head=4, vocab_size=77),
        n_positions=65,
        norm_eps=1e-6,
        embd_pdrop=0.25,
        attn_pdrop=0.0,
        resid_pdrop=0.125,
        summary_first_dropout=0.5,
        initializer_range=0.03,
        activation="relu",
    )
    peer = CONFIG_CLASSES[architecture].from_dict(config.to_transformers())
    assert TransformerConfig.from_transformers(peer.to_dict()) == config


def test_gpt2_width_of_the_mlp_is_kept():
    assert read(model_type="gpt2", n_embd=12, n_inner=20).n_inner == 20
    assert read(model_type="gpt2", n_embd=12, n_inner=None).n_inner == 48
    assert read(model_type="gpt2", n_embd=12, n_inner=20).to_transformers()["n_inner"] == 20


def test_openai_gpt_ignores_n_inner_as_transformers_does():
    assert read(model_type="openai-gpt", n_embd=12, n_inner=20).n_inner == 48


def test_gelu_means_the_tanh_approximation_in_openai_gpt_and_the_exact_one_in_gpt2():
    assert read(model_type="openai-gpt", afn="gelu").activation == "gelu_new"
    assert read(model_type="gpt2", activation_function="gelu").activation == "gelu"
    assert read(model_type="gpt2", activation_function="gelu_new").activation == "gelu_new"
    assert read(model_type="openai-gpt").to_transformers()["afn"] == "gelu"


def test_gpt2_names_no_special_token_outside_a_small_vocabulary():
    small = GPT2Config.from_dict(read(model_type="gpt2", vocab_size=50256).to_transformers())
    assert (small.bos_token_id, small.eos_token_id) == (None, None)
    usual = GPT2Config.from_dict(read(model_type="gpt2").to_transformers())
    assert (usual.bos_token_id, usual.eos_token_id) == (50256, 50256)


def test_norms_stand_where_the_family_has_them():
    gpt, gpt2 = read(model_type="openai-gpt"), read(model_type="gpt2")
    assert (gpt.norm_position, gpt.final_norm) == ("post", False)
    assert (gpt2.norm_position, gpt2.final_norm) == ("pre", True)


def test_names_that_transformers_accepts_for_a_size_are_understood():
    config = read(
        model_type="gpt2",
        hidden_size=24,
        num_hidden_layers=5,
        num_attention_heads=3,
        max_position_embeddings=33,
    )
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (24, 5, 3, 33)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (OLD_GPT, "openai-gpt"),
        ({"architectures": ["OpenAIGPTLMHeadModel"]}, "openai-gpt"),
        ({"architectures": ["GPT2LMHeadModel"]}, "gpt2"),
        ({"architectures": ["LlamaForCausalLM"]}, "llama"),
        ({"architectures": "Qwen2Model"}, "qwen2"),
        ({"activation_function": "gelu_new"}, "gpt2"),
        ({"n_ctx": 1024, "n_embd": 768}, "gpt2"),
    ],
)
def test_the_family_of_a_config_without_model_type_is_recognised(settings, expected):
    assert read(**settings).family == expected


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"model_type": "bloom"},
            "model_type 'bloom' is not supported; use one of openai-gpt, gpt2,",
        ),
        ({"architectures": ["BertModel"]}, r"architectures \['BertModel'\] is not supported"),
        ({"architectures": ["Llama4ForCausalLM"]}, r"\['Llama4ForCausalLM'\] is not supported"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, r"\['Qwen2MoeForCausalLM'\] is not supp"),
        ({"architectures": ["Mistral3Model"]}, r"\['Mistral3Model'\] is not supported"),
        ({"n_embd": 768}, "model_type is missing"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights False is not"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx True is not supported; only False is",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention True"),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"model_type": "gpt2", "activation_function": "mish"}, "activation_function 'mish'"),
        ({"model_type": "openai-gpt", "afn": "gelu_new"}, "afn 'gelu_new' is not supported for"),
        ({"model_type": "gpt2", "summary_type": "mean"}, "summary_type 'mean'"),
        ({"model_type": "gpt2", "summary_use_proj": False}, "summary_use_proj False"),
        ({"model_type": "gpt2", "summary_proj_to_labels": False}, "summary_proj_to_labels False"),
        ({"model_type": "gpt2", "summary_activation": "tanh"}, "summary_activation 'tanh'"),
        ({"model_type": "gpt2", "summary_last_dropout": 0.1}, "summary_last_dropout 0.1"),
        ({"model_type": "gpt2", "vocab_size": 0}, "vocab_size must be a positive whole number"),
        ({"model_type": "gpt2", "n_layer": "12"}, "n_layer must be a positive whole number"),
        ({"model_type": "gpt2", "n_head": 7}, "n_embd 768 must be a multiple of n_head 7"),
        ({"model_type": "gpt2", "attn_pdrop": 1.5}, "attn_pdrop must be a probability"),
        ({"model_type": "gpt2", "layer_norm_epsilon": 0}, "norm_eps must be a number above 0"),
    ],
)
def test_what_would_change_the_results_is_refused_in_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        read(**settings)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_kv_head": 5}, "the 12 attention heads must be a multiple of the 5 of keys and values"),
        (
            {"rope": Rope((1.0,), 1.0, {}), "head_dim": 3},
            "rotary positions need heads of an even width, all of which turns, not 3",
        ),
    ],
)
def test_what_no_decoder_can_be_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(read(model_type="gpt2"), **change)
