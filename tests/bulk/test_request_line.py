"""A line of requests under our names, and under those that other engines use."""

import pytest

from convai_fast.bulk.request_line import to_request
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams

PARAMS = SamplingParams()


def read(**record):
    return to_request(record, PARAMS, seed=7)[0]


@pytest.mark.parametrize(
    ("record", "persona", "history"),
    [
        ({"prompt": "hello !"}, [], ["hello !"]),
        ({"persona": "i sing .\n\ni am old .", "prompt": "hi"}, ["i sing .", "i am old ."], ["hi"]),
        ({"personality": ["i sing ."], "history": ["hi"]}, ["i sing ."], ["hi"]),
        (
            {"messages": [{"role": "Developer", "content": "i sing ."},
                          {"role": "human", "content": "a"}, {"from": "gpt", "value": "b"},
                          {"role": "user", "content": [{"type": "text", "text": "c"}]}]},
            ["i sing ."], ["a", "b", "c"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
             "persona": ["i sing ."]},
            ["i sing ."], ["a b"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, "b"]}]},
            [], ["a\nb"],
        ),
        ({"system_prompt": "i sing .", "conversation": [{"role": "user", "content": "a"}]},
         ["i sing ."], ["a"]),
    ],
)  # fmt: skip
def test_what_is_asked_is_understood(record, persona, history):
    request = read(**record)
    assert (list(request.persona), list(request.history)) == (persona, history)


def test_texts_are_stripped_where_those_of_training_data_are():
    turns = (("human", " a"), ("gpt", "b \n"), ("human", "\tc "))
    messages = [{"from": role, "value": text} for role, text in turns]
    assert read(messages=messages).history == ["a", "b", "c"]
    assert read(prompt="\n hello ! ").history == ["hello !"]
    assert read(history=[" hello ! "]).history == [" hello ! "]  # taken as it is


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5}, {"max_length": 5}),
        ({"max_completion_tokens": 5}, {"max_length": 5}),
        ({"max_new_tokens": 5, "do_sample": False}, {"max_length": 5, "no_sample": True}),
        ({"do_sample": True}, {"no_sample": False}),
        ({"stop": "."}, {"stop": (".",)}),
        ({"stop": [".", "!"], "n": 3}, {"stop": (".", "!"), "n": 3}),
        ({"num_return_sequences": 2, "seed": 1}, {"n": 2, "seed": 1}),
        ({"stream": True, "presence_penalty": 0, "temperature": None}, {}),
    ],
)
def test_names_of_other_engines_are_understood(fields, expected):
    params = read(history=["hi"], **fields).params
    for name, value in {"seed": 7, **expected}.items():
        assert getattr(params, name) == value


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"tempreature": 1}, "there is no field 'tempreature': do you mean temperature?"),
        ({"max_length": 3, "max_tokens": 3}, "max_length and max_tokens are names of the same"),
        ({"presence_penalty": 0.5}, "presence_penalty is 0.5"),
        ({"logit_bias": {"5": 1}}, "logit_bias is"),
        ({"prompt": "a", "history": ["b"]}, "history and prompt both say what is answered"),
        ({"prompt": "\u200b"}, "prompt is blank"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0, but must be at least 1"),
        (
            {"prompt": "a", "extra_body": {"max_tokens": 3, "min_length": 4}},
            "min_length is 4, but must be between 0 and max_tokens, which is 3",
        ),
        (
            {"prompt": "a", "num_return_sequences": 3, "best_of": 2},
            "best_of is 2, but must be 1, or between num_return_sequences, which is 3,",
        ),
        ({"messages": []}, "the last turn of messages must be the user's"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'messages[0].role is "tool"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0] is 'image_url', not text",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
            "messages[0] has tool_calls",
        ),
        ({"body": {"prompt": "a"}, "url": "/v1/embeddings"}, 'url is "/v1/embeddings"'),
    ],
)
def test_what_cannot_be_done_is_named(record, says):
    with pytest.raises(UserError) as error:
        read(**record)
    assert says in str(error.value)
