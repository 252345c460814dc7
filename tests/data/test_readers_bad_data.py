"""Bad data: named by file, place and field, and never more than one sentence."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convai_fast.data.readers import load_dialogues
from convai_fast.data.readers.file import FILE_READERS
from convai_fast.errors import UserError
from tests.helpers.conversations import CSV, DOG_DIALOGUE, MESSAGES, PARLAI, SHAREGPT, TEA_DIALOGUE
from tests.helpers.reading import assert_user_error


def utterance_with(**fields):
    return {
        "train": [DOG_DIALOGUE, {"utterances": [{"history": ["a"], "candidates": ["b"]} | fields]}]
    }


def messages_with(*turns):
    good = json.dumps(MESSAGES)
    bad = json.dumps({"messages": [{"role": "user", "content": "a"}, *turns]})
    return f"{good}\n{bad}\n"


HEADER = "user 1 personas,user 2 personas,Best Generated Conversation"
BAD_DATA = [
    # json
    ("a.json", '{"train": [\n{"utterances": [', ["line 2", "not valid JSON"]),
    ("a.json", '{"train": []} x', ["line 1", "not valid JSON", "column 15"]),
    ("a.json", "[" * 100_000, ["line 1", "nested too deeply"]),
    ("a.json", "3", ["holds '3'", "list of dialogues"]),
    ("a.json", '[{"utterances": [{"history": [' + "9" * 5000 + "]}]}]", [
        "[0].utterances[0].history[0] must be text, not a number"]),
    ("a.json", {}, ["train is missing"]),
    ("a.json", {"valid": [DOG_DIALOGUE]}, ["train is missing"]),
    ("a.json", {"train": []}, ["no reply to learn from"]),
    ("a.json", [], ["no reply to learn from"]),
    ("a.json", {"train": [{"utterances": []}]}, ["no reply to learn from"]),
    ("a.json", {"train": {"a": 1}}, ["train must be a list, not an object"]),
    ("a.json", {"train": [DOG_DIALOGUE], "valid": 1}, ["valid must be a list, not a number"]),
    ("a.json", {"train": [DOG_DIALOGUE], "val": [3]}, ["val[0] must be an object, not a number"]),
    ("a.json", {"train": [{"personality": []}]}, [
        "train[0]: the fields are 'personality'", "utterances"]),
    ("a.json", {"train": [DOG_DIALOGUE | {"personality": 3}]}, [
        "train[0].personality must be a list, not a number"]),
    ("a.json", {"train": [DOG_DIALOGUE | {"personality": [None]}]}, [
        "train[0].personality[0] must be text, not null"]),
    ("a.json", {"train": [{"utterances": {}}]}, ["train[0].utterances must be a list"]),
    ("a.json", {"train": [{"utterances": ["a"]}]}, [
        "train[0].utterances[0] must be an object, not text"]),
    ("a.json", {"train": [{"utterances": [{"history": []}]}]}, [
        "train[0].utterances[0].candidates is missing"]),
    ("a.json", {"train": [{"utterances": [{"candidates": ["a"]}]}]}, [
        "train[0].utterances[0].history is missing"]),
    ("a.json", utterance_with(candidates=[]), ["train[1].utterances[0].candidates is empty"]),
    ("a.json", utterance_with(candidates="b"), [
        "train[1].utterances[0].candidates must be a list, not text"]),
    ("a.json", utterance_with(candidates=["a", 1.5]), [
        "train[1].utterances[0].candidates[1]", "must be text, not a number"]),
    ("a.json", utterance_with(candidates=[["a"], "b"]), [
        "train[1].utterances[0].candidates[0] must be text, not a list"]),
    ("a.json", utterance_with(candidates=["a", " \n"]), [
        "train[1].utterances[0].candidates[1]", "is blank"]),
    ("a.json", utterance_with(history=["a", ""]), [
        "train[1].utterances[0].history[1] is blank"]),
    ("a.json", utterance_with(history=[True]), [
        "train[1].utterances[0].history[0] must be text, not true or false"]),
    ("a.json", utterance_with(history=["a\0b"]), ["history[0] holds a NUL character"]),
    ("a.json", utterance_with(history=["\ud83d"]), ["history[0] holds half of a surrogate pair"]),
    ("a.jsonl", f"{json.dumps(DOG_DIALOGUE)}\n\n{{'a': 1}}\n", ["line 3", "not valid JSON"]),
    ("a.jsonl", f"{json.dumps(DOG_DIALOGUE)}\n  {{'a': 1}}\n", ["line 2", "column 4"]),
    ("a.jsonl", f"{json.dumps(DOG_DIALOGUE)}\n[1]\n", ["line 2 must be an object, not a list"]),
    # messages and sharegpt
    ("a.jsonl", messages_with("b"), ["line 2: messages[1] must be an object, not text"]),
    ("a.jsonl", messages_with({"role": "user"}), ["line 2: messages[1].content is missing"]),
    ("a.jsonl", messages_with({"content": "b"}), ["line 2: messages[1].role is missing"]),
    ("a.jsonl", messages_with({"role": "tool", "content": "b"}), [
        
        "line 2: messages[1].role is 'tool', a turn of a tool", "system, developer, user"]),
    ("a.jsonl", messages_with({"role": ["user"], "content": "b"}), [
        "line 2: messages[1].role must be text, not a list"]),
    ("a.jsonl", messages_with({"role": "assistant", "content": None}), [
        "line 2: messages[1].content is null, not text"]),
    ("a.jsonl", messages_with({"role": "assistant", "content": ""}), [
        "line 2: messages[1].content is blank"]),
    ("a.jsonl", messages_with({"role": "system", "content": 1}), [
        "line 2: messages[1].content must be text, not a number"]),
    ("a.jsonl", f"{json.dumps(MESSAGES)}\n{{\"messages\": 1}}", [
        "line 2: messages must be a list, not a number"]),
    ("a.jsonl", f"{json.dumps(MESSAGES)}\n{{\"other\": 1}}", [
        "line 2: the fields are 'other'", "messages"]),
    ("a.json", [{"conversations": [{"from": "human", "value": 7}]}], [
        "[0].conversations[0].value must be text, not a number"]),
    ("a.json", [{"conversations": [{"from": "narrator", "value": "a"}]}], [
        "[0].conversations[0].from is 'narrator', not a known role", "human"]),
    # parlai
    ("a.txt", "1 hi\thello\nhi\thello\n", ["line 2", "begins with its number"]),
    ("a.txt", "1 hi\thello\n\n2 hi hello\n3 a\tb\n", ["line 3", "no tab", "N text<TAB>reply"]),
    ("a.txt", "1 hi\thello\n2 hi\t\n", ["line 2: the reply is blank"]),
    ("a.txt", "1 hi\thello\n2 \thi\n", ["line 2: the text is blank"]),
    ("a.txt", "1 hi\t \t\tyes|no\n", ["line 1: the reply is blank"]),
    ("a.txt", "1 hi\thello\t\ta|b\tc\n", ["line 1", "5 fields"]),
    ("a.txt", f"1 hi\thello\n{'9' * 5000} hi\thello\n", ["line 2", "begins with its number"]),
    ("a.txt", "1 your persona: i sing .\n", ["no reply to learn from"]),
    # csv
    ("a.csv", "a,b\n1,2\n", ["line 1", "the columns are 'a', 'b'", "user 1 personas"]),
    ("a.csv", f"{HEADER}\n", ["no reply to learn from"]),
    ("a.csv", f'{HEADER}\np,p,"User 1: a\nUser 2: b"\n\np,p,"User 1: a\nUser 2: b', [
        "line 5", "quotes"]),
    ("a.csv", f'{HEADER}\np,p,"User 1: "a"\n', ["line 2", "not valid CSV"]),
    ("a.csv", f'{HEADER}\np,p,"User 1: a\nUser 2: b"\np,p\n', ["line 4", "2 cells", "has 3"]),
    ("a.csv", f"{HEADER}\np,p,User 1: a, b\n", ["line 2", "4 cells", "commas"]),
    ("a.csv", f'{HEADER}\np,p,"hi\nthere"\n', [
        "line 2: Best Generated Conversation has no turn", "User 1: "]),
    ("a.csv", f"{HEADER}\np,p,\n", ["line 2: Best Generated Conversation is blank"]),
    ("a.csv", f"{HEADER}\np,p,User 1: a\n", ["no reply to learn from"]),
    # any file
    ("a.json", "", ["is empty"]),
    ("a.csv", "\ufeff \r\n", ["is empty"]),
    ("a.json", '[\n"é"]'.encode("latin-1"), ["line 2", "0xe9", "UTF-8"]),
    ("a.txt", "1 hi\thello\n".encode("utf-16"), ["text in UTF-16", "UTF-8"]),
    ("a.txt", b"1 hi\thello\n2 a\0b\tc\n", ["line 2", "NUL character"]),
    ("a.txt", "hello there\n", ["not recognised", "json, parlai, csv, messages, sharegpt"]),
    ("a", "hello there\n", ["not recognised"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "parts"), BAD_DATA)
def test_bad_data_is_named_by_file_place_and_field(write, name, content, parts):
    path = write(name, content)
    assert_user_error(lambda: load_dialogues(path), [path, *parts])


@pytest.mark.parametrize(
    ("reader", "part"),
    [
        ("json", "[0]: the fields are 'something'"),
        ("messages", "[0].messages is missing (found are 'something')"),
        ("pairs", "[0].prompt is missing (found are 'something')"),
    ],
)
def test_a_reader_that_does_not_fit_names_what_was_found(write, reader, part):
    path = write("a.json", [{"something": "else"}])
    parts = [f"{path}: {part}", "a function of your own, reader my_module:load"]
    assert_user_error(lambda: load_dialogues(path, reader), parts)


SAMPLES = [
    json.dumps({"train": [TEA_DIALOGUE, DOG_DIALOGUE], "valid": [DOG_DIALOGUE]}, indent=1),
    f"{json.dumps(MESSAGES)}\n{json.dumps(MESSAGES)}",
    json.dumps([SHAREGPT]),
    PARLAI,
    CSV,
]
JUNK = [
    "",
    '"',
    "\t",
    "\n",
    ",",
    "]",
    "}",
    "\0",
    "\\",
    "\ufeff",
    "1 ",
    "NaN",
    "[[",
    '"\\ud800"',
    "|",
]
FUZZ = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(
    content=st.binary(max_size=60)
    | st.builds(
        lambda sample, at, length, junk: (
            sample[: at % len(sample)] + junk + sample[at % len(sample) + length :]
        ).encode(),
        st.sampled_from(SAMPLES),
        st.integers(0, 10**6),
        st.integers(0, 30),
        st.sampled_from(JUNK) | st.text(max_size=3),
    ),
    suffix=st.sampled_from(["json", "jsonl", "csv", "txt"]),
    reader=st.sampled_from(["auto", *FILE_READERS]),
)
def test_no_file_raises_anything_but_a_user_error(tmp_path, content, suffix, reader):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    check_never_worse_than_a_user_error(path, reader)


JSON_KEYS = st.sampled_from(
    ["train", "valid", "personality", "utterances", "history", "candidates", "messages", "role"]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from(["", "a", "user", "assistant"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(JSON_KEYS, values, max_size=3),
    max_leaves=12,
)


@FUZZ
@given(content=JSON_VALUES, reader=st.sampled_from(["auto", "json", "messages"]))
def test_no_json_raises_anything_but_a_user_error(tmp_path, content, reader):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    check_never_worse_than_a_user_error(path, reader)


def check_never_worse_than_a_user_error(path, reader):
    try:
        splits = load_dialogues(path, reader, num_candidates=3)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert splits["train"] and all(d.utterances for d in splits["train"] + splits["valid"])
