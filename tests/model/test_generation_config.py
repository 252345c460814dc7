"""Where replies end, here and in transformers, and what else `generate` is told there."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from convai_fast import DoubleHeadsModel, GenerationEngine, Request, SamplingParams, load
from convai_fast.errors import UserError
from convai_fast.generation.request import build_prompt
from tests.helpers.chat_tokenizers import chat_tokenizer
from tests.helpers.model_peers import make_peer

WORD = 40  # a token that may stand in any reply
ASKED = Request(
    persona=["i like tea."],
    history=["hello!"],
    params=SamplingParams(no_sample=True, min_length=0, max_length=5),
)


def save(folder, **generation):
    """A Qwen 2.5 as it is published: its tokenizer knows one of its two ends."""
    tokenizer = copy.deepcopy(chat_tokenizer("qwen2.5"))
    tokenizer.pad_token = "<|endoftext|>"
    peer = make_peer("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=False)
    peer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def id_of(token):
    return chat_tokenizer("qwen2.5").get_vocab()[token]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
def test_a_reply_ends_at_the_layouts_end_and_the_checkpoints_here_and_in_transformers(
    end, tmp_path
):
    model, tokenizer = load(save(tmp_path / "a", eos_token_id=[id_of("<|endoftext|>"), WORD]))
    engine = GenerationEngine(model, tokenizer)
    prompt = build_prompt(ASKED, tokenizer, engine.layout, model.config.vocab_size, 99)
    ids = torch.tensor([prompt.input_ids])
    with torch.no_grad():  # the token that is sure to be drawn
        model.lm_head[id_of(end)] = 99 * model.transformer(ids)[0, -1]
    model.save_pretrained(tmp_path / "b", tokenizer)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    written = theirs.generate(ids, do_sample=False, max_new_tokens=5)
    assert written[0, ids.shape[1] :].tolist() == [id_of(end)]
    [[reply]] = GenerationEngine(*load(tmp_path / "b")).generate([ASKED])
    assert (reply.token_ids, reply.finish_reason) == ([], "eos")


def test_how_transformers_draws_is_kept_and_ends_are_those_of_all(tmp_path):
    kept = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1}
    ends = [id_of("<|endoftext|>")]
    folder = save(tmp_path / "a", eos_token_id=ends, _from_model_config=True, **kept)
    model, tokenizer = load(folder)
    for place in (tmp_path / "b", tmp_path / "c"):  # also when it was saved before
        model.save_pretrained(place, tokenizer)
        saved = GenerationConfig.from_pretrained(place)
        assert {name: getattr(saved, name) for name in kept} == kept
        assert {*ends, id_of("<|im_end|>")} < set(saved.eos_token_id)
        assert saved.eos_token_id == [*GenerationEngine(model, tokenizer).layout.ends]
        assert saved.pad_token_id == tokenizer.pad_token_id
        assert not saved._from_model_config
        model, tokenizer = load(place)


def test_settings_that_transformers_would_not_save_end_no_training(tmp_path):
    model, tokenizer = load(save(tmp_path / "a", temperature=0.9, top_p=0.6))
    model.save_pretrained(tmp_path / "b", tokenizer)  # transformers asks for do_sample with them
    assert GenerationConfig.from_pretrained(tmp_path / "b").top_p == 0.6


def test_without_the_file_the_ends_are_those_of_config_json(tmp_path):
    folder = save(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings["eos_token_id"] = [WORD, id_of("<|endoftext|>"), 10**9]
    (folder / "config.json").write_text(json.dumps(settings))
    engine = GenerationEngine(*load(folder))
    assert id_of("<|endoftext|>") in engine.layout.ends
    assert WORD not in engine.layout.ends  # which transformers writes where nobody sets one


def test_a_word_that_was_added_is_no_end(tmp_path):
    model, tokenizer = load(save(tmp_path))
    tokenizer.add_tokens(["hmm"])
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config = {"eos_token_id": len(tokenizer) - 1}
    assert len(tokenizer) - 1 not in GenerationEngine(model, tokenizer).layout.ends


def test_what_another_model_said_does_not_stay_in_a_folder(tmp_path):
    model, tokenizer = load(save(tmp_path / "a", temperature=0.6))
    model.save_pretrained(tmp_path / "b", tokenizer)
    model.generation_config = {}
    model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "generation_config.json").exists()


def test_a_tokenizer_that_has_no_layout_is_saved(tmp_path):
    model, tokenizer = load(save(tmp_path / "a"))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    model.save_pretrained(tmp_path / "b", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [id_of("<|im_end|>")]


def test_a_damaged_file_is_named(tmp_path):
    folder = save(tmp_path, temperature=1.0)
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"generation_config\.json must hold a JSON object"):
        DoubleHeadsModel.from_pretrained(folder)
