"""The JSON of the predecessor, and of its forks."""

import json

import pytest

from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from tests.helpers.conversations import DOG, DOG_DIALOGUE, TEA, TEA_DIALOGUE
from tests.helpers.reading import load_bare, read


@pytest.mark.parametrize("reader", ["auto", "json"])
def test_json_of_the_predecessor(write, reader):
    path = write("chat.json", {"train": [TEA_DIALOGUE], "valid": [DOG_DIALOGUE]})
    assert load_bare(path, reader) == {"train": [TEA], "valid": [DOG]}


@pytest.mark.parametrize(
    "content",
    [
        [TEA_DIALOGUE, DOG_DIALOGUE],
        {"train": [TEA_DIALOGUE, DOG_DIALOGUE]},
        {"train": [TEA_DIALOGUE, DOG_DIALOGUE], "valid": []},
        {"train": [TEA_DIALOGUE, DOG_DIALOGUE], "valid": None},
        json.dumps([TEA_DIALOGUE, DOG_DIALOGUE], indent=2),
        f"{json.dumps(TEA_DIALOGUE)}\n\n{json.dumps(DOG_DIALOGUE)}\n",
    ],
)
def test_json_may_be_a_list_or_lines_or_lack_valid(write, content):
    assert load_bare(write("chat.json", content)) == {"train": [TEA, DOG], "valid": []}


def test_json_of_one_dialogue_is_one_dialogue(write):
    assert load_bare(write("one.jsonl", TEA_DIALOGUE))["train"] == [TEA]


def test_json_keeps_ragged_candidate_lists_as_they_are(write):
    ragged = [
        {"history": ["a"], "candidates": [f"wrong {i}" for i in range(n)] + ["right"]}
        for n in (1, 5, 30)
    ]
    path = write("chat.json", [{"utterances": ragged}, DOG_DIALOGUE])
    utterances = load_dialogues(path, valid_fraction=0)["train"][0].utterances
    assert [u.candidates for u in utterances] == [u["candidates"] for u in ragged]


def test_blank_persona_sentences_and_distractors_are_left_out(write):
    utterance = {"history": ["a"], "candidates": ["", "wrong", " ", "right"]}
    path = write("chat.json", [{"personality": ["", "i sing", " "], "utterances": [utterance]}])
    expected = Dialogue(["i sing"], [Utterance(["a"], ["wrong", "right"])])
    assert load_bare(path)["train"] == [expected]


def test_dialogues_without_an_answer_are_left_out(write):
    path = write("chat.json", {"train": [{"utterances": []}, DOG_DIALOGUE]})
    assert load_bare(path)["train"] == [DOG]


UTTERANCES = [{"history": ["a"], "candidates": ["no", "b"]}]


@pytest.mark.parametrize(
    ("fields", "persona"),
    [
        ({"personality": ""}, []),
        ({"personality": [""]}, []),
        ({"personality": None}, []),
        ({}, []),
        ({"personality": "i sing .\ni bake ."}, ["i sing .", "i bake ."]),
        ({"persona": ["i sing ."]}, ["i sing ."]),
        ({"personas": ["i sing ."]}, ["i sing ."]),
        ({"personality": [], "persona": ["i sing ."]}, ["i sing ."]),
        ({"personality": None, "personas": "i sing ."}, ["i sing ."]),
    ],
)
def test_the_persona_of_the_forks(write, fields, persona):
    path = write("a.json", {"train": [{"utterances": UTTERANCES, **fields}]})
    ((dialogue,), _) = read(path)
    assert dialogue.personality == persona


def test_rows_of_one_conversation_are_one_dialogue(write):
    rows = [
        {"personality": ["i sing ."], "history": ["a"], "candidates": ["x", "b"], "conv_id": 0},
        {
            "personality": ["i sing ."],
            "history": ["a", "b", "c"],
            "candidates": ["d"],
            "conv_id": 0,
        },
        {"personality": ["i bake ."], "history": ["e"], "candidates": ["f"], "conv_id": 1},
    ]
    dialogues, _ = read(write("a.json", {"train": rows}))
    assert [len(d.utterances) for d in dialogues] == [2, 1]
    for row in rows:
        del row["conv_id"]
    dialogues, _ = read(write("b.json", rows))
    assert [len(d.utterances) for d in dialogues] == [2, 1]


def test_rows_of_conversations_with_long_numbers_stay_apart(write):
    ids = [2**60, 2**60 + 1, "9" * 5000]
    rows = [
        f'{{"history": ["a{i}"], "candidates": ["b"], "conv_id": {conversation}}}'
        for i, conversation in enumerate(ids)
    ]
    dialogues, _ = read(write("a.jsonl", "\n".join(rows)))
    assert len(dialogues) == 3


def test_an_id_that_is_no_text_still_tells_conversations_apart(tmp_path):
    turns = [
        {"conv_id": id, "personality": [], "history": [f"hello {id!r}"], "candidates": ["hi"]}
        for id in ("a\ud800", "a\ud801")
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(turn)}\n" for turn in turns))
    splits = load_dialogues(path)
    assert sum(len(dialogues) for dialogues in splits.values()) == 2
