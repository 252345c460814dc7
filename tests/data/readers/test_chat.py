"""Chat data in every dialect that people have is one conversation."""

import json
import tracemalloc

import pytest

from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from tests.helpers.conversations import MESSAGES, SHAREGPT, TEA_WITHOUT_CANDIDATES
from tests.helpers.reading import assert_user_error, load_bare

PERSONA, TURNS = ["i like tea .", "i am old ."], ["hello !", "hi , tea ?", "yes .", "here ."]


def told(record, names=("role", "content"), roles=("user", "assistant")):
    """TURNS under these names."""
    turns = [dict(zip(names, (roles[i % 2], text), strict=True)) for i, text in enumerate(TURNS)]
    return {**record, "turns": turns}


def read(write, *records, **options):
    path = write("a.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    said = []
    dialogues = load_bare(path, report=said.append, **options)["train"]
    return dialogues, said


def messages(*turns, **beside):
    return {"messages": [{"role": role, "content": text} for role, text in turns], **beside}


@pytest.mark.parametrize("turns_name", ["messages", "conversations", "conversation", "thread"])
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value"), ("role", "text")])
@pytest.mark.parametrize(
    "roles",
    [("user", "assistant"), ("human", "gpt"), ("Human", "Assistant"), ("prompter", "model"),
     ("user", "bot"), ("human", "bing"), ("human", "bard"), ("user", "chatgpt")],
)  # fmt: skip
def test_all_names_of_turns_roles_and_texts_are_read(write, turns_name, names, roles):
    record = told({"system": "\n".join(PERSONA)}, names, roles)
    record[turns_name] = record.pop("turns")
    ((dialogue,), _) = read(write, record)
    assert dialogue.personality == PERSONA
    assert [u.history for u in dialogue.utterances] == [TURNS[:1], TURNS[:3]]
    assert [u.candidates for u in dialogue.utterances] == [[TURNS[1]], [TURNS[3]]]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": TURNS},
        {"conversation": [{"human": TURNS[0], "assistant": TURNS[1]},
                          {"human": TURNS[2], "assistant": TURNS[3]}]},
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]}
                      for role, text in zip(["user", "assistant"] * 2, TURNS, strict=True)]},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "beside",
    [{"system_prompt": "\n".join(PERSONA)}, {"persona": PERSONA}, {"system": "\n\n".join(PERSONA)}],
)
def test_texts_pairs_and_parts_are_turns(write, record, beside):
    ((dialogue,), _) = read(write, record | beside)
    assert dialogue.personality == PERSONA
    assert [u.candidates[-1] for u in dialogue.utterances] == TURNS[1::2]


@pytest.mark.parametrize("beside", [{}, {"system": None}, {"persona": ""}, {"persona": []}])
def test_a_persona_may_be_missing(write, beside):
    ((dialogue,), _) = read(write, {"conversations": TURNS} | beside)
    assert dialogue.personality == []


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"loss_weight": "0"}, {"loss": False}, {"train": "no"},
     {"trainable": False}],
)  # fmt: skip
def test_a_turn_of_weight_0_is_seen_and_never_learnt_nor_a_distractor(write, mark):
    bad = {"role": "assistant", "content": "BAD", **mark}
    records = []
    for i in range(4):
        good = {"role": "assistant", "content": f"good {i}", "weight": 1, "loss": True}
        users = [{"role": "user", "content": f"ask {i}"}, {"role": "user", "content": "again"}]
        records.append({"messages": [users[0], bad, users[1], good]})
    path = write("a.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    said = []
    dialogues = load_dialogues(path, valid_fraction=0, report=said.append)["train"]
    for i, dialogue in enumerate(dialogues):
        (utterance,) = dialogue.utterances
        assert utterance.history == [f"ask {i}", "BAD", "again"]
        assert utterance.candidates[-1] == f"good {i}"
        assert "BAD" not in utterance.candidates and len(utterance.candidates) == 4
    assert any("weight 0 are seen and not learnt (4)" in line for line in said)


def test_a_system_line_in_the_middle_is_known_only_from_there_on(write):
    record = messages(
        ("system", "i sing ."), ("user", "a"), ("assistant", "b"), ("system", "it rains ."),
        ("user", "c"), ("assistant", "d"), ("system", "the end ."),
    )  # fmt: skip
    (before, after), _ = read(write, record)
    assert (before.personality, after.personality) == (["i sing ."], ["i sing .", "it rains ."])
    assert [u.candidates for u in before.utterances] == [["b"]]
    assert [(u.history, u.candidates) for u in after.utterances] == [(["a", "b", "c"], ["d"])]


def test_a_system_text_beside_the_turns_and_among_them_is_known_once(write):
    turns = ("system", "i sing .\ni bake ."), ("user", "a"), ("assistant", "b")
    ((dialogue,), _) = read(write, messages(*turns, system="i sing ."))
    assert dialogue.personality == ["i sing .", "i bake ."]


def test_a_reply_that_a_system_line_interrupts_is_not_learnt(write):
    roles = ["user", "assistant", "system", "assistant", "user", "system", "assistant"]
    record = messages(*zip(roles, "abcdefg", strict=True))
    (dialogue,), said = read(write, record)
    assert dialogue.personality == ["c", "f"]
    assert [(u.history, u.candidates) for u in dialogue.utterances] == [(["a", "b d", "e"], ["g"])]
    assert "replies that a system line interrupts are seen and not learnt (1)" in said[0]


def test_consecutive_turns_are_joined_and_what_nobody_answers_is_left_out(write):
    record = messages(
        ("assistant", "back ?"), ("user", "yes ,"), ("user", "i am"), ("assistant", "good ,"),
        ("assistant", "good"), ("user", "bye"),
    )  # fmt: skip
    ((dialogue,), said) = read(write, record, messages(("assistant", "anyone ?")))
    (utterance,) = dialogue.utterances
    assert utterance.history == ["back ?", "yes , i am"]
    assert utterance.candidates == ["good , good"]
    assert any("nothing is answered are left out (1)" in line for line in said)


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"role": "tool", "content": "x"}, "role is 'tool', a turn of a tool"),
        ({"from": "observation", "value": "x"}, "from is 'observation', a turn of a tool"),
        ({"role": "ann", "content": "x"}, "role is 'ann', not a known role"),
        ({"sender": "ann", "content": "x"}, "role is missing (found are 'sender', 'content')"),
        ({"role": "user", "content": None}, "content is null, not text, as in a tool call"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content[0] is 'image_url'"),
        ({"role": "user", "content": "\u200b\u00ad\ufeff"}, "content is blank"),
    ],
)
def test_a_turn_that_cannot_be_read_is_named_or_skipped_with_its_record(write, turn, says):
    good = messages(("user", "a"), ("assistant", "b"))
    bad = {"messages": [good["messages"][0], turn, good["messages"][1]]}
    path = write("a.jsonl", f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    parts = [f"{path}, line 2: messages[1].{says}", "skip_bad_records"]
    assert_user_error(lambda: load_bare(path), parts)
    said = []
    dialogues = load_bare(path, skip_bad_records=True, report=said.append)["train"]
    assert len(dialogues) == 1
    assert "1 of 2 records cannot be read and are skipped: " in said[0] and says in said[0]


def test_all_bad_records_are_counted_and_ten_of_them_named(write):
    good, bad = json.dumps(messages(("user", "a"), ("assistant", "b"))), '{"messages": 3}'
    path = write("a.jsonl", "\n".join([good, *[bad] * 12, "{oops", good]))
    lines = [f"line {i}: messages must be a list" for i in range(2, 12)]
    assert_user_error(lambda: load_bare(path), ["13 of 15 records cannot be read", *lines, "; …"])
    assert len(load_bare(path, skip_bad_records=True, report=print)["train"]) == 2


def test_fields_that_look_as_if_they_mattered_are_named_once(write):
    record = messages(("user", "a"), ("assistant", "b"), loss_mask=[1], id=3, source="x")
    _, said = read(write, record, record)
    assert [line.split(": ", 1)[1] for line in said] == [
        "the field 'loss_mask' is not understood and not used (2)"
    ]


def test_messages_written_as_text_are_told_how_to_parse(write):
    record = {"messages": json.dumps(messages(("user", "a"))["messages"])}
    path = write("a.jsonl", f"{json.dumps(record)}\n" * 2)
    assert_user_error(lambda: load_bare(path), ["must be a list, not text that holds JSON"])


@pytest.mark.parametrize(
    ("weight", "is_learnt"), [("0", False), ("0.0", False), (0.0, False), ("1", True), (0.5, True)]
)
def test_a_weight_of_0_is_0_however_it_is_written(write, weight, is_learnt):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["weight"] = weight
    (dialogue,) = load_bare(write("a.json", [{"messages": messages}]))["train"]
    replies = [u.candidates[-1] for u in dialogue.utterances]
    assert replies == (["b", "d"] if is_learnt else ["d"])


@pytest.mark.parametrize("mark", [{"label": False}, {"weight": 0}, {"trainable": "false"}])
def test_a_record_that_is_not_to_be_learnt_is_left_out_and_told(write, mark):
    good = messages(("user", "a"), ("assistant", "b"))
    dialogues, said = read(write, good, good | mark)
    assert len(dialogues) == 1
    assert len(said) == 1 and said[0].endswith("are left out (1)")
    assert "nothing is answered" not in said[0]


def test_weights_between_are_counted_as_1_and_told_with_their_number(write):
    record = messages(("user", "a"), ("assistant", "b"), weight=1)
    record["messages"][1]["weight"] = 0.5
    dialogues, said = read(write, record, record)
    assert len(dialogues) == 2
    assert [line.split(": ", 1)[1] for line in said] == [
        "a weight that is neither 0 nor 1 counts as 1 (2)"
    ]


def test_a_weight_of_any_size_is_a_number(write):
    record = messages(("user", "a"), ("assistant", "b"))
    line = json.dumps(record)[:-1] + f', "weight": 1{"0" * 400}}}\n'
    assert len(load_bare(write("a.jsonl", line * 2))["train"]) == 2


def test_a_long_monologue_takes_memory_as_it_is_long(write):
    said = [f"this is sentence {i} of a long story ." for i in range(3000)]
    messages = [{"role": "user", "content": text} for text in said]
    path = write("a.json", [{"messages": [*messages, {"role": "assistant", "content": "oh !"}]}])
    tracemalloc.start()
    try:
        (dialogue,) = load_bare(path)["train"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dialogue.utterances[0].history == [" ".join(said)]
    assert peak < 20e6  # each beginning of the story kept would be 180 MB


@pytest.mark.parametrize(("name", "record"), [("messages", MESSAGES), ("sharegpt", SHAREGPT)])
@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("layout", ["lines", "list", "split"])
def test_messages_and_sharegpt(write, name, record, auto, layout):
    contents = {
        "lines": f"{json.dumps(record)}\r\n{json.dumps(record)}\r\n",
        "list": [record, record],
        "split": {"train": [record, record]},
    }
    path = write("chat.jsonl", contents[layout])
    expected = [TEA_WITHOUT_CANDIDATES, TEA_WITHOUT_CANDIDATES]
    assert load_bare(path, "auto" if auto else name)["train"] == expected


def test_an_opening_by_the_assistant_is_history_not_a_reply(write):
    turns = [("assistant", "a"), ("user", "b"), ("assistant", "c")]
    path = write("m.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    assert load_bare(path)["train"] == [Dialogue([], [Utterance(["a", "b"], ["c"])])]
