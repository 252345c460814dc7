"""Requests are added, steps taken, and events tell what came of it."""

import pkgutil
from dataclasses import replace

import pytest
import torch

from convai_fast.dialogue.encoding import encode
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.events import Done, Failed, Tokens
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.ranking import rank_candidates
from convai_fast.generation.request import Request
from convai_fast.model import DoubleHeadsModel

PARAMS = SamplingParams(max_length=12, min_length=4, seed=1)


def run(engine):
    events = []
    while engine.num_unfinished:
        events += engine.step()
    engine._scheduler.check_integrity()
    return events


def test_requests_that_are_added_are_answered_under_their_ids(engine, ask):
    requests = {f"id {number}": ask(number, replace(PARAMS, n=2)) for number in range(9)}
    expected = engine.generate(requests.values())
    for id, request in requests.items():
        engine.add(id, request)
    assert engine.num_unfinished == 9
    replies = {event.id: event.replies for event in run(engine)}
    assert [replies[id] for id in requests] == expected
    assert engine.step() == []


def test_one_that_is_added_amid_others_changes_nothing_for_them(engine, ask):
    expected = engine.generate([ask(number, PARAMS) for number in range(2)])
    engine.add("a", ask(0, PARAMS))
    assert engine.step() == engine.step() == []
    engine.add("b", ask(1, PARAMS))
    replies = {event.id: event.replies for event in run(engine)}
    assert [replies["a"], replies["b"]] == expected


def test_a_loop_answers_its_requests_also_where_many_others_wait(model, tokenizer, ask):
    engine = GenerationEngine(model, tokenizer, max_batch_size=2)
    requests = [ask(number, PARAMS) for number in range(5)]
    expected = engine.generate(requests)
    for number in range(40):
        engine.add(number, ask(number % 5, PARAMS))
    assert engine.generate(requests) == expected
    assert engine.generate([]) == []
    replies = {event.id: event.replies for event in run(engine)}
    assert [replies[number] for number in range(5)] == expected and len(replies) == 40


def test_streamed_tokens_are_told_as_they_are_drawn_and_join_to_the_replies(engine, ask):
    params = replace(PARAMS, n=3, stop=("e",), temperature=2.0)
    engine.add("a", ask(2, params), stream=True)
    events = run(engine)
    *told, done = events
    assert isinstance(done, Done) and all(isinstance(event, Tokens) for event in told)
    for index, reply in enumerate(done.replies):
        own = [event for event in told if event.index == index]
        assert "".join(event.text for event in own) == reply.text
        ids = [token for event in own for token in event.token_ids]
        assert ids == reply.token_ids[: len(ids)]
    assert len(told) > 6


def test_a_cancelled_request_is_heard_of_no_more(engine, ask):
    for number in range(3):
        engine.add(number, ask(number, PARAMS), stream=True)
    engine.step()
    engine.cancel(1)
    engine.cancel("nobody")
    assert {event.id for event in run(engine)} == {0, 2}


def test_an_id_can_be_used_again_but_not_while_it_is_under_way(engine, ask):
    engine.add("a", ask(0, PARAMS))
    with pytest.raises(ValueError, match="a request with the id 'a' is under way"):
        engine.add("a", ask(1, PARAMS))
    run(engine)
    engine.add("a", ask(1, PARAMS))
    assert len(run(engine)) == 1


def test_a_request_that_fails_is_told_and_touches_no_other(engine, ask):
    with pytest.raises(UserError, match="input_ids of the request holds"):
        engine.add("bad", Request(input_ids=[10**6]))
    banned = replace(PARAMS, no_repeat_ngram_size=1, max_length=50, min_length=50)
    everything = Request(input_ids=[*range(engine.model.config.vocab_size)][:40], params=banned)
    expected = engine.generate([ask(0, PARAMS)])
    engine.add("good", ask(0, PARAMS))
    weight = engine._backend.lm_head
    engine.add("none", replace(everything, params=replace(banned, n=2)))
    calls = iter(range(100))

    def only_seen(hidden):
        logits = weight(hidden)
        if next(calls) == 2:
            row = [draft.id for draft in engine._scheduler.running].index("none")
            logits[row] = torch.nan
        return logits

    engine._backend.lm_head = only_seen
    try:
        events = run(engine)
    finally:
        engine._backend.lm_head = weight
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.id == "none" and "no token can be drawn" in failed.reason
    assert [event.replies for event in events if event.id == "good"] == expected


def test_nothing_is_copied_from_a_request_that_failed(engine):
    *shared, damaged = range(7, 28)
    bad = Request(input_ids=[*shared, damaged], params=PARAMS)
    good = Request(input_ids=[*shared, 40, 41], params=PARAMS)
    expected = engine.generate([good])
    engine.clear_prefixes()
    embedding = engine._backend.decoder.token_embedding
    row = embedding[damaged].clone()
    embedding[damaged] = torch.nan
    try:
        engine.add("bad", bad)
        [failed] = run(engine)
    finally:
        embedding[damaged] = row
    assert isinstance(failed, Failed)
    assert engine.generate([good]) == expected


@pytest.mark.parametrize("place", ["forward", "logits", "draw", "text"])
def test_an_interruption_anywhere_in_a_step_changes_no_reply(engine, ask, monkeypatch, place):
    params = replace(PARAMS, stop=("zzz",), logprobs=True, no_repeat_ngram_size=3)
    requests = [ask(number, params) for number in range(4)]
    expected = engine.generate(requests)
    places = {
        "forward": ("convai_fast.generation.backends.CpuBackend.forward", 3),
        "logits": ("convai_fast.generation.backends.Backend.logits", 3),
        "draw": ("convai_fast.generation.launch.Sampler.draw", 3),
        "text": ("convai_fast.generation.engine.Detokenizer.find_stop", 6),
    }
    name, at = places[place]
    original, calls = pkgutil.resolve_name(name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*args)

    engine.clear_prefixes()
    for number, request in enumerate(requests):
        engine.add(number, request)
    monkeypatch.setattr(name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    replies = {event.id: event.replies for event in run(engine)}
    assert [replies[number] for number in range(4)] == expected


def test_an_interruption_while_steps_are_planned_leaves_no_prefix_that_is_not_there(
    engine, ask, monkeypatch
):
    requests = [ask(0, PARAMS), replace(ask(0, PARAMS), history=[*ask(0, PARAMS).history, "tea ?"])]
    expected = engine.generate(requests)
    engine.clear_prefixes()
    engine.add("a", requests[0])
    engine.step()
    engine.add("b", requests[1])

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("convai_fast.generation.scheduler.Step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    replies = {event.id: event.replies for event in run(engine)}
    assert [replies["a"], replies["b"]] == expected


def test_a_loop_that_is_cleared_away_amid_a_step_is_forgotten_after_it(engine, ask, monkeypatch):
    expected = engine.generate([ask(1, PARAMS)])
    stream = engine.stream(ask(0, PARAMS))
    next(stream)
    engine.add("other", ask(1, PARAMS))
    forward = engine._backend.forward

    def collected(step):
        stream.close()
        return forward(step)

    with monkeypatch.context() as patch:
        patch.setattr(engine._backend, "forward", collected)
        engine.step()
    assert [event.replies for event in run(engine)] == expected


# --- best of n ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["eos", "length", "stop"])
def test_the_best_of_n_drafts_are_those_the_ranking_head_puts_first(engine, ask, ending):
    params = SamplingParams(temperature=2.0, top_p=0, max_length=12, seed=3, n=9)
    params = replace(params, min_length=12 if ending == "length" else 1)
    params = replace(params, stop=("e",) if ending == "stop" else ())
    request = ask(5, params)
    [drafts] = engine.generate([request])
    [best] = engine.generate([replace(request, params=replace(params, n=2, best_of=9))])
    assert {draft.finish_reason for draft in drafts} >= {ending}
    candidates = [encode(engine.tokenizer, [draft.text])[0] for draft in drafts]
    if ending != "stop":
        candidates = [draft.token_ids for draft in drafts]
    persona, history = (
        encode(engine.tokenizer, each) for each in (request.persona, request.history)
    )
    ranks = rank_candidates(engine.model, engine.layout, persona, history, candidates)
    order = ranks.argsort(descending=True, stable=True).tolist()
    assert len(best) == 2
    assert best[0].score >= best[1].score
    if ending != "stop":  # whose text need not be cut where a token ends
        assert [replace(reply, score=None) for reply in best] == [drafts[i] for i in order[:2]]
        difference = best[0].score - best[1].score
        assert difference == pytest.approx((ranks[order[0]] - ranks[order[1]]).item(), abs=1e-3)


def test_drafts_are_ranked_alike_whatever_else_is_under_way(engine, ask):
    requests = [ask(number, replace(PARAMS, best_of=4)) for number in range(12)]
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests) == alone


def test_ranking_needs_room_for_the_eos_after_the_longest_reply(engine):
    params = SamplingParams(max_length=92, best_of=2)
    with pytest.raises(UserError, match=r"leaves no room for a prompt .* give at most 91"):
        engine.add("a", Request(params=params))
    params = replace(params, max_length=91, min_length=91)
    [[reply]] = engine.generate([Request(params=params)])
    assert len(reply.token_ids) == 91


def test_a_head_that_has_learnt_nothing_ranks_nothing(model, tokenizer, ask):
    engine = GenerationEngine(DoubleHeadsModel(model.config), tokenizer)
    with pytest.raises(UserError, match="multiple-choice head, which this model has not learnt"):
        engine.add("a", ask(0, replace(PARAMS, best_of=2)))


def test_scores_that_are_no_numbers_fail_their_request(engine, ask, monkeypatch):
    with torch.no_grad():
        bias = engine.model.multiple_choice_head.bias.clone()
        engine.model.multiple_choice_head.bias.fill_(torch.nan)
    try:
        engine.add("a", ask(0, replace(PARAMS, best_of=3)))
        [event] = run(engine)
    finally:
        with torch.no_grad():
            engine.model.multiple_choice_head.bias.copy_(bias)
    assert isinstance(event, Failed) and "its score is no number" in event.reason


def test_what_is_chosen_among_whole_replies_cannot_be_streamed(engine, ask):
    with pytest.raises(UserError, match="cannot be streamed"):
        engine.add("a", ask(0, replace(PARAMS, best_of=2)), stream=True)
    with pytest.raises(UserError, match="cannot be streamed"):
        engine.stream(ask(0, replace(PARAMS, best_of=2)))


@pytest.mark.parametrize("settings", [{"best_of": 0}, {"n": 3, "best_of": 2}, {"best_of": 10**5}])
def test_a_best_of_that_makes_no_sense_is_refused(settings):
    with pytest.raises(UserError, match="best_of is"):
        SamplingParams(**settings)
