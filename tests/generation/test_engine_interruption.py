"""Whatever breaks into a step, each request is answered once, as if nothing had happened."""

import signal
import socket
import sys
from contextlib import suppress
from dataclasses import replace

import pytest

from convai_fast.generation import engine as engine_module
from convai_fast.generation.detokenizer import Detokenizer
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.events import Done, Tokens
from convai_fast.generation.interruption import deferred_signals
from convai_fast.generation.params import SamplingParams

PARAMS = SamplingParams(max_length=6, min_length=2, seed=1, temperature=2.0)
KINDS = [
    PARAMS,
    replace(PARAMS, stop=("e",), logprobs=True, n=2),
    replace(PARAMS, best_of=3, no_repeat_ngram_size=3),
    replace(PARAMS, stop=("a",), max_length=3),
]


@pytest.fixture
def small(model, tokenizer):
    return GenerationEngine(model, tokenizer, max_batch_size=3)


@pytest.fixture
def requests(ask):
    return [ask(number, params) for number, params in enumerate([*KINDS, PARAMS])]


@pytest.fixture
def ctrl_c():
    """A tracer that sends Ctrl-C once at each line that the engine runs."""
    folder = engine_module.__file__.removesuffix("engine.py")
    seen = set()

    def at_line(frame, event, _):
        place = frame.f_code, frame.f_lineno
        if event == "line" and place not in seen:
            seen.add(place)
            signal.raise_signal(signal.SIGINT)
        return at_line

    def at_call(frame, *_):
        # `step` hands its events over without a place where Python looks for signals.
        is_watched = frame.f_code.co_filename.startswith(folder) and (
            frame.f_code is not GenerationEngine.step.__code__
        )
        return at_line if is_watched else None

    handler, tracer = signal.getsignal(signal.SIGINT), sys.gettrace()

    def insist(call, is_done):
        """Call until it is done; how often that was interrupted."""
        interruptions, calls = 0, 0
        while not is_done():
            calls += 1
            assert calls < 1000, "it comes to no end"
            sys.settrace(at_call)
            try:
                call()
            except KeyboardInterrupt:
                interruptions += 1
            finally:
                sys.settrace(tracer)
        return interruptions

    yield insist
    signal.signal(signal.SIGINT, handler)


def check(engine, events, expected):
    """Each request is told of once, and its stream says what its reply does."""
    engine._scheduler.check_integrity()
    assert len(engine._scheduler.free_slots) == 3 and not engine._jobs.under_way
    done = [event for event in events if isinstance(event, Done)]
    assert sorted(event.id for event in done) == [0, 1, 2, 3]
    assert [event.replies for event in sorted(done, key=lambda each: each.id)] == expected
    told = [event for event in events if isinstance(event, Tokens)]
    for index, reply in enumerate(expected[1]):
        own = [event for event in told if event.index == index]
        assert "".join(event.text for event in own) == reply.text


def test_ctrl_c_at_any_line_loses_no_request_no_token_and_no_slot(small, requests, ctrl_c):
    expected = small.generate(requests[:4])
    small.clear_prefixes()
    events, interruptions = [], 0
    for id, request in enumerate(requests):

        def add(id=id, request=request):
            small.add(id, request, stream=id == 1)

        interruptions += ctrl_c(add, lambda id=id: id in small._jobs.under_way)
    interruptions += ctrl_c(lambda: small.cancel(4), lambda: 4 not in small._jobs.under_way)
    interruptions += ctrl_c(lambda: events.extend(small.step()), lambda: small.num_unfinished == 0)
    assert interruptions > 20
    check(small, events, expected)


def test_texts_that_fail_once_are_written_all_the_same(small, requests, monkeypatch):
    expected = small.generate(requests[:4])
    original, failed = Detokenizer.text, set()

    def text(self, token_ids):
        if tuple(token_ids) not in failed:
            failed.add(tuple(token_ids))
            raise MemoryError
        return original(self, token_ids)

    monkeypatch.setattr(Detokenizer, "text", text)
    events = []
    for id, request in enumerate(requests[:4]):
        small.add(id, request, stream=id == 1)
    for _ in range(100):
        with suppress(MemoryError):
            events += small.step()
    assert len(failed) > 10
    check(small, events, expected)


def test_an_event_loop_hears_of_a_deferred_signal_once():
    handled = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handler = signal.signal(signal.SIGTERM, lambda *_: handled.append(is_whole))
    wakeup = signal.set_wakeup_fd(writer.fileno())
    try:
        is_whole = False
        with deferred_signals(), deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            is_whole = True
        assert handled == [True]
        assert reader.recv(8) == bytes([signal.SIGTERM])
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        reader.close()
        writer.close()
