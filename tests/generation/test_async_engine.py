"""Callers in threads and coroutines share an engine, and each gets what it would get alone."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from convai_fast.errors import UserError
from convai_fast.generation.async_engine import AsyncEngine
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request

PARAMS = SamplingParams(max_length=12, min_length=4, seed=1)


@pytest.fixture
def shared(model, tokenizer):
    with AsyncEngine(GenerationEngine(model, tokenizer, max_batch_size=4)) as shared:
        yield shared
    shared.engine._scheduler.check_integrity()
    assert not shared._callers


@pytest.fixture
def asked(engine, ask):
    requests = [ask(number, replace(PARAMS, n=1 + number % 2)) for number in range(24)]
    return requests, engine.generate(requests)


def test_threads_get_the_replies_that_each_would_get_alone(shared, asked):
    requests, expected = asked
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(shared.generate, requests)) == expected


def test_coroutines_get_the_replies_that_each_would_get_alone(shared, asked):
    requests, expected = asked

    async def all_of_them():
        return await asyncio.gather(*map(shared.generate_async, requests))

    assert asyncio.run(all_of_them()) == expected


def test_streams_in_threads_and_coroutines_join_to_the_reply(shared, ask, engine):
    request = ask(3, PARAMS)
    [[reply]] = engine.generate([request])

    async def pieces():
        return [event async for event in shared.stream_async(request)]

    for events in (list(shared.stream(request)), asyncio.run(pieces())):
        assert [token for event in events for token in event.token_ids] == reply.token_ids
        assert "".join(event.text for event in events) == reply.text


def test_a_request_that_cannot_be_answered_fails_alone(shared, asked):
    requests, expected = asked
    bad = Request(input_ids=[10**6])
    with ThreadPoolExecutor(6) as pool:
        good = [pool.submit(shared.generate, request) for request in requests]
        with pytest.raises(UserError, match="input_ids of the request holds 1000000"):
            shared.generate(bad)
        with pytest.raises(UserError, match="input_ids of the request holds 1000000"):
            list(shared.stream(bad))
        assert [future.result() for future in good] == expected


def test_a_stream_that_cannot_be_raises_with_its_first_tokens(shared, ask):
    async def first(stream):
        return await anext(stream)

    for bad, says in (
        (Request(input_ids=[10**6]), "input_ids of the request holds 1000000"),
        (ask(0, replace(PARAMS, best_of=2)), "best_of chooses among whole replies"),
    ):
        stream, stream_async = shared.stream(bad), shared.stream_async(bad)
        with pytest.raises(UserError, match=says):
            next(stream)
        with pytest.raises(UserError, match=says):
            asyncio.run(first(stream_async))


@pytest.mark.parametrize("nonsense", [None, Request(history=None), Request(input_ids=5)])
def test_what_is_no_request_at_all_fails_alone(shared, ask, nonsense):
    stream = shared.stream(ask(0, PARAMS))
    first = next(stream)
    with pytest.raises(UserError):
        shared.generate(nonsense)
    assert len(first.token_ids) + sum(len(event.token_ids) for event in stream) >= 4


def test_callers_that_go_away_free_their_slots(shared, ask):
    endless = ask(0, replace(PARAMS, max_length=80, min_length=80), turns=1, sentences=0)
    streams = [shared.stream(endless) for _ in range(4)]
    for stream in streams:
        next(stream)
        stream.close()

    async def give_up():
        task = asyncio.create_task(shared.generate_async(endless))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(give_up())
    num_steps, step = [], shared.engine.step
    shared.engine.step = lambda: num_steps.append(1) or step()
    assert len(shared.generate(ask(1, PARAMS))) == 1
    assert len(num_steps) <= PARAMS.max_length + 3  # the four are gone, and nobody waited for them


def test_a_caller_that_goes_away_before_its_turn_costs_none(shared, ask, monkeypatch):
    added, free = [], threading.Event()
    monkeypatch.setattr(shared.engine, "add", lambda *args, **options: added.append(args))
    shared._call(free.wait)  # as a long prompt keeps the engine's thread

    async def leave():
        task = asyncio.ensure_future(shared.generate_async(ask(0, PARAMS)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    free.set()
    shared.close()
    assert not added and not shared._gone


def test_closing_answers_what_is_under_way_and_takes_nothing_more(model, tokenizer, ask):
    shared = AsyncEngine(GenerationEngine(model, tokenizer, max_batch_size=1))
    may_step, step = threading.Event(), shared.engine.step
    stream = shared.stream(ask(0, PARAMS))  # nobody asks for its first tokens
    shared.engine.step = lambda: may_step.wait(60) and step()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(shared.generate, ask(number, PARAMS)) for number in range(3)]
        while len(shared._calls) + shared.engine.num_unfinished < 3:
            time.sleep(0.001)
        closing = pool.submit(shared.close)
        while not shared._is_closed:
            time.sleep(0.001)
        with pytest.raises(UserError, match="the engine is closed"):
            shared.generate(ask(1, PARAMS))
        may_step.set()
        assert all(len(future.result(60)) == 1 for future in asked)
        closing.result(60)
    with pytest.raises(UserError, match="the engine is closed"):
        next(stream)
    assert len(shared.engine.generate([ask(1, PARAMS)])) == 1  # it is the caller's again


def test_a_step_that_fails_fails_those_under_way_and_no_others(shared, ask, monkeypatch):
    expected = shared.generate(ask(1, PARAMS))

    def fail(*_):
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(shared.engine._backend, "forward", fail)
        with pytest.raises(UserError, match="no memory left"):
            shared.generate(ask(0, PARAMS))
    assert shared.generate(ask(1, PARAMS)) == expected
