"""Texts that end a reply."""

import time
from dataclasses import replace

import pytest

from convai_fast.dialogue.encoding import encode
from convai_fast.generation.backends import Backend
from convai_fast.generation.detokenizer import Detokenizer
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request

REQUEST = Request(history=["hello !"], params=SamplingParams(max_length=40, logprobs=True))


@pytest.fixture
def say(engine, monkeypatch):
    """Let the engine write these token ids or this text, whatever its model thinks of it.

    Its last token is an <eos>, unless `max_length` comes before. Returns the reply and the stream.
    """

    def say(what, *stop, **params):
        text_ids = encode(engine.tokenizer, [what])[0] if isinstance(what, str) else what
        script = [*text_ids, engine.layout.eos]

        def scripted(self, hidden):
            logits = original(self, hidden)
            for row, draft in zip(logits, engine._scheduler.running, strict=True):
                row[script[len(draft.token_ids)]] = 1e4
            return logits

        original = Backend.logits
        request = replace(REQUEST, params=replace(REQUEST.params, stop=stop, **params))
        with monkeypatch.context() as patch:
            patch.setattr(Backend, "logits", scripted)
            [[reply]] = engine.generate([request])
            return reply, list(engine.stream(request))

    return say


def test_what_is_certain_takes_no_longer_for_a_stop_text_of_any_length(tokenizer):
    began = time.process_time()
    ids = encode(tokenizer, ["wait"])[0]
    assert Detokenizer(tokenizer).num_certain(ids, ["z" * 300_000]) == len(ids)
    assert time.process_time() - began < 0.5


def test_without_a_stop_text_a_reply_goes_on_to_its_end(say, tokenizer):
    reply, streamed = say("wait , stop it !")
    assert (reply.text, reply.finish_reason) == ("wait , stop it !", "eos")
    assert reply.token_ids == streamed == encode(tokenizer, ["wait , stop it !"])[0]
    reply, streamed = say("wait , stop it !", max_length=3)
    assert (len(reply.token_ids), len(streamed), reply.finish_reason) == (3, 3, "length")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["stop"], "wait , "),
        ([" st"], "wait ,"),
        (["wait"], ""),
        (["w"], ""),
        (["t , s"], "wai"),
        (["!"], "wait , stop it "),
        (["it !"], "wait , stop "),
        ([" it", "stop"], "wait , "),  # whichever comes first in the text
        (["stop", " it"], "wait , "),
        (["stop it", "op"], "wait , st"),  # and as soon as it is there
        (["p it", "stop it"], "wait , "),  # both at once: the one that begins first
    ],
)
def test_a_reply_ends_before_the_stop_text(say, tokenizer, stop, text):
    reply, streamed = say("wait , stop it !", *stop)
    assert (reply.text, reply.finish_reason) == (text, "stop")
    written = tokenizer.decode(reply.token_ids)
    assert written.startswith(text)
    assert any(each in written for each in stop)
    assert not any(each in tokenizer.decode(reply.token_ids[:-1]) for each in stop)
    assert len(reply.logprobs) == len(reply.token_ids)
    # Of the stream, whole tokens that lie before the stop text.
    shown = tokenizer.decode(streamed)
    assert text.startswith(shown)
    assert streamed == reply.token_ids[: len(streamed)]
    assert len(tokenizer.decode(reply.token_ids[: len(streamed) + 1])) > len(text)


def test_a_text_that_does_not_come_changes_nothing(say):
    assert say("wait , stop it !", "stopped", "?", "it !!") == say("wait , stop it !")
    free, stopped = (
        say("wait , stop it !", max_length=5),
        say("wait , stop it !", "nn", max_length=5),
    )
    assert free == stopped


def test_a_stop_text_in_the_prompt_is_none(say):
    assert say("tea", "hello")[0].finish_reason == "eos"


def test_the_stream_holds_back_what_may_be_a_stop_text(engine, say, monkeypatch):
    held = []
    certain = Detokenizer.num_certain

    def spy(self, token_ids, stop):
        count = certain(self, token_ids, stop)
        held.append(self.text(token_ids[count:]))
        return count

    monkeypatch.setattr(Detokenizer, "num_certain", spy)
    letters = [encode(engine.tokenizer, [letter])[0][0] for letter in "ab.ab.abcd"]
    assert len(letters) == 10
    reply, streamed = say(letters, ".abcd")
    assert reply.text == "ab.ab"
    assert streamed == letters[:5]
    assert held == ["", "", ".", ".a", ".ab", ".", ".a", ".ab", ".abc"]


def test_a_character_of_several_bytes_can_stop(engine, say):
    eacute = encode(engine.tokenizer, ["é"])[0]
    assert len(eacute) == 2
    tea = encode(engine.tokenizer, ["tea"])[0]
    reply, streamed = say([*tea, *eacute, *tea], "é")
    assert (reply.text, reply.finish_reason, streamed) == ("tea", "stop", tea)
    reply, streamed = say([*tea, *eacute, *tea], "è")
    assert (reply.text, streamed) == ("teaétea", [*tea, *eacute, *tea])
    # Bytes that never become a character are shown in the end.
    assert say([*tea, eacute[0]], "è")[1] == [*tea, eacute[0]]


@pytest.mark.parametrize(
    ("min_length", "text"),
    [(0, ""), (1, ""), (2, ".a"), (3, ".a"), (4, ".a.b"), (7, ".a.b.c"), (8, ".a.b.c.d")],
)
def test_a_stop_text_that_ends_before_min_length_is_none(engine, say, min_length, text):
    letters = [encode(engine.tokenizer, [letter])[0][0] for letter in ".a.b.c.d"]
    reply, streamed = say(letters, ".", min_length=min_length)
    assert reply.text == engine.tokenizer.decode(streamed) == text
    assert len(reply.token_ids) >= min_length


def test_replies_to_one_request_stop_each_by_itself(engine):
    params = SamplingParams(max_length=30, temperature=3, top_p=0, n=20, stop=("e", "a"))
    [replies] = engine.generate([replace(REQUEST, params=params)])
    assert {reply.finish_reason for reply in replies} >= {"stop"}
    assert len({len(reply.token_ids) for reply in replies}) > 3
    assert not any("e" in reply.text or "a" in reply.text for reply in replies)
