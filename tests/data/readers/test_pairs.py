"""Plain pairs, in JSON and in tables."""

import json

import pytest

from tests.helpers.reading import assert_user_error, load_bare, pairs_of, read


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
     ("question", "answer")],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "semicolons.csv"])
def test_pairs_are_dialogues_of_one_turn(write, prompt, reply, suffix):
    if suffix == "jsonl":
        row = json.dumps({prompt: "hi", reply: "yes , hi", "persona": "i sing ."})
        path = write("a.jsonl", f"{row}\n{row}\n")
    else:
        d = {"csv": ",", "tsv": "\t", "semicolons.csv": ";"}[suffix]
        row = f'hi{d}"yes , hi"{d}i sing .\n'
        path = write(
            f"a.{suffix}", f"sep={d}\n\ufeff {prompt} {d}{reply}{d}\u00a0persona\n{row * 2}"
        )
    dialogues, _ = read(path)
    assert pairs_of(dialogues) == [(["hi"], ["yes , hi"])] * 2
    assert dialogues[0].personality == ["i sing ."]


def test_labelled_bad_replies_become_distractors_of_good_ones(write):
    path = write(
        "a.csv",
        "prompt,response,label\nhi,hello,1\nhi,go away,0\nbye,no,0\nwhere ?,here,1\n",
    )
    dialogues, said = read(path)
    assert pairs_of(dialogues) == [(["hi"], ["go away", "hello"]), (["where ?"], ["here"])]
    assert {line.split(": ", 1)[1] for line in said} == {
        "replies labelled as bad are distractors (1)",
        "replies labelled as bad have no good one to their prompt and are left out (1)",
    }


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("label", "is_learnt"),
    [("0", False), ("0.0", False), ("False", False), ("no", False), ("bad", False),
     ("1.0", True), ("yes", True), ("0.5", True), ("", True), ("nan", True), ("sad", True)],
)  # fmt: skip
def test_a_label_says_no_in_all_ways_that_tables_have(write, suffix, label, is_learnt):
    rows = [{"prompt": "hi", "response": text, "label": label} for text in ("go away", "hello")]
    rows[1]["label"] = "1"
    if suffix == "csv":
        lines = ["prompt,response,label", *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    dialogues, said = read(write(f"a.{suffix}", "\n".join(lines)))
    replies = sorted(candidates for _, candidates in pairs_of(dialogues))
    assert replies == ([["go away"], ["hello"]] if is_learnt else [["go away", "hello"]])
    not_understood = "the field 'label' says neither yes nor no and is not used (1)"
    assert any(not_understood in line for line in said) == (label in ("sad", "nan"))


@pytest.mark.parametrize(
    ("history", "turns"),
    [
        ([["a", "b "], ["c", "d"]], ["a", "b", "c", "d"]),
        (["a", "b"], ["a", "b"]),
        ([], []),
        (None, []),
        ("", []),
    ],
)
@pytest.mark.parametrize("names", [("instruction", "output"), ("prompt", "response")])
def test_the_history_of_a_pair_stands_before_its_prompt(write, history, turns, names):
    record = dict(zip(names, ("hi", "hello"), strict=True)) | {"history": history}
    dialogues, _ = read(write("a.json", [record]))
    assert pairs_of(dialogues) == [([*turns, "hi"], ["hello"])]


@pytest.mark.parametrize(
    ("history", "says"),
    [
        ("a", "history must be a list, not text"),
        ([["a"]], "history must be a list of texts, or of pairs of texts"),
        ([{"role": "user"}], "history must be a list of texts, or of pairs of texts"),
        (["a", ["b", "c"]], "history must be a list of texts, or of pairs of texts"),
        ([["a", None]], "history[0][1] must be text, not null"),
    ],
)
def test_another_history_of_a_pair_is_named(write, history, says):
    path = write("a.json", [{"prompt": "hi", "response": "hello", "history": history}])
    assert_user_error(lambda: load_bare(path), [f"{path}: [0].{says}"])


def test_a_distractor_that_equals_the_reply_is_left_out(write):
    records = [
        {"prompt": "hi", "completion": "Hello !", "distractors": ["no", "hello  !"]},
        {"prompt": "bye", "completion": "ciao", "label": 1},
        {"prompt": "bye", "completion": " CIAO", "label": 0},
    ]
    dialogues, said = read(write("a.json", records))
    assert pairs_of(dialogues) == [(["hi"], ["no", "Hello !"]), (["bye"], ["ciao"])]
    assert any("distractors that equal the true reply are left out (2)" in s for s in said)


def test_an_instruction_goes_with_its_input(write):
    row = {"instruction": "Greet.", "input": "Ann", "output": "Hello, Ann."}
    dialogues, _ = read(write("a.jsonl", f"{json.dumps(row)}\n{json.dumps(row | {'input': ''})}\n"))
    assert [history for history, _ in pairs_of(dialogues)] == [["Greet.\nAnn"], ["Greet."]]
