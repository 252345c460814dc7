"""Decoding that runs ahead of the host: on a CPU, where its steps are not recorded as graphs."""

import copy
import random
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from convai_fast.generation import launch
from convai_fast.generation.backends import CudaBackend, decode_loop
from convai_fast.generation.backends.decode_loop import DecodeLoop
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.events import Done, Failed, Tokens
from convai_fast.generation.params import SamplingParams
from convai_fast.model import DoubleHeadsModel

WAYS = [
    SamplingParams(no_sample=True, max_length=9),
    SamplingParams(seed=3, max_length=7, n=3, temperature=2.0),
    SamplingParams(seed=4, max_length=13, min_length=6, repetition_penalty=1.5, temperature=2.0),
    SamplingParams(seed=5, max_length=6, best_of=4, n=2, temperature=1.5),
    SamplingParams(seed=6, max_length=30, stop=("e", "t a"), temperature=2.0),
    SamplingParams(seed=7, max_length=1),
    SamplingParams(seed=8, max_length=10, best_of=3, stop=("o",), top_k=40, min_p=0.01),
    SamplingParams(seed=9, max_length=12, logprobs=True, top_k=5),
]
WITH_NGRAMS = SamplingParams(seed=4, max_length=8, no_repeat_ngram_size=2, repetition_penalty=1.2)


@pytest.fixture
def make(model, tokenizer, monkeypatch):
    """A function that makes an engine whose backend runs ahead."""
    monkeypatch.setattr("convai_fast.generation.engine.make_backend", CudaBackend)
    return lambda slots: GenerationEngine(model, tokenizer, max_batch_size=slots, weights="float32")


def texts(replies):
    return [(reply.token_ids, reply.text, reply.finish_reason) for reply in replies]


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_under_way_replies_are_those_of_the_cpu(
    model, tokenizer, ask, monkeypatch, slots, seed
):
    rng = random.Random(seed)
    ways = [*WAYS, WITH_NGRAMS] if seed else WAYS
    requests = [ask(i % 7, rng.choice(ways), turns=rng.choice([1, 3, 60])) for i in range(16)]
    expected = GenerationEngine(model, tokenizer).generate(requests)
    monkeypatch.setattr("convai_fast.generation.engine.make_backend", CudaBackend)
    engine = GenerationEngine(model, tokenizer, max_batch_size=slots, weights="float32")
    found, left, told, cancelled = {}, [*enumerate(requests)], {}, set()
    while left or engine.num_unfinished:
        for _ in range(rng.randint(0, 4)):
            if left:
                id, request = left.pop()
                engine.add(id, request, stream=request.params.best_of == 1 and id % 2 == 0)
        if rng.random() < 0.1 and len(left) < 12:
            cancelled.add(id := rng.randrange(16))
            engine.cancel(id)
        for event in engine.step():
            if isinstance(event, Done):
                found[event.id] = event.replies
            else:
                told.setdefault((event.id, event.index), []).append(event.text)
        engine._scheduler.check_integrity()
    assert {*found} | cancelled == {*range(16)}
    for id, replies in found.items():
        assert texts(replies) == texts(expected[id])
        for index, reply in enumerate(replies):
            if (id, index) in told:
                assert "".join(told[id, index]) == reply.text
            if reply.logprobs:
                assert reply.logprobs == pytest.approx(expected[id][index].logprobs, abs=1e-3)


def test_a_step_waits_for_the_launch_before_its_own_alone(make, ask, monkeypatch):
    events, original = [], launch.fetch_later

    def recorded(*tensors):
        number = len(events)
        events.append(f"launched {number}")
        wait = original(*tensors)
        return lambda: (events.append(f"fetched {number}"), wait())[1]

    monkeypatch.setattr(launch, "fetch_later", recorded)
    make(2).generate([ask(0, SamplingParams(no_sample=True, min_length=11, max_length=11))])
    assert events[:5] == ["launched 0", "launched 1", "fetched 0", "launched 3", "fetched 1"]


def test_nothing_is_asked_of_the_device_before_it_is_fetched(model, tokenizer, ask, monkeypatch):
    """On the meta device a value that the host asks for is an error."""
    monkeypatch.setattr("convai_fast.generation.engine.make_backend", CudaBackend)
    monkeypatch.setattr("convai_fast.generation.backends.cuda.varlen_attention", lambda q, *_: q)
    launched = []
    monkeypatch.setattr(launch, "fetch_later", lambda *tensors: launched.append(tensors))
    with torch.device("meta"):
        twin = DoubleHeadsModel(model.config)
    twin.head_is_new = False
    engine = GenerationEngine(twin, tokenizer, weights="bfloat16")
    for id, params in enumerate(WAYS):
        engine.add(id, ask(id, params, turns=2))
    engine.step()
    assert [tensor.device.type for tensor in launched[0]] == ["meta"] * len(launched[0])
    assert launched[0][0].shape == (len(WAYS),)  # the first tokens, one of each prompt


def test_a_row_that_cannot_be_drawn_fails_alone(make, ask):
    engine = make(4)
    requests = [ask(i, replace(WAYS[0], min_length=9)) for i in range(3)]
    expected = engine.generate(requests)
    engine.clear_prefixes()
    for id, request in enumerate(requests):
        engine.add(id, request)
    engine.step()
    (bad,) = [draft for draft in engine._scheduler.running if draft.id == 1]
    engine._backend.values[:, bad.slot] = torch.nan
    events = []
    while engine.num_unfinished:
        events += engine.step()
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.id for event in failed] == [1] and "no token can be drawn" in failed[0].reason
    assert {e.id: e.replies for e in events if isinstance(e, Done)} == {
        0: expected[0],
        2: expected[2],
    }
    assert engine.generate(requests) == expected  # nothing is copied from it


@pytest.mark.parametrize("place", ["draw", "steps", "enter"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interruption_loses_no_request_and_no_token(make, ask, monkeypatch, place, at):
    engine = make(3)
    requests = [ask(i, way) for i, way in enumerate(WAYS[1:5])]
    expected = engine.generate(requests)
    engine.clear_prefixes()
    original, calls = getattr(DecodeLoop, place), []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(DecodeLoop, place, interrupted)
    for id, request in enumerate(requests):
        engine.add(id, request, stream=id == 0)
    events = []
    while engine.num_unfinished:
        with suppress(KeyboardInterrupt):
            events += engine.step()
    assert len(calls) > at
    found = {event.id: event.replies for event in events if isinstance(event, Done)}
    assert [texts(found[id]) for id in range(4)] == [texts(replies) for replies in expected]
    told = [event for event in events if isinstance(event, Tokens)]
    for index, reply in enumerate(expected[0]):
        assert "".join(event.text for event in told if event.index == index) == reply.text


def test_the_cache_stays_where_it_is_from_the_first_request_on(make, ask):
    engine = make(2)
    before = engine._backend.keys.data_ptr(), engine._backend.values.data_ptr()
    engine.generate([ask(i, WAYS[i % 3], turns=60) for i in range(5)])
    assert before == (engine._backend.keys.data_ptr(), engine._backend.values.data_ptr())


def test_a_cache_that_grows_under_way_changes_no_reply(make, ask, monkeypatch):
    requests = [ask(i, WAYS[i % 3], turns=turns) for i, turns in enumerate([1, 2, 60])]
    expected = make(3).generate(requests)
    monkeypatch.setattr(CudaBackend, "first_capacity", 16)
    engine, events = make(3), []
    for id, request in enumerate(requests):
        engine.add(id, request)
        events += engine.step()
    assert engine._backend.capacity > 64
    while engine.num_unfinished:
        events += engine.step()
    found = {event.id: event.replies for event in events if isinstance(event, Done)}
    assert [texts(found[id]) for id in range(3)] == [texts(replies) for replies in expected]


def test_graphs_are_recorded_on_the_loops_own_stream(monkeypatch):
    """On which they share memory, also where it is not the first device's."""
    recorded, stream = [], MagicMock()
    for name in ("CUDAGraph", "device", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(
        torch.cuda, "graph", lambda *_, **options: recorded.append(options) or nullcontext()
    )
    loop = SimpleNamespace(
        device=torch.device("cpu"), nobodys_slot=3, pool=(0, 1), stream=stream, step=MagicMock()
    )
    decode_loop._Recorded(loop, 2, False, False)
    assert recorded == [{"pool": (0, 1), "stream": stream, "capture_error_mode": "thread_local"}]


@pytest.mark.cuda
@pytest.mark.parametrize("seed", range(2))
def test_on_a_gpu_replies_are_those_of_the_cpu(model, tokenizer, ask, seed):
    rng = random.Random(seed)
    requests = [ask(i, rng.choice(WAYS), turns=rng.choice([1, 3, 60])) for i in range(40)]
    expected = GenerationEngine(model, tokenizer).generate(requests)
    twin = copy.deepcopy(model).cuda()
    engine = GenerationEngine(twin, tokenizer, max_batch_size=16, weights="float32")
    assert isinstance(engine._backend, CudaBackend)
    same = [
        texts(own) == texts(theirs)
        for own, theirs in zip(engine.generate(requests), expected, strict=True)
    ]
    assert sum(same) >= 39  # a draw at a filter's edge may fall to either side


@pytest.mark.cuda
def test_on_a_gpu_nothing_waits_within_a_launch(model, tokenizer, ask, monkeypatch):
    engine = GenerationEngine(copy.deepcopy(model).cuda(), tokenizer, max_batch_size=16)
    requests = [ask(i, way) for i, way in enumerate(WAYS)]
    expected = engine.generate(requests)  # graphs are recorded, which waits
    engine.clear_prefixes()
    launcher, original = engine._launcher, engine._launcher.launch

    def watched(*args, **options):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr(launcher, "launch", watched)
    assert [texts(own) for own in engine.generate(requests)] == [texts(own) for own in expected]


@pytest.mark.cuda
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_on_a_gpu_neighbours_of_the_same_bucket_change_no_bit(model, tokenizer, ask, weights):
    engine = GenerationEngine(copy.deepcopy(model).cuda(), tokenizer, weights=weights)
    params = SamplingParams(no_sample=True, min_length=9, max_length=9, logprobs=True)
    mine, others = ask(0, params), [ask(i, params, turns=i % 5) for i in range(1, 15)]
    found = []
    for neighbours in (others[:7], others[7:14]):
        engine.generate([mine])  # its prompt is computed alone, and copied
        found.append(engine.generate([mine, *neighbours])[0])
    assert found[0] == found[1]
