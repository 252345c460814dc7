"""Many requests at a time: no reply depends on the others, and no token is computed twice."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from convai_fast import _native, ops
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from convai_fast.model import DoubleHeadsModel, TransformerConfig
from tests.helpers.reply_peers import prompt_of

THREE = SamplingParams(max_length=3, min_length=3, seed=1)

needs_kernels = pytest.mark.skipif(
    _native.host is None, reason="plain PyTorch rounds differently from batch to batch"
)


# --- independence -------------------------------------------------------------------------------


def many_requests(count):
    """Requests of all kinds, some of which share persona or history."""
    rng = random.Random(0)
    personas = [[rng.choices(range(400), k=rng.randint(1, 12)) for _ in range(2)] for _ in range(6)]
    openings = [rng.choices(range(400), k=rng.randint(1, 9)) for _ in range(5)]
    requests = []
    for seed in range(count):
        history = [rng.choice(openings)]
        history += [rng.choices(range(400), k=rng.randint(1, 6)) for _ in range(rng.randint(0, 3))]
        length = rng.choice([1, 2, 5, 9, 16])
        params = SamplingParams(
            max_length=length,
            min_length=rng.randint(0, length),
            temperature=rng.choice([0, 0.7, 1.0, 2.0]),
            top_k=rng.choice([0, 0, 40]),
            top_p=rng.choice([0, 0.9]),
            min_p=rng.choice([0, 0.01]),
            repetition_penalty=rng.choice([1, 1, 1.2]),
            no_repeat_ngram_size=rng.choice([0, 0, 3]),
            seed=seed,
            n=rng.choice([1, 1, 1, 3]),
            logprobs=True,
        )
        requests.append(Request(persona=rng.choice(personas), history=history, params=params))
    return requests


@needs_kernels
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_replies_and_logprobs_are_the_same_bits_whatever_they_are_batched_with(tokenizer, weights):
    """The weights are those of a new model, whose logits are so flat that a bit can decide."""
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), n_positions=96, n_embd=32, n_layer=2, n_head=4)
    flat = DoubleHeadsModel(TransformerConfig.from_transformers({"model_type": "gpt2", **shape}))
    requests = many_requests(200)

    def engine(max_batch_size):
        return GenerationEngine(flat, tokenizer, max_batch_size=max_batch_size, weights=weights)

    alone = [engine(1).generate([request])[0] for request in requests]
    assert engine(1).generate(requests) == alone
    assert engine(7).generate(requests) == alone
    assert engine(64).generate(requests[::-1]) == alone[::-1]
    used = engine(64)
    assert used.generate(requests) == alone
    assert used.generate(requests) == alone  # now that the slots hold much of it
    assert len({tuple(reply.token_ids) for replies in alone for reply in replies}) > 200


def test_replies_to_one_request_differ_and_the_first_is_that_of_n_1(engine, ask):
    params = SamplingParams(temperature=3, top_p=0, max_length=6, min_length=6, n=9)
    [replies, fewer] = engine.generate([ask(0, params), ask(0, replace(params, n=4))])
    [[one]] = engine.generate([ask(0, replace(params, n=1))])
    assert [reply.token_ids for reply in fewer] == [reply.token_ids for reply in replies[:4]]
    assert one.token_ids == replies[0].token_ids
    assert len({tuple(reply.token_ids) for reply in replies}) == 9


# --- what is computed ---------------------------------------------------------------------------


def test_the_prompt_and_each_token_are_computed_once_and_only_when_asked_for(
    engine, tokenizer, computed, ask
):
    stream = engine.stream(ask(3, THREE))
    assert computed == []
    next(stream)
    length = len(prompt_of(ask(3, THREE), tokenizer, 96).input_ids)
    assert computed == [length]
    next(stream)
    assert computed == [length, 1]
    assert len(list(stream)) == 1
    assert computed == [length, 1, 1]


def test_n_replies_cost_one_prompt_and_then_a_token_each(engine, tokenizer, computed, ask):
    request = ask(1, replace(THREE, n=5))
    engine.generate([request])
    length = len(prompt_of(request, tokenizer, 96).input_ids)
    # The others begin with the last token of the prompt, for its logits, while the first goes on.
    assert computed == [length, 5, 5, 4]


def test_requests_that_share_a_persona_compute_it_once(engine, tokenizer, computed, ask):
    persona = ask(0, THREE, sentences=5).persona
    requests = [replace(ask(number, THREE, turns=1), persona=persona) for number in range(8)]
    engine.generate(requests)
    prompts = [prompt_of(request, tokenizer, 96).input_ids for request in requests]
    shared = 1 + len(prompt_of(Request(persona=persona), tokenizer, 76).input_ids) - 2
    assert shared > 20
    # Two more tokens for each reply; what histories share besides is not counted here.
    most = sum(len(prompt) - shared for prompt in prompts) + shared + 2 * len(requests)
    assert most - 2 * len(requests) < sum(computed) <= most


def test_the_next_turn_computes_only_what_is_new(engine, tokenizer, computed, ask):
    first = ask(0, SamplingParams(max_length=5, min_length=5))
    for number in range(1, 4):  # other conversations, which must not push this one out
        engine.generate([ask(number, THREE)])
    [[reply]] = engine.generate([first])
    for number in range(4, 7):
        engine.generate([ask(number, THREE)])
    computed.clear()
    turn = [7, 8, 9]
    ids = [tokenizer.encode(text) for text in first.history]
    persona = [tokenizer.encode(text) for text in first.persona]
    following = Request(persona=persona, history=[*ids, reply.token_ids, turn], params=THREE)
    continued = engine.generate([following])
    # The last token of the reply, <speaker2> and the turn, and <speaker1>.
    assert computed == [1 + 1 + 3 + 1, 1, 1]
    assert continued == GenerationEngine(engine.model, tokenizer).generate([following])


def test_the_same_request_again_computes_one_token_of_the_prompt(engine, computed, ask):
    first = engine.generate([ask(0, THREE)])
    computed.clear()
    assert engine.generate([ask(0, THREE)]) == first
    assert computed == [1, 1, 1]


def test_equal_tokens_in_other_segments_are_not_shared(engine, tokenizer, computed):
    requests = [
        Request(input_ids=range(9), token_type_ids=[segment] * 9, params=THREE)
        for segment in (5, 6)
    ]
    together = engine.generate(requests)
    assert computed[0] == 18
    alone = GenerationEngine(engine.model, tokenizer).generate(requests[1:])
    assert together[1:] == alone


def test_a_finished_slot_is_refilled_at_once(model, tokenizer, computed, ask):
    engine = GenerationEngine(model, tokenizer, max_batch_size=4)
    lengths = [9, 1, 1, 1, 4, 4, 4, 4, 4, 4]
    requests = [
        ask(number, SamplingParams(max_length=length, min_length=length), turns=1)
        for number, length in enumerate(lengths)
    ]
    engine.generate(requests)
    # 36 tokens in 4 slots; as the longest may begin late, but no slot ever waits for another.
    assert len(computed) <= 9 + 4 + 1


def test_more_replies_than_slots(model, tokenizer, ask):
    engine = GenerationEngine(model, tokenizer, max_batch_size=2)
    [replies] = engine.generate([ask(0, replace(THREE, n=7))])
    [expected] = GenerationEngine(model, tokenizer).generate([ask(0, replace(THREE, n=7))])
    assert replies == expected


def test_a_long_request_after_short_ones_keeps_what_the_slots_hold(engine, computed, ask):
    short = ask(0, THREE, turns=1)
    expected = engine.generate([short])
    capacity = engine._backend.capacity
    engine.generate([Request(input_ids=[*range(80)], params=SamplingParams(max_length=16))])
    assert engine._backend.capacity > capacity
    computed.clear()
    assert engine.generate([short]) == expected
    assert computed == [1, 1, 1]


# --- requests come and go -----------------------------------------------------------------------


def test_serve_yields_every_request_once_with_its_number(engine, ask):
    requests = [
        ask(number, SamplingParams(max_length=1 + number % 9, min_length=1 + number % 9, n=2))
        for number in range(150)
    ]
    served = list(engine.serve(iter(requests)))
    assert sorted(number for number, _ in served) == list(range(150))
    expected = engine.generate(requests)
    assert all(replies == expected[number] for number, replies in served)
    assert served[0][0] != 0 or served[1][0] != 1  # the short ones come before the long ones


def test_no_requests_have_no_replies(engine):
    assert engine.generate([]) == []
    assert list(engine.serve(iter([]))) == []


def test_requests_are_taken_when_they_are_needed(engine, ask):
    endless = (ask(number, SamplingParams(max_length=1)) for number in itertools.count())
    served = engine.serve(endless)
    assert len({number for number, _ in itertools.islice(served, 20)}) == 20
    served.close()
    assert next(endless).params.max_length == 1
    taken = []

    def two():
        for number in range(2):
            taken.append(number)
            yield ask(number, THREE)

    served = engine.serve(two())
    assert taken == []
    next(served)
    assert taken == [0, 1]


def num_free(engine):
    """How many sequences the engine can take at once."""
    engine._scheduler.check_integrity()
    return len(engine._scheduler.free_slots)


@pytest.fixture
def small(model, tokenizer):
    return GenerationEngine(model, tokenizer, max_batch_size=3)


def test_abandoned_replies_free_their_slots(small, ask):
    assert num_free(small) == 3
    served = small.serve(
        [ask(i, SamplingParams(max_length=m, min_length=m)) for i, m in enumerate([1, 9, 9])]
    )
    next(served)
    assert num_free(small) == 1
    served.close()
    stream = small.stream(ask(0, THREE))
    next(stream)
    assert num_free(small) == 2
    stream.close()
    assert num_free(small) == 3


def test_a_stream_inside_a_serve_loop_changes_neither(small, ask):
    requests = [ask(i, SamplingParams(max_length=2 + i, min_length=2 + i)) for i in range(6)]
    expected = small.generate(requests)
    streamed = [*small.stream(ask(9, THREE))]
    served = {}
    for number, replies in small.serve(requests):
        served[number] = replies
        assert [*small.stream(ask(9, THREE))] == streamed
        assert small.generate([ask(9, THREE)])[0][0].token_ids == streamed
    assert [served[number] for number in range(6)] == expected


def test_more_callers_than_slots_are_all_answered(small, ask):
    expected = [small.generate([ask(number, THREE)])[0][0].token_ids for number in range(9)]
    streams = [small.stream(ask(number, THREE)) for number in range(5)]
    first = [next(stream) for stream in streams]
    served = small.generate([ask(number, THREE) for number in range(5, 9)])
    assert [[token, *rest] for token, rest in zip(first, streams, strict=True)] == expected[:5]
    assert [reply.token_ids for [reply] in served] == expected[5:]
    assert num_free(small) == 3


def test_a_request_that_cannot_be_answered_is_named_and_the_engine_lives(small, ask):
    requests = [ask(0, THREE), Request(input_ids=[10**6]), ask(1, THREE)]
    with pytest.raises(UserError, match=r"^request 1: input_ids of the request holds 1000000"):
        small.generate(requests)
    with pytest.raises(UserError, match=r"^input_ids of the request holds 1000000"):
        small.stream(requests[1])
    assert num_free(small) == 3
    assert len(small.generate(requests[::2])) == 2


def test_an_interruption_with_a_forward_pass_leaves_nothing_half_computed_behind(
    small, tokenizer, model, ask, monkeypatch
):
    decoder_step = ops.decoder_step

    def interrupt(*arguments):
        decoder_step(*arguments)  # which leaves keys and values in the cache
        raise KeyboardInterrupt

    request = ask(0, SamplingParams(max_length=8, min_length=8, logprobs=True))
    requests = [request, replace(request, history=[*request.history, "tea ?"])]
    expected = GenerationEngine(model, tokenizer).generate(requests)
    stream = small.stream(request)
    with monkeypatch.context() as patch:
        patch.setattr("convai_fast.ops.decoder_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        with pytest.raises(KeyboardInterrupt):
            small.generate(requests)
    assert num_free(small) == 3
    assert small.generate(requests) == expected


def test_an_interruption_between_counting_tokens_and_computing_them_is_undone(
    small, tokenizer, model, ask, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    requests = [ask(0, THREE)]
    expected = GenerationEngine(model, tokenizer).generate(requests)
    with monkeypatch.context() as patch:
        patch.setattr("convai_fast.ops.decoder_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small.generate(requests)
    assert small.generate(requests) == expected


def test_an_engine_used_in_the_callers_inference_mode_can_be_used_without_it(small, ask):
    request = ask(0, THREE)
    with torch.inference_mode():
        expected = small.generate([request])
    assert small.generate([request]) == expected  # copies what the first one left in the cache
    longer = ask(0, SamplingParams(max_length=60, min_length=60), turns=9)
    assert len(small.generate([longer])[0][0].token_ids) == 60


def test_a_cache_that_does_not_fit_the_machine_is_refused_in_a_sentence(small, ask, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("not enough memory")

    expected = small.generate([ask(0, THREE)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        with pytest.raises(UserError, match="no memory for the keys and values of 3 sequences"):
            small.generate([ask(0, SamplingParams(max_length=60), turns=9)])
    assert small.generate([ask(0, THREE)]) == expected


@pytest.mark.parametrize("max_batch_size", [0, 10**6])
def test_a_batch_size_that_makes_no_sense_is_refused(model, tokenizer, max_batch_size):
    with pytest.raises(UserError, match="but must be between 1 and 4,096"):
        GenerationEngine(model, tokenizer, max_batch_size=max_batch_size)


@pytest.mark.parametrize("method", ["copy_prefix", "allocate"])
def test_what_was_promised_but_not_computed_is_not_waited_for(small, ask, monkeypatch, method):
    def fail(*_):
        raise MemoryError

    requests = [ask(number, THREE) for number in range(4)]
    expected = GenerationEngine(small.model, small.tokenizer).generate(requests)
    with monkeypatch.context() as patch:
        patch.setattr(small._backend, method, fail)
        for _ in range(4):
            with pytest.raises(MemoryError):
                small.generate([*requests, *requests])
    assert num_free(small) == 3
    assert small.generate(requests) == expected


def test_an_interrupted_copy_is_not_taken_for_what_the_slot_held(small, ask, monkeypatch):
    requests = [ask(number, THREE) for number in range(3)]
    expected = small.generate(requests)

    class Interrupted:
        """The cache's values, of which nothing gets written: the keys have been."""

        shape = small._backend.values.shape

        def __getitem__(self, _):
            raise KeyboardInterrupt

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(small._backend, "values", Interrupted())
        patch.setattr("convai_fast.ops.decoder_step", interrupt)  # where nothing was copied
        for number in range(3, 6):
            with pytest.raises(KeyboardInterrupt):
                small.generate([ask(number, THREE)])
    assert small.generate(requests) == expected
