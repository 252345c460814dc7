"""What the engine writes: the tokens of transformers, its own random numbers, and how it ends."""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from convai_fast import ops
from convai_fast.dialogue.prompt import fit_prompt
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from convai_fast.model import DoubleHeadsModel
from tests.helpers.reply_peers import both_models, prompt_of, recomputed_reply

GREEDY = SamplingParams(no_sample=True, max_length=12)
LIVELY = SamplingParams(temperature=5, top_p=0, max_length=12, min_length=12)


def reply_to(engine, request):
    [[reply]] = engine.generate([request])
    return reply


# --- the tokens of transformers -----------------------------------------------------------------


@pytest.mark.parametrize("min_length", [0, 12])
def test_greedy_replies_are_those_of_transformers_recomputed_for_every_token(
    models, tokenizer, ask, min_length
):
    params = replace(GREEDY, min_length=min_length, logprobs=True)
    requests = [ask(number, params, turns=number % 4) for number in range(12)]
    replies = GenerationEngine(models.ours, tokenizer).generate(requests)
    for request, [reply] in zip(requests, replies, strict=True):
        token_ids, logprobs = recomputed_reply(models.theirs, tokenizer, request)
        assert reply.token_ids == token_ids
        assert reply.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert reply.finish_reason == ("length" if len(token_ids) == 12 else "eos")
        assert reply.text == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert len({tuple(reply.token_ids) for [reply] in replies}) >= 8  # or it says little


def test_greedy_replies_are_those_of_transformers_generate(tokenizer, ask, tmp_path):
    models = both_models("gpt2", tmp_path, len(tokenizer))
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    special = special_ids(tokenizer)

    def generate(request, with_segments):
        prompt = prompt_of(request, tokenizer, 96)
        segments = (
            {"token_type_ids": torch.tensor([prompt.token_type_ids])} if with_segments else {}
        )
        ids = gpt2.generate(
            torch.tensor([prompt.input_ids]),
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
            eos_token_id=list(special),
            pad_token_id=special.pad,
            **segments,
        )
        return ids[0, len(prompt.input_ids) :].tolist()

    requests = [ask(number, replace(GREEDY, min_length=12)) for number in range(8)]
    replies = [
        reply.token_ids for [reply] in GenerationEngine(models.ours, tokenizer).generate(requests)
    ]
    assert replies == [generate(request, True) for request in requests]
    assert replies != [generate(request, False) for request in requests]  # segments count


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
        ({"repetition_penalty": 0.8}, [RepetitionPenaltyLogitsProcessor(0.8)]),
        ({"no_repeat_ngram_size": 1}, [NoRepeatNGramLogitsProcessor(1)]),
        ({"no_repeat_ngram_size": 2}, [NoRepeatNGramLogitsProcessor(2)]),
        (
            {"repetition_penalty": 0.5, "no_repeat_ngram_size": 3},
            [RepetitionPenaltyLogitsProcessor(0.5), NoRepeatNGramLogitsProcessor(3)],
        ),
    ],
)
def test_penalties_and_bans_are_those_of_transformers(models, tokenizer, ask, params, processors):
    params = replace(GREEDY, max_length=24, min_length=20, logprobs=True, **params)
    requests = [ask(number, params) for number in range(4)]
    engine = GenerationEngine(models.ours, tokenizer)
    free = replace(params, repetition_penalty=1.0, no_repeat_ngram_size=0)
    differs = False
    for request in requests:
        reply = reply_to(engine, request)
        token_ids, logprobs = recomputed_reply(models.theirs, tokenizer, request, processors)
        assert reply.token_ids == token_ids
        assert reply.logprobs == pytest.approx(logprobs, abs=1e-4)
        differs |= reply.token_ids != reply_to(engine, replace(request, params=free)).token_ids
    assert differs


def test_neighbours_without_penalties_are_left_alone(engine, ask):
    plain = [ask(number, GREEDY) for number in range(4)]
    odd = ask(9, replace(GREEDY, repetition_penalty=1.5, no_repeat_ngram_size=2, min_length=9))
    alone = engine.generate(plain)
    together = engine.generate([plain[0], odd, *plain[1:]])
    assert [together[0], *together[2:]] == alone


# --- how a reply is drawn -----------------------------------------------------------------------


def test_temperature_0_is_greedy(engine, ask):
    zero = SamplingParams(temperature=0, max_length=12)
    assert reply_to(engine, ask(1, zero)) == reply_to(engine, ask(1, GREEDY))


def test_special_tokens_end_a_reply_but_not_before_min_length(engine, tokenizer, ask):
    special = set(special_ids(tokenizer))

    def lengths(min_length):
        params = replace(LIVELY, temperature=50, max_length=60, min_length=min_length)
        requests = [ask(0, replace(params, seed=seed)) for seed in range(150)]
        replies = [reply for [reply] in engine.generate(requests)]
        assert not {token for reply in replies for token in reply.token_ids} & special
        for reply in replies:
            assert reply.finish_reason == ("length" if len(reply.token_ids) == 60 else "eos")
        return {len(reply.token_ids) for reply in replies}

    assert min(lengths(0)) < 3
    assert 12 <= min(lengths(12)) < 40
    assert lengths(60) == {60}


def test_a_reply_depends_on_its_seed(engine, ask):
    def reply(seed):
        return reply_to(engine, ask(2, replace(LIVELY, seed=seed))).token_ids

    assert reply(1) == reply(1)
    assert len({tuple(reply(seed)) for seed in range(5)}) == 5


@pytest.fixture(scope="module")
def indifferent(model, tokenizer):
    """An engine whose logits are all 0, so that a reply shows the random numbers alone."""
    zeros = DoubleHeadsModel(model.config)
    for parameter in zeros.parameters():
        torch.nn.init.zeros_(parameter)
    return GenerationEngine(zeros, tokenizer)


def test_each_token_is_drawn_with_the_seed_as_key_and_its_place_as_counter(indifferent, ask):
    params = replace(LIVELY, max_length=10, min_length=10, temperature=1, seed=9, n=3)
    [replies] = indifferent.generate([ask(0, params)])
    logits = torch.zeros(10, indifferent.model.config.vocab_size)
    logits[:, list(indifferent.layout.ends)] = -torch.inf
    for sample, reply in enumerate(replies):
        expected, _ = ops.sample(logits, seeds=9, steps=torch.arange(10) + (sample << 32))
        assert reply.token_ids == expected.tolist()
        assert len(set(reply.token_ids)) > 5


def test_logprobs_are_those_after_bans_and_before_temperature_and_filters(indifferent, ask):
    params = SamplingParams(max_length=5, min_length=3, logprobs=True, top_k=3, temperature=9)
    reply = reply_to(indifferent, ask(0, params))
    vocab_size = indifferent.model.config.vocab_size
    banned = -torch.tensor(vocab_size - 5.0).log().item()
    free = -torch.tensor(float(vocab_size)).log().item()
    assert reply.logprobs == pytest.approx([banned] * 3 + [free] * (len(reply.token_ids) - 3))
    assert reply_to(indifferent, ask(0, SamplingParams())).logprobs is None


def test_filters_are_applied_row_by_row(engine, ask):
    lively = [replace(LIVELY, seed=seed) for seed in range(4)]
    filters = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {}]
    params = [replace(each, **filter) for each, filter in zip(lively, filters, strict=True)]
    replies = [reply.token_ids for [reply] in engine.generate([ask(5, p) for p in params])]
    greedy = reply_to(engine, ask(5, replace(GREEDY, min_length=12))).token_ids
    assert replies[:3] == [greedy] * 3
    assert replies[3] != greedy


def test_damaged_weights_are_said_to_be_the_reason_that_nothing_can_be_drawn(model, tokenizer, ask):
    damaged = DoubleHeadsModel(model.config)
    torch.nn.init.constant_(damaged.transformer.token_embedding.weight, torch.nan)
    with pytest.raises(UserError, match="request 0: no token can be drawn"):
        GenerationEngine(damaged, tokenizer).generate([ask(0, GREEDY)])


# --- prompts that do not fit --------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [1, 20, 96 - 4])
def test_a_prompt_longer_than_the_model_is_cut_to_leave_room_for_the_reply(engine, max_length):
    persona = [list(range(9 * i, 9 * i + 9)) for i in range(12)]
    history = [turn[::-1] for turn in persona]
    params = SamplingParams(no_sample=True, max_length=max_length, min_length=max_length)
    reply = reply_to(engine, Request(persona=persona, history=history, params=params))
    assert len(reply.token_ids) == max_length
    prompt = fit_prompt(persona, history, engine.layout, 96 - max_length)
    assert reply == reply_to(engine, Request(**prompt._asdict(), params=params))


def test_a_max_length_without_room_for_a_prompt_is_refused_at_once(engine):
    request = Request(params=SamplingParams(max_length=93))
    message = r"^max_length is 93.*96 positions: give at most 92"
    with pytest.raises(UserError, match=message):
        engine.stream(request)
    with pytest.raises(UserError, match=message):
        engine.check(request)
    with pytest.raises(UserError, match=r"^request 1: max_length is 93"):
        engine.generate([Request(), request])


def test_max_length_1_is_one_token(engine, ask):
    params = SamplingParams(max_length=1, n=3)
    [replies] = engine.generate([ask(0, params)])
    assert [len(reply.token_ids) for reply in replies] == [1, 1, 1]
    assert {reply.finish_reason for reply in replies} == {"length"}


# --- the model ----------------------------------------------------------------------------------


def test_inference_mode_does_not_leak_to_whoever_reads_the_replies(engine, ask):
    for _ in engine.stream(ask(3, GREEDY)):
        assert not torch.is_inference_mode_enabled()
    for _ in engine.serve([ask(3, GREEDY)]):
        assert not torch.is_inference_mode_enabled()


def test_a_model_in_training_mode_replies_without_dropout_and_stays_in_it(model, tokenizer, ask):
    expected = GenerationEngine(model, tokenizer).generate([ask(4, GREEDY)])
    model.train()
    try:
        assert GenerationEngine(model, tokenizer).generate([ask(4, GREEDY)]) == expected
        assert model.training
        assert model.transformer.blocks[0].mlp.dropout.training
    finally:
        model.eval()


def test_a_bfloat16_model_is_one_with_rounded_weights(model, tokenizer, ask):
    half = DoubleHeadsModel(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    rounded = DoubleHeadsModel(model.config)
    rounded.load_state_dict(half.state_dict())
    request = ask(4, replace(GREEDY, min_length=12, logprobs=True))
    expected = GenerationEngine(rounded, tokenizer).generate([request])
    assert GenerationEngine(half, tokenizer).generate([request]) == expected
