"""Records of any shape: told apart, mixed, or not to be learnt."""

import json

import pytest

from tests.helpers.reading import assert_user_error, load_bare, pairs_of, read

MARKS = [{"weight": 0}, {"loss_weight": 0.0}, {"loss": "no"}, {"train": False}, {"trainable": 0}]


@pytest.mark.parametrize("mark", MARKS)
def test_what_is_not_to_be_learnt_is_left_out_of_every_shape_and_told(write, mark):
    row, pair = {"history": ["a"], "candidates": ["b"]}, {"prompt": "a", "completion": "b"}
    mixed = {"utterances": [row | mark, {"history": ["a", "b", "c"], "candidates": ["d"]}]}
    records = [mixed, {"utterances": [row]} | mark, row | mark, pair | mark]
    dialogues, said = read(write("a.jsonl", "\n".join(map(json.dumps, records))))
    assert pairs_of(dialogues) == [(["a", "b", "c"], ["d"])]
    assert [line.split(": ", 1)[1] for line in said] == [
        "utterances whose weight, loss or train says no are left out (1)",
        "records whose weight, loss or train says no are left out (3)",
    ]


def test_a_field_that_is_null_does_not_decide_what_a_record_is(write):
    pair = {"prompt": "a", "completion": "b"}
    others = dict.fromkeys(["messages", "utterances", "dialog"])
    chat = {"messages": None, "conversations": ["a", "b"], "prompt": None, "completion": None}
    dialogues, _ = read(write("a.json", [pair | others, chat]))
    assert pairs_of(dialogues) == [(["a"], ["b"])] * 2
    path = write("b.json", [{"messages": None}])
    assert_user_error(lambda: load_bare(path), ["[0].messages must be a list, not null"])


def test_a_file_may_mix_records_of_all_shapes(write):
    records = [
        {"history": ["a"], "candidates": ["b"], "conv_id": 1},
        {"history": ["a", "b", "c"], "candidates": ["d"], "conv_id": 1},
        {"messages": ["e", "f", "g", "h"]},
        {"prompt": "i", "completion": "j", "label": 1},
        {"prompt": "i", "completion": "k", "label": 0},
        {"utterances": [
            {"history": ["l"], "candidates": ["m"]}, {"history": ["n"], "candidates": ["o"]}
        ]},
        {"prompt": "p", "completion": "q"},
        {"history": ["r"], "candidates": ["s"]},
    ]  # fmt: skip
    turns = {
        (("a",), ("b",)),
        (("a", "b", "c"), ("d",)),
        (("e",), ("f",)),
        (("e", "f", "g"), ("h",)),
        (("i",), ("k", "j")),
        (("l",), ("m",)),
        (("n",), ("o",)),
        (("p",), ("q",)),
        (("r",), ("s",)),
    }
    for number in range(len(records)):
        order = [*records[number:], *records[:number]]
        path = write(f"{number}.jsonl", "\n".join(map(json.dumps, order)))
        dialogues, _ = read(path)
        assert {(tuple(h), tuple(c)) for h, c in pairs_of(dialogues)} == turns
