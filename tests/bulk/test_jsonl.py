import json

import pytest

from convai_fast.bulk.jsonl import (
    BadLine,
    IdentifiedRequest,
    RequestFile,
    id_key,
    reply_record,
    seed_of,
)
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Reply, Request

PARAMS = SamplingParams(temperature=0.5, seed=7)


@pytest.fixture
def read(tmp_path):
    """What a file of these lines (bytes, or objects) is read as."""

    def read(*lines):
        content = b"\n".join(
            line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
        )
        path = tmp_path / "requests.jsonl"
        path.write_bytes(content)
        return list(RequestFile(path, PARAMS))

    return read


def test_a_line_is_a_request_drawn_with_the_params_of_the_run(read):
    (item,) = read({"id": "a", "persona": ["i like tea ."], "history": ["hello !"]})
    assert (item.id, item.number, item.expected) == ("a", 1, None)
    assert item.request == Request(
        persona=["i like tea ."],
        history=["hello !"],
        params=SamplingParams(temperature=0.5, seed=seed_of(7, "a")),
    )


def test_token_ids_may_stand_instead_of_texts(read):
    persona, prompt = read(
        {"persona": [[1, 2]], "history": [[3]]}, {"input_ids": [1, 2], "token_type_ids": [3, 4]}
    )
    assert (persona.request.persona, persona.request.history) == ([[1, 2]], [[3]])
    assert (prompt.request.input_ids, prompt.request.token_type_ids) == ([1, 2], [3, 4])


def test_any_sampling_param_of_a_line_overrides_that_of_the_run(read):
    overrides = {
        "max_length": 30,
        "min_length": 2,
        "temperature": 1,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "no_sample": True,
        "seed": 3,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "n": 4,
        "logprobs": True,
    }
    (item,) = read({**overrides, "stop": [".", "!"]})
    assert item.request.params == SamplingParams(**overrides, stop=(".", "!"))


def test_an_id_is_a_text_or_number_as_given_and_else_the_number_of_the_line(read):
    ids = ["a", "", "7", 7, 7.0, 2.5, -1, "naïve 🙂"]
    items = read(*({"id": id} for id in ids), b"", {})
    assert [item.id for item in items] == [*ids, 10]
    assert len({id_key(item.id) for item in items}) == len(items)


def test_a_seed_depends_on_the_id_alone_and_not_on_the_place(read):
    def seeds(*ids):
        return {item.id: item.request.params.seed for item in read(*({"id": id} for id in ids))}

    first = seeds("a", "b", 1, "1")
    assert len(set(first.values())) == 4
    assert seeds("1", "b", 1, "a") == first
    assert seed_of(8, "a") != seed_of(7, "a")


def test_a_byte_order_mark_carriage_returns_and_blank_lines_are_no_matter(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"history": ["a"]}\r\n\r\n  \n{"history": ["b"]}')
    requests = RequestFile(path, PARAMS)
    assert requests.num_requests == 2
    assert [(item.number, item.request.history) for item in requests] == [(1, ["a"]), (4, ["b"])]


@pytest.mark.parametrize(
    ("line", "id", "says"),
    [
        (b"hello", None, "not JSON: Expecting value at column 1"),
        (b'{"id": 3', None, "not JSON"),
        (b'["a"]', None, '["a"] is not a JSON object'),
        (b'"' + b"a" * 999 + b'"', None, "… is not a JSON object"),
        (b'{"history": ["na\xefve"]}', None, "the byte 0xef is not UTF-8"),
        (rb'{"history": ["\ud83d"]}', None, "half of a surrogate pair"),
        (b'{"temperature": NaN}', None, "NaN is no number"),
        (b"9" * 5000, None, "not JSON that can be read"),
        (b"[" * 100_000, None, "not JSON that can be read"),
        ({"id": None}, None, "id is null, but must be a text or a number"),
        ({"id": [1]}, None, "id is [1], but must be"),
        ({"id": True}, None, "id is true, but must be"),
        (b'{"id": 1e999}', None, "id is Infinity, but must be"),
        ({"id": 3, "histroy": []}, 3, "there is no field 'histroy': do you mean history?"),
        ({"id": 3, "xyz": []}, 3, "there is no field 'xyz': there are id, persona, history"),
        ({"history": "hello"}, 1, 'history is "hello", but must be a list of texts, or'),
        ({"history": ["a", [1]]}, 1, 'history is ["a", [1]], but must be'),
        ({"persona": [[1.5]]}, 1, "persona is [[1.5]], but must be"),
        ({"input_ids": [True]}, 1, "input_ids is [true], but must be a list of token ids"),
        ({"token_type_ids": [2**63]}, 1, "token_type_ids is"),
        ({"max_length": 3.0}, 1, "max_length is 3.0, but must be a whole number"),
        ({"top_k": 10**30}, 1, "but must be a whole number"),
        ({"n": True}, 1, "n is true, but must be a whole number"),
        ({"temperature": "hot"}, 1, 'temperature is "hot", but must be a number'),
        ({"temperature": 10**400}, 1, "but must be a number"),
        ({"no_sample": 1}, 1, "no_sample is 1, but must be true or false"),
        ({"stop": 3}, 1, "stop is 3, but must be"),
        ({"top_p": 1.5}, 1, "top_p is 1.5, but must be between 0 and 1"),
        ({"seed": -1}, 1, "seed is -1, but must be"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(read, line, id, says):
    bad, good = read(line, {"history": ["hello !"]})
    assert isinstance(bad, BadLine)
    assert (bad.number, bad.id) == (1, id)
    assert says in bad.reason
    assert "\n" not in bad.reason
    assert isinstance(good, IdentifiedRequest)


def test_an_id_belongs_to_the_first_line_that_has_it(read):
    items = read({"id": "a"}, {"id": "a"}, {"id": 4}, {}, {"id": "b", "top_p": 2}, {"id": "b"})
    good = [(item.number, item.id) for item in items if isinstance(item, IdentifiedRequest)]
    # The number of a line without an id may be the id of another.
    assert good == [(1, "a"), (3, 4), (4, "line 4")]
    assert [(item.number, item.reason) for item in items if isinstance(item, BadLine)] == [
        (2, 'line 1 has the same id, "a"'),
        (5, "top_p is 2, but must be between 0 and 1"),
        (6, 'line 5 has the same id, "b"'),
    ]


def test_the_number_of_a_line_is_its_id_unless_some_line_claims_it(read):
    claims = [{"id": 2}, {}, {}, {"id": "line 3"}, {}, {"id": 6}, {}, {"id": 7}, {"id": 3}]
    ids = [item.id for item in read(*claims)]
    assert ids == [2, "line 2", "line line 3", "line 3", 5, 6, "line 7", 7, 3]


def test_a_file_that_changes_between_two_readings_is_noticed_where_it_does(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    requests = RequestFile(path, PARAMS)
    for content, line in [
        ('{"id": 1}\n{"id": 3}\n', 2),
        ('{"id": 1}\n', 2),
        ('{"id": 1}\n{"id": 2}\n{"id": 3}\n', 3),
        ('{"id": 2}\n{"id": 1}\n', 1),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=rf"is not what it was .* \(line {line}\): put it back"):
            list(requests)
    path.write_text('{"id": 1}\n{"id": 2}\n')
    assert [item.id for item in requests] == [1, 2]


def test_what_is_no_utf_8_is_named_and_a_byte_order_mark_inside_skipped(tmp_path):
    path = tmp_path / "requests.jsonl"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path.write_bytes('{"id": 1}\r\n'.encode(encoding))
        with pytest.raises(UserError, match=r"requests\.jsonl is text in UTF-16"):
            RequestFile(path, PARAMS)
    path.write_bytes(b"PK\x03\x04 of a zip archive")
    with pytest.raises(UserError, match="a spreadsheet or a zip archive"):
        RequestFile(path, PARAMS)
    path.write_bytes(b'{"id": 1}\n\xef\xbb\xbf{"id": 2}\n')
    assert [item.id for item in RequestFile(path, PARAMS)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", "No such file"),
        ("folder", "is not a regular file"),
        ("empty", "is empty"),
        ("blank", "is empty"),
    ],
)
def test_a_file_without_requests_is_a_users_mistake(tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text("\ufeff\n \r\n")
    with pytest.raises(UserError, match=says) as error:
        RequestFile(tmp_path / name, PARAMS)
    assert str(tmp_path / name) in str(error.value)


def test_a_file_is_known_again_by_its_content(tmp_path):
    def settings(content):
        (tmp_path / "requests.jsonl").write_text(content)
        return RequestFile(tmp_path / "requests.jsonl", PARAMS).settings

    assert settings("{}\n") == settings("{}\n")
    assert settings("{}\n") != settings('{"id": 1}\n')


def test_a_reply_is_written_with_what_was_asked_for():
    item = IdentifiedRequest("a", Request(history=["hello !"]), expected="hi .")
    plain = Reply([1, 2], "hi", "eos")
    record = reply_record(item, [plain, plain])
    assert record == {
        "id": "a",
        "replies": [{"text": "hi", "finish_reason": "eos"}] * 2,
        "expected": "hi .",
    }
    full = Reply([1, 2], "hi", "stop", logprobs=[-0.25, -1.23456789])
    record = reply_record(IdentifiedRequest(3, item.request), [full], with_token_ids=True)
    assert record == {
        "id": 3,
        "replies": [
            {
                "text": "hi",
                "finish_reason": "stop",
                "token_ids": [1, 2],
                "logprobs": [-0.25, -1.234568],
            }
        ],
    }
