"""Replies to real dialogues with the real vocabularies, token for token those of transformers."""

import itertools

import pytest
import torch
import transformers

from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.tokenizer import load_tokenizer, special_ids
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from tests.helpers.reply_peers import both_models, prompt_of, recomputed_reply

GREEDY = SamplingParams(no_sample=True, max_length=10, min_length=10)


@pytest.fixture(scope="module")
def dialogues(shared_dir):
    path = shared_dir / "data" / "synthetic-persona-chat" / "valid.csv"
    return load_dialogues(path, num_candidates=1)["valid"][:6]


@pytest.fixture(scope="module", params=["openai-gpt", "gpt2"])
def real(request, shared_dir, tmp_path_factory):
    """A tokenizer, and a small model with random weights of the size of its vocabulary."""
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / request.param)
    folder = tmp_path_factory.mktemp(request.param)
    models = both_models(
        request.param, folder, len(tokenizer), n_positions=512, n_embd=64, n_layer=2
    )
    models.tokenizer = tokenizer
    return models


def turns_of(dialogues, params):
    """A request for every fourth turn, with all that was said before, as it would come."""
    return [
        Request(persona=dialogue.personality, history=utterance.history, params=params)
        for dialogue in dialogues
        for utterance in itertools.islice(dialogue.utterances, 0, None, 4)
    ]


def test_greedy_replies_are_those_of_transformers(real, dialogues):
    requests = turns_of(dialogues, GREEDY)
    engine = GenerationEngine(real.ours, real.tokenizer, max_batch_size=5)
    replies = [reply.token_ids for [reply] in engine.generate(requests)]
    assert len({tuple(reply) for reply in replies}) > 0.8 * len(requests) > 8
    special = special_ids(real.tokenizer)
    if real.architecture == "openai-gpt":  # without a cache in transformers
        for request, reply in list(zip(requests, replies, strict=True))[::2]:
            assert reply == recomputed_reply(real.theirs, real.tokenizer, request)[0]
        return
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(real.folder)
    for request, reply in zip(requests, replies, strict=True):
        prompt = prompt_of(request, real.tokenizer, 512)
        ids = gpt2.generate(
            torch.tensor([prompt.input_ids]),
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.int64),
            token_type_ids=torch.tensor([prompt.token_type_ids]),
            do_sample=False,
            max_new_tokens=10,
            min_new_tokens=10,
            eos_token_id=list(special),
            pad_token_id=special.pad,
        )
        assert reply == ids[0, len(prompt.input_ids) :].tolist()


def test_a_dialogue_turn_by_turn_computes_each_token_once(computed, real, dialogues):
    def num_words(dialogue):
        texts = [*dialogue.personality, *dialogue.utterances[-1].history]
        return sum(len(text.split()) for text in texts)

    # The turns of one that does not fit the model do not begin alike.
    dialogue = max((d for d in dialogues if num_words(d) < 270), key=num_words)
    engine = GenerationEngine(real.ours, real.tokenizer, max_batch_size=1)
    requests = [
        Request(persona=dialogue.personality, history=utterance.history, params=GREEDY)
        for utterance in dialogue.utterances
    ]
    replies = [engine.generate([request]) for request in requests]
    longest = len(prompt_of(requests[-1], real.tokenizer, 512).input_ids)
    # Each turn draws 10 tokens, of which 9 are computed. Where what was said next begins as the
    # reply did, even a little less.
    most = longest + 9 * len(requests)
    assert 0.95 * most < sum(computed) <= most
    fresh = GenerationEngine(real.ours, real.tokenizer).generate(requests)
    assert [reply for [reply] in replies] == fresh


def test_text_comes_out_as_it_went_in(real, dialogues):
    engine = GenerationEngine(real.ours, real.tokenizer)
    params = SamplingParams(max_length=20, temperature=3, top_p=0, stop=("a",), n=8)
    for replies in engine.generate(turns_of(dialogues[:2], params)):
        for reply in replies:
            whole = real.tokenizer.decode(reply.token_ids)
            assert reply.text == (whole.split("a")[0] if "a" in whole else whole)
            assert (reply.finish_reason == "stop") == ("a" in whole)
