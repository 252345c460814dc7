"""What can be asked, in which forms, and which mistakes are named."""

import pytest

from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from tests.helpers.reply_peers import prompt_of

PARAMS = SamplingParams(max_length=8, min_length=8, temperature=2)
PERSONA, HISTORY = ["i like tea .", "i have a cat ."], ["hello !", "hi , how are you ?", "fine ."]


def test_text_token_ids_and_a_whole_prompt_ask_for_the_same(engine, tokenizer):
    persona, history = encode(tokenizer, PERSONA), encode(tokenizer, HISTORY)
    text = Request(persona=PERSONA, history=HISTORY, params=PARAMS)
    ids = Request(persona=persona, history=history, params=PARAMS)
    mixed = Request(
        persona=tuple(PERSONA), history=[tuple(turn) for turn in history], params=PARAMS
    )
    whole = Request(**prompt_of(text, tokenizer, 96)._asdict(), params=PARAMS)
    replies = engine.generate([text, ids, mixed, whole])
    assert replies[1:] == replies[:1] * 3
    assert [*engine.stream(whole)] == replies[0][0].token_ids


def test_a_special_token_in_a_text_is_spelled_out(tokenizer):
    prompt = prompt_of(Request(history=["<eos> <speaker1>"]), tokenizer, 96).input_ids
    bos, eos, speaker1, speaker2, _ = special_ids(tokenizer)
    assert [token for token in prompt if token in special_ids(tokenizer)] == [
        bos,
        speaker2,
        speaker1,
    ]
    assert eos not in prompt


def test_input_ids_alone_belong_to_speaker1(engine):
    speaker1 = engine.layout.speaker1
    with_segments = Request(input_ids=range(5), token_type_ids=[speaker1] * 5, params=PARAMS)
    without = Request(input_ids=range(5), params=PARAMS)
    other = Request(input_ids=range(5), token_type_ids=[7] * 5, params=PARAMS)
    replies = engine.generate([with_segments, without, other])
    assert replies[0] == replies[1] != replies[2]


def test_a_request_may_be_empty(engine):
    [[reply]] = engine.generate([Request(params=PARAMS)])
    assert len(reply.token_ids) == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_type_ids": [1]}, "token_type_ids, but no input_ids"),
        ({"input_ids": [1], "persona": ["a"]}, "both input_ids and persona or history"),
        ({"input_ids": [1], "history": [[2]]}, "both input_ids and persona or history"),
        ({"input_ids": []}, "0 input_ids and 0 token_type_ids"),
        ({"input_ids": [1, 2], "token_type_ids": [1]}, "2 input_ids and 1 token_type_ids"),
        ({"input_ids": [1] * 89}, "89 input_ids, but beside the reply .* positions for 88"),
        ({"input_ids": [1, 400]}, "^input_ids of the request holds 400, .* below 400"),
        ({"input_ids": [1, -1]}, "^input_ids of the request holds -1"),
        ({"input_ids": ["a"]}, "^input_ids of the request holds 'a'"),
        ({"input_ids": [1.0]}, "^input_ids of the request holds 1.0"),
        ({"input_ids": [1], "token_type_ids": [400]}, "^token_type_ids of the request holds 400"),
        ({"persona": [[1], [400]]}, "^persona of the request holds 400"),
        ({"history": [[None]]}, "^history of the request holds None"),
        ({"persona": "i like tea ."}, "^persona of the request is one text: give a list"),
        ({"history": "hello !"}, "^history of the request is one text: give a list"),
        ({"history": ["hello !", ""]}, r"^history\[1\] of the request is blank: leave it out"),
        ({"history": ["\u200b \n", "hello !"]}, r"^history\[0\] of the request is blank"),
        ({"history": ["hello !", [1]]}, "^history of the request mixes texts and token ids"),
        ({"persona": [[1], "hello !"]}, "^persona of the request mixes texts and token ids"),
    ],
)
def test_a_mistake_in_a_request_is_named(engine, fields, message):
    request = Request(**fields, params=PARAMS)
    with pytest.raises(UserError, match=message):
        engine.check(request)
    with pytest.raises(UserError, match=r"^request 0: "):
        engine.generate([request])


def test_a_prompt_of_token_ids_may_fill_the_model(engine):
    engine.check(Request(input_ids=[1] * 88, params=PARAMS))
    [[reply]] = engine.generate([Request(input_ids=[1] * 88, params=PARAMS)])
    assert len(reply.token_ids) == 8


@pytest.mark.parametrize("given", ["text", "token ids"])
def test_what_does_not_fit_is_cut_and_a_reply_has_its_room(engine, tokenizer, given):
    persona, history = PERSONA * 20, ["how are you ? " * 30]  # the question alone is too long
    if given == "token ids":
        persona, history = encode(tokenizer, persona), encode(tokenizer, history)
    prompt = prompt_of(Request(persona=persona, history=history, params=PARAMS), tokenizer, 96)
    bos, _, speaker1, speaker2, _ = special_ids(tokenizer)
    [turn] = encode(tokenizer, ["how are you ? " * 30])
    assert prompt.input_ids == [bos, speaker2, *turn[-85:], speaker1]
    assert len(prompt.input_ids) == 96 - PARAMS.max_length


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_length", 0),
        ("min_length", -1),
        ("min_length", 21),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**63),
        ("top_k", 10**20),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("no_repeat_ngram_size", -1),
        ("stop", "wait"),  # would be four stop texts
        ("n", 0),
        ("n", 10_001),
    ],
)
def test_a_sampling_parameter_out_of_range_is_named(field, value):
    with pytest.raises(UserError, match=f"^{field} is {value}, but must be "):
        SamplingParams(**{field: value})


def test_an_empty_stop_text_is_refused():
    with pytest.raises(UserError, match=r"^stop is .* none of them empty"):
        SamplingParams(stop=("a", ""))


def test_the_outermost_values_are_allowed():
    SamplingParams(max_length=1, min_length=0, temperature=0, top_p=0, min_p=0, seed=0)
    SamplingParams(top_p=1, min_p=1, seed=2**63 - 1, n=10_000, repetition_penalty=100)
