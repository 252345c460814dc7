"""A model and its tokenizer that fit each other: one that has learnt to chat, among them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from convai_fast import GenerationEngine, Request, SamplingParams, evaluate, load
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.format import SPEAKERS
from convai_fast.dialogue.layout import classic
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError
from convai_fast.loading import reading_of
from convai_fast.model.families import FAMILIES
from convai_fast.serving.conversation import Conversation
from convai_fast.training.lora import Lora
from convai_fast.training.options import TrainOptions
from tests.helpers.chat_tokenizers import chat_tokenizer
from tests.helpers.model_peers import SIZES
from tests.helpers.old_checkpoints import LAYOUTS, write_old_checkpoint

MODELS = {
    "smollm2": "llama",
    "qwen3": "qwen3",
    "llama2": "llama",
    "tinyllama": "llama",
    "mistral0.3": "mistral",
}
PERSONA, HISTORY = ["i like tea.", "i have two cats."], ["hello!", "hi, how are you?", "fine. you?"]


def save(name, folder, **settings):
    """A model with more rows than its tokenizer has tokens, as many are published."""
    tokenizer = chat_tokenizer(name)
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer) + 11, "initializer_range": 0.3}
    sizes["max_position_embeddings"] = 512
    FAMILIES[MODELS[name]].peer(sizes | settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def template_ids(name):
    roles = ["user", "assistant", "user"]
    messages = [{"role": "system", "content": "\n".join(PERSONA)}]
    messages += [{"role": r, "content": t} for r, t in zip(roles, HISTORY, strict=True)]
    return chat_tokenizer(name).apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "tinyllama"])
def test_replies_are_what_transformers_writes_after_the_template(name, tmp_path):
    model, tokenizer = load(save(name, tmp_path))
    engine = GenerationEngine(model, tokenizer, weights="float32")
    params = SamplingParams(no_sample=True, min_length=8, max_length=8)
    [[reply]] = engine.generate([Request(persona=PERSONA, history=HISTORY, params=params)])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([template_ids(name)])
    banned = [[id] for id in engine.layout.ends]
    written = theirs.generate(
        ids, do_sample=False, max_new_tokens=8, min_new_tokens=8, bad_words_ids=banned
    )
    assert reply.token_ids == written[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["llama2", "mistral0.3"])
def test_every_word_of_a_reply_is_scored(name, tmp_path):
    model, tokenizer = load(save(name, tmp_path))
    dialogue = Dialogue(PERSONA, [Utterance(HISTORY, ["I like cats, too."])])
    result = evaluate(model, tokenizer, {"valid": [dialogue]}, metrics=["word_ppl"])
    assert (result.counts["words"], result.counts["unknown_words"]) == (6, 0)


def test_no_token_is_added_and_rows_of_none_are_dropped(tmp_path):
    said = []
    model, tokenizer = load(save("qwen3", tmp_path), resize=True, report=said.append)
    assert said == ["embedding: 11 rows of no token dropped"]  # which a reply could draw
    assert tokenizer.get_vocab() == chat_tokenizer("qwen3").get_vocab()
    assert model.config.vocab_size == len(tokenizer)


def test_a_model_with_too_few_rows_is_refused(tmp_path):
    save("smollm2", tmp_path, vocab_size=50)
    with pytest.raises(UserError, match="embeddings for 50 tokens"):
        load(tmp_path, resize=True)


def test_a_model_without_room_for_its_layout_is_refused(tmp_path):
    model, tokenizer = load(save("smollm2", tmp_path, max_position_embeddings=33))
    with pytest.raises(UserError, match=r"33 positions, .* takes 34 with what stands around it"):
        GenerationEngine(model, tokenizer)


def test_a_blank_line_is_no_turn_though_a_template_writes_a_space_before_it(tmp_path):
    model, tokenizer = load(save("mistral0.3", tmp_path))
    conversation = Conversation(GenerationEngine(model, tokenizer), tokenizer, SamplingParams())
    assert "Nothing to reply to" in "".join(conversation.handle(" "))
    assert conversation.history == []


@pytest.mark.parametrize("tied", [False, True])
def test_segments_change_nothing_until_they_are_trained_and_are_kept(tmp_path, tied):
    folder, said = save("smollm2", tmp_path / "a", tie_word_embeddings=tied), []
    before, _ = load(folder)
    model, tokenizer = load(folder, resize=True, segments=True, report=said.append)
    assert "<speaker1> or <speaker2>" in said[-1]
    ids, speakers = torch.tensor([[5, 6, 7, 8]]), tokenizer.convert_tokens_to_ids([*SPEAKERS])
    segments = torch.tensor([[*speakers, *speakers]])
    with torch.no_grad():
        logits = model(ids, token_type_ids=segments).logits
        rows = before.config.vocab_size
        assert logits[..., :rows].equal(before(ids).logits)
        model.transformer.token_embedding.weight[speakers] = 1.0
        trained = model(ids, token_type_ids=segments).logits
    assert not trained.equal(logits)
    model.save_pretrained(tmp_path / "b", tokenizer)
    again, its_tokenizer = load(tmp_path / "b", resize=True, segments=True)
    assert again(ids, token_type_ids=segments).logits.equal(trained)
    assert GenerationEngine(again, its_tokenizer).layout.speaker1 == speakers[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_speakers_that_were_learnt_as_tokens_stay_when_segments_are_added(tmp_path):
    folder = save("smollm2", tmp_path / "a")
    (folder / "chat_template.jinja").unlink()
    model, tokenizer = load(folder, resize=True, report=str)
    learnt = model.transformer.token_embedding.weight[tokenizer.get_vocab()["<speaker1>"]]
    model.save_pretrained(tmp_path / "b", tokenizer)
    again, its_tokenizer = load(tmp_path / "b", resize=True, segments=True, report=str)
    assert again.config.segments
    rows = again.transformer.token_embedding.weight
    assert rows[its_tokenizer.get_vocab()["<speaker1>"]].equal(learnt)


def test_the_layout_of_an_old_tokenizer_is_not_asked_of_the_current_folder(tmp_path, monkeypatch):
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "gpt2")
    (tmp_path / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    reading = reading_of("old")
    assert reading.layout == classic(special_ids(reading.tokenizer))


def test_a_model_that_no_reply_fits_is_refused_by_its_config_alone(tmp_path):
    with pytest.raises(UserError, match="the model has 2 positions, as its config"):
        reading_of(save("smollm2", tmp_path, max_position_embeddings=2))


@pytest.mark.parametrize("segments", [False, True])
def test_an_adapter_of_a_chat_model_trains_no_rows_but_those_of_segments(tmp_path, segments):
    folder = save("mistral0.3", tmp_path / "base")
    model, tokenizer = load(folder, resize=True, segments=segments, report=str)
    speakers = [id for id in map(tokenizer.get_vocab().get, SPEAKERS) if id is not None]
    lora = Lora(model, TrainOptions(model=str(folder), lora_r=2), speakers)
    with torch.no_grad():
        for parameter in lora.state_dict().values():
            parameter.add_(0.1)
    lora.save_pretrained(tmp_path / "adapter", tokenizer)
    ids = torch.arange(12)[None]
    given = {"token_type_ids": torch.tensor([speakers * 6])} if segments else {}
    merged, _ = load(tmp_path / "adapter")
    logits = model(ids, **given).logits
    torch.testing.assert_close(merged(ids, **given).logits, logits, rtol=1e-4, atol=1e-4)
    assert not segments or not logits.equal(model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template
