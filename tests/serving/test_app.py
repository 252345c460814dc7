"""The HTTP interface, asked by OpenAI's own client and by hand."""

import asyncio
import json
import socket
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import openai
import pytest
import torch

from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from convai_fast.serving import app
from convai_fast.serving.app import Settings
from convai_fast.serving.openai_api import read_body
from tests.helpers.http_server import serving, wait_until

PARAMS = SamplingParams(max_length=12, min_length=4, temperature=1.5)
SETTINGS = Settings(model="mine", params=PARAMS)
MESSAGES = [
    {"role": "system", "content": "i like tea .\ni have a cat ."},
    {"role": "user", "content": "hello , how are you ?"},
]
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: LocalHost\r\n"
    "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
)
LONG = {"messages": MESSAGES, "max_tokens": 60, "min_length": 60}
PERSONA, QUESTION = ["i like tea .", "i have a cat ."], "hello , how are you ?"


@pytest.fixture(scope="module")
def served(model, tokenizer):
    """An engine and the address where it answers."""
    engine = GenerationEngine(model, tokenizer, max_batch_size=8)
    with serving(engine, SETTINGS) as url:
        yield engine, url
    engine._scheduler.check_integrity()
    assert engine.num_unfinished == 0 and len(engine._scheduler.free_slots) == 8


@pytest.fixture(scope="module")
def url(served):
    return served[1]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(model, tokenizer):
    """A function that gives the replies of an engine of its own."""
    engine = GenerationEngine(model, tokenizer)

    def replies(persona=PERSONA, history=(QUESTION,), **options):
        params = replace(PARAMS, **options)
        (found,) = engine.generate([Request(persona=persona, history=history, params=params)])
        return found

    return replies


def post(url, path="/v1/chat/completions", **body):
    return httpx.post(f"{url}{path}", json=body, timeout=30)


def test_a_chat_is_answered_as_the_engine_does(client, alone):
    expected = alone(seed=7, n=2, logprobs=True)
    answer = client.chat.completions.create(
        model="mine", messages=MESSAGES, seed=7, n=2, logprobs=True
    )
    assert answer.object == "chat.completion" and answer.model == "mine"
    assert [choice.message.content for choice in answer.choices] == [r.text for r in expected]
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, reply in zip(answer.choices, expected, strict=True):
        assert choice.message.role == "assistant"
        assert choice.finish_reason == ("length" if reply.finish_reason == "length" else "stop")
        assert [each.logprob for each in choice.logprobs.content] == reply.logprobs
    count = sum(len(reply.token_ids) for reply in expected)
    assert answer.usage.completion_tokens == count
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + count > count


def test_a_stream_joins_to_the_reply_and_ends_with_usage(client, alone):
    expected = alone(seed=8, n=2, logprobs=True)
    chunks = list(
        client.chat.completions.create(
            model="mine",
            messages=MESSAGES,
            seed=8,
            n=2,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *told, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == sum(
        len(reply.token_ids) for reply in expected
    )
    assert {chunk.id for chunk in chunks} == {last.id}
    for index, reply in enumerate(expected):
        own = [c.choices[0] for c in told if c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in own) == reply.text
        assert own[-1].finish_reason and not any(each.finish_reason for each in own[:-1])
        values = [token.logprob for each in own if each.logprobs for token in each.logprobs.content]
        assert values == reply.logprobs
    assert len(told) > 6  # and not in one piece


def test_only_the_turns_that_were_seen_in_training_are_seen(client, alone):
    turns = [f"turn {i}" for i in range(9)]
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    answer = client.chat.completions.create(model="mine", messages=messages, seed=1)
    (expected,) = alone(persona=[], history=turns[-5:], seed=1)
    assert answer.choices[0].message.content == expected.text


def test_texts_are_completed_one_or_several_with_all_options(client, alone, tokenizer):
    answer = client.completions.create(
        model="mine", prompt=["hello", "what do you like"], seed=3, n=2, logprobs=0, stop=["zz"]
    )
    expected = [
        reply
        for prompt in ("hello", "what do you like")
        for reply in alone(persona=[], history=[prompt], seed=3, n=2, logprobs=True, stop=("zz",))
    ]
    assert [choice.text for choice in answer.choices] == [reply.text for reply in expected]
    assert [c.logprobs.token_logprobs for c in answer.choices] == [r.logprobs for r in expected]
    best = client.completions.create(
        model="mine", prompt="hello", seed=3, best_of=4, n=2, extra_body={"persona": PERSONA}
    )
    expected = alone(history=["hello"], seed=3, best_of=4, n=2)
    assert [choice.text for choice in best.choices] == [reply.text for reply in expected]
    assert [choice.score for choice in best.choices] == [reply.score for reply in expected]
    pieces = client.completions.create(model="mine", prompt="hello", seed=3, stream=True)
    (expected,) = alone(persona=[], history=["hello"], seed=3)
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert client.completions.create(model="mine", prompt=ids, seed=3).choices[0].text


def test_sixty_four_at_once_get_what_each_would_get_alone(url, alone):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def ask(seed):
                asked = client.chat.completions.create(
                    model="mine", messages=MESSAGES, seed=seed, stream=bool(seed % 2)
                )
                answer = await asked
                if seed % 2 == 0:
                    return answer.choices[0].message.content
                return "".join([c.choices[0].delta.content or "" async for c in answer])

            return await asyncio.gather(*map(ask, range(64)))

    expected = [alone(seed=seed)[0].text for seed in range(64)]
    assert asyncio.run(ask_all()) == expected


def test_without_a_seed_each_answer_is_another(client):
    texts = {
        client.chat.completions.create(model="mine", messages=MESSAGES).choices[0].message.content
        for _ in range(4)
    }
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("body", "status", "says", "param"),
    [
        ({}, 400, "messages are missing", "messages"),
        ({"messages": MESSAGES, "temprature": 1}, 400, "do you mean temperature?", None),
        ({"messages": MESSAGES[:1]}, 400, "the last turn of messages must be the user's", None),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "is blank", None),
        ({"messages": MESSAGES, "temperature": -1}, 400, "temperature is -1", "temperature"),
        *(
            ({"messages": MESSAGES, name: count}, 400, f"{name} is {count}, ", name)
            for name in ("max_tokens", "max_completion_tokens", "max_length")
            for count in (0, 10**6)
        ),
        (
            {"messages": MESSAGES, "stream": 1},
            400,
            "stream is 1, but must be true or false",
            "stream",
        ),
        (
            {"messages": MESSAGES, "stream_options": {"include_usage": []}},
            400,
            "include_usage is [], but must be true or false",
            None,
        ),
        ({"messages": MESSAGES, "stream": True, "best_of": 2}, 400, "cannot be streamed", None),
        ({"messages": MESSAGES, "model": "gpt-4"}, 404, "there is no model 'gpt-4' here", None),
        (
            {"messages": MESSAGES, "id": "a"},
            400,
            "there is no field 'id': there are messages, persona, logprobs, max_tokens, "
            "max_completion_tokens, max_length, min_length, no_sample, temperature, top_p",
            None,
        ),
        ({"messages": None}, 400, "messages are missing", "messages"),
        ({"messages": MESSAGES, "n": 513}, 400, "this asks for 513 replies, but at most 512", None),
        ({"messages": MESSAGES, "stop": ["x"] * 257}, 400, "stop is a list of 257", "stop"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_is_one_sentence_in_the_shape_that_clients_read(url, body, status, says, param):
    answer = post(url, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_what_clients_raise_says_why(client):
    with pytest.raises(openai.BadRequestError, match="top_p is 2, but must be between 0 and 1"):
        client.chat.completions.create(model="mine", messages=MESSAGES, top_p=2)
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.models.retrieve("other")
    assert [each.id for each in client.models.list()] == ["mine"]
    assert client.models.retrieve("mine").owned_by == "convai_fast"


def test_other_addresses_methods_types_and_hosts_are_refused(url):
    assert httpx.get(f"{url}/nowhere").json()["error"]["message"].startswith("there is nothing")
    assert httpx.get(f"{url}/v1/completions").status_code == 405
    text = httpx.post(f"{url}/v1/completions", content="{}", headers={"content-type": "text/plain"})
    assert text.status_code == 415
    bad = httpx.post(
        f"{url}/v1/completions", content="{", headers={"content-type": "application/json"}
    )
    assert bad.status_code == 400 and "not JSON" in bad.json()["error"]["message"]
    foreign = httpx.get(f"{url}/health", headers={"host": "evil.example:80"})
    assert foreign.status_code == 421


def test_counters_tell_what_was_answered(url):
    def value(name):
        page = httpx.get(f"{url}/metrics").text
        lines = [line for line in page.splitlines() if line.startswith(name)]
        return sum(float(line.split()[-1]) for line in lines)

    names = ["requests_total", "prompt_tokens_total", "reply_tokens_total"]
    names += ["copied_prompt_tokens_total", "time_to_first_token_seconds_count"]
    before = [value(f"convai_fast_{name}") for name in names]
    for stream in (False, True):
        assert post(url, messages=MESSAGES, stream=stream).status_code == 200
    after = [value(f"convai_fast_{name}") for name in names]
    assert all(more > less for less, more in zip(before, after, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(served, stream):
    engine, url = served
    with asking(url, LONG | {"n": 8, "stream": stream}):
        wait_until(lambda: engine.load.running == 8)
    wait_until(lambda: engine.load.running == 0)
    assert post(url, messages=MESSAGES).status_code == 200


def test_a_stream_whose_client_leaves_before_its_first_token_is_not_begun(model, tokenizer):
    engine = GenerationEngine(model, tokenizer, max_batch_size=1)
    with serving(engine, SETTINGS) as url, asking(url, LONG | {"n": 100}):
        wait_until(lambda: engine.load.running == 1)
        of_one = engine.load.prompt_tokens
        with asking(url, LONG | {"n": 200, "stream": True}):
            wait_until(lambda: engine.load.waiting >= 200)
        wait_until(lambda: engine.load.waiting < 100)
        assert engine.load.prompt_tokens < 100 * of_one  # the first is not answered yet


def test_a_client_that_does_not_read_is_left_at_the_deadline(monkeypatch):
    monkeypatch.setattr(app, "_SECONDS_FOR_THE_LAST", 0.02)
    closed = []

    async def chunks():
        yield b"data: {}\n\n"

    async def close():
        closed.append(True)

    async def never(*_):
        await asyncio.Event().wait()

    answer = app._EventStream(chunks(), close, deadline=time.perf_counter())
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(asyncio.wait_for(answer(scope, never, never), 30))
    assert closed == [True]


def test_a_prompt_of_token_ids_may_be_longer_than_a_list_of_prompts():
    (request,) = read_body({"prompt": [5] * 300}, "text", PARAMS, 2).requests
    assert request.input_ids == [5] * 300
    with pytest.raises(UserError, match="read for each of its 200 texts"):
        read_body({"prompt": ["a"] * 200, "persona": "i\n" * 9000}, "text", PARAMS, 2)
    for prompt in (["a"] * 257, [], ["a", None]):
        with pytest.raises(UserError, match="prompt is a list"):
            read_body({"prompt": prompt}, "text", PARAMS, 2)


@contextmanager
def asking(url, body):
    """A client that has sent a request, and leaves without reading the answer."""
    sent = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(HEAD.format(length=len(sent)).encode() + sent)
        yield


def slowed(engine, monkeypatch):
    """Lets each step take a while."""
    forward = engine._backend.forward
    monkeypatch.setattr(
        engine._backend, "forward", lambda step: (time.sleep(0.02), forward(step))[1]
    )


def test_limits_are_told_with_their_status(model, tokenizer, monkeypatch):
    engine = GenerationEngine(model, tokenizer, max_batch_size=2)
    slowed(engine, monkeypatch)
    long = {"messages": MESSAGES, "max_tokens": 40, "min_length": 40}
    settings = replace(SETTINGS, max_requests=2, max_body_bytes=1000, timeout_s=0.3)
    with serving(engine, settings) as url:
        assert post(url, messages=MESSAGES, user="x" * 1000).status_code == 413

        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(HEAD.format(length=9).encode() + b"{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")

        async def ask_three():
            async with httpx.AsyncClient(timeout=30) as client:
                asked = (client.post(f"{url}/v1/chat/completions", json=long) for _ in range(3))
                return await asyncio.gather(*asked)

        answers = asyncio.run(ask_three())
        assert sorted(answer.status_code for answer in answers) == [429, 504, 504]
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=long | {"stream": True}) as it:
            *_, last = [line for line in it.iter_lines() if line]
        assert it.status_code == 200 and "not answered within 0.3 seconds" in last
        wait_until(lambda: engine.load.running == 0)
        assert post(url, messages=MESSAGES, max_tokens=4).status_code == 200


def test_a_key_is_asked_for_everywhere_but_for_health(model, tokenizer):
    settings = replace(SETTINGS, api_key="s3cret", allow_origins=("https://a.example",))
    with serving(GenerationEngine(model, tokenizer), settings) as url:
        for key in ("", "Bearer wrong", "Bearer s3cre", "s3cret", "Bearer s3cret"):
            answer = httpx.get(f"{url}/v1/models", headers={"authorization": key} if key else {})
            assert answer.status_code == (200 if key == "Bearer s3cret" else 401)
        with pytest.raises(openai.AuthenticationError, match="asks for a key"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret").models.list().data
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            headers = {"origin": origin, "access-control-request-method": "POST"}
            headers["access-control-request-headers"] = "authorization,x-stainless-os"
            answer = httpx.options(f"{url}/v1/chat/completions", headers=headers)
            assert ("access-control-allow-origin" in answer.headers) == allowed
            assert (answer.status_code == 200) == allowed


def test_a_request_that_fails_touches_no_other(model, tokenizer, monkeypatch, alone):
    engine = GenerationEngine(model, tokenizer)
    logits = engine._backend.logits

    def damaged(hidden):
        found = logits(hidden)
        for row, draft in enumerate(engine._scheduler.running):
            if draft.job.params.seed == 13:
                found[row] = torch.nan
        return found

    monkeypatch.setattr(engine._backend, "logits", damaged)
    with serving(engine, SETTINGS) as url:

        async def ask_all():
            async with httpx.AsyncClient(timeout=30) as client:
                path = f"{url}/v1/chat/completions"
                bodies = ({"messages": MESSAGES, "seed": seed} for seed in (12, 13, 14))
                return await asyncio.gather(*(client.post(path, json=each) for each in bodies))

        good, bad, other = asyncio.run(ask_all())
        assert bad.status_code == 500 and "no token can be drawn" in bad.json()["error"]["message"]
        assert bad.json()["error"]["type"] == "server_error"
        for seed, answer in ((12, good), (14, other)):
            text = answer.json()["choices"][0]["message"]["content"]
            assert text == alone(seed=seed)[0].text
