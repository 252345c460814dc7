"""ParlAI's formats, the forks' JSON, plain pairs and tables, as people have them."""

import json

import pytest
from reading import assert_user_error, load_bare

from convai_fast.data.readers import load_dialogues


def read(path, reader="auto", **options):
    said = []
    return load_bare(path, reader, report=said.append, **options)["train"], said


def pairs_of(dialogues):
    return [(list(u.history), u.candidates) for d in dialogues for u in d.utterances]


# ---- ParlAI -----------------------------------------------------------------------------------


def test_labelled_lines_are_read_an_episode_at_a_time(write):
    path = write(
        "a.txt",
        "text:your persona: i sing .\\nhello !\tlabels:hi\n"
        "labels:a|b\ttext:and ?\tlabel_candidates:no|a|b|yes\tepisode_done:True\n"
        "text:new\teval_labels:day\tepisode_done:True\n",
    )
    dialogues, said = read(path)
    assert [d.personality for d in dialogues] == [["i sing ."], []]
    assert pairs_of(dialogues) == [
        (["hello !"], ["hi"]),
        (["hello !", "hi", "and ?"], ["no", "yes", "a"]),
        (["new"], ["day"]),
    ]
    assert any("of several labels of a turn, the first is learnt (1)" in line for line in said)


def test_conversations_of_parlai_teach_the_second_speaker(write):
    turns = [{"id": i, "text": text} for i, text in [("s1", "a"), ("s2", "b"), ("s1", "c")]]
    path = write("a.jsonl", json.dumps({"dialog": [turns[:2], turns[2:]]}) + "\n" * 2)
    assert pairs_of(read(path)[0]) == [(["a"], ["b"])]


def test_silence_is_no_turn_and_its_speaker_goes_on(write):
    path = write(
        "a.txt", "1 __SILENCE__\thello\n2 hi\ti sing .\n3 __SILENCE__\tdo you ?\n4 no\tsad\n"
    )
    assert pairs_of(read(path)[0]) == [
        ([], ["hello"]),
        (["hello", "hi"], ["i sing . do you ?"]),
        (["hello", "hi", "i sing . do you ?", "no"], ["sad"]),
    ]


def test_a_reply_of_several_lines_has_the_distractors_of_all_of_them(write):
    path = write("a.txt", "1 hi\tyes ,\t\tno|yes ,\n2 __SILENCE__\thi\t\tbye|__SILENCE__|hi\n")
    assert pairs_of(read(path)[0]) == [(["hi"], ["no", "bye", "yes , hi"])]


@pytest.mark.parametrize(
    "text",
    [
        "1 a\tb\n2 bye\t__SILENCE__\t\tno|__SILENCE__\n3 now\tc\t\t__SILENCE__|d|c\n",
        "text:a\tlabels:b\ntext:bye\tlabels:__SILENCE__\n"
        "text:now\tlabels:__SILENCE__|c\tlabel_candidates:__SILENCE__|d\n",
    ],
)
def test_silence_is_no_reply_and_no_distractor(write, text):
    expected = [(["a"], ["b"]), (["a", "b", "bye now"], ["d", "c"])]
    assert pairs_of(read(write("a.txt", text))[0]) == expected


def test_a_bar_inside_a_true_reply_makes_no_distractors_of_its_parts(write):
    path = write("a.txt", "1 hi\tyes | no\t\tmaybe|yes | no|never\n")
    assert pairs_of(read(path)[0]) == [(["hi"], ["maybe", "never", "yes | no"])]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 your persona:\ti bake .\n2 a\tb\n", "line 1: a tab stands inside or behind a persona"),
        ("1 hello    hi\n2 a\tb\n", "line 1: there is no tab"),
        ("1 a fact\n2 another\n3 a\tb\n", "line 1: there is no tab"),
    ],
)
def test_an_untidy_line_is_named(write, text, says):
    path = write("a.txt", text)
    assert_user_error(lambda: load_bare(path, "parlai"), [f"{path}, {says}"])


def test_a_last_text_that_nobody_answers_is_left_out(write):
    dialogues, said = read(write("a.txt", "1 a\tb\n2 bye\n1 c\td\n"))
    assert pairs_of(dialogues) == [(["a"], ["b"]), (["c"], ["d"])]
    assert any("last texts that nobody answers are left out (1)" in line for line in said)


def test_the_partners_persona_is_no_persona(write):
    path = write("a.txt", "1 your persona: i bake .\n2 partner's persona: i sail .\n3 a\tb\n")
    assert read(path)[0][0].personality == ["i bake ."]


def test_the_files_of_convai2_in_a_folder_are_found(write):
    write("c/train_self_original.txt", "1 a\tb\n")
    write("c/train_both_revised.txt", "1 x\ty\n")
    folder = write("c/valid_self_original.txt", "1 c\td\n").parent
    splits = load_dialogues(folder, num_candidates=1)
    assert {s: pairs_of(ds) for s, ds in splits.items()} == {
        "train": [(["a"], ["b"])],
        "valid": [(["c"], ["d"])],
    }


# ---- the predecessor's JSON -------------------------------------------------------------------

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


# ---- pairs and tables -------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("['i like tea .', \"i'm old .\"]", ["i like tea .", "i'm old ."]),
        ('["no", "nope"]', ["no", "nope"]),
        ("[]", []),
        ("[laughs] no", ["[laughs] no"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[" * 9000, ["[" * 9000]),
    ],
)
def test_a_cell_may_hold_a_list(write, cell, texts):
    row = ",".join('"' + text.replace('"', '""') + '"' for text in (cell, "hi", "hello", cell))
    dialogues, _ = read(write("a.csv", f"persona,prompt,response,distractors\n{row}\n"))
    assert dialogues[0].personality == texts
    assert pairs_of(dialogues) == [(["hi"], [*texts, "hello"])]


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


def test_rows_of_conversations_with_long_numbers_stay_apart(write):
    ids = [2**60, 2**60 + 1, "9" * 5000]
    rows = [
        f'{{"history": ["a{i}"], "candidates": ["b"], "conv_id": {conversation}}}'
        for i, conversation in enumerate(ids)
    ]
    dialogues, _ = read(write("a.jsonl", "\n".join(rows)))
    assert len(dialogues) == 3


def test_an_instruction_goes_with_its_input(write):
    row = {"instruction": "Greet.", "input": "Ann", "output": "Hello, Ann."}
    dialogues, _ = read(write("a.jsonl", f"{json.dumps(row)}\n{json.dumps(row | {'input': ''})}\n"))
    assert [history for history, _ in pairs_of(dialogues)] == [["Greet.\nAnn"], ["Greet."]]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.json", {"t_1": {"content": []}}, "train is missing (found are 't_1')"),
        ("a.csv", "id,text\n1,a\n", "the columns are 'id', 'text'"),
        ("a.txt", "12/03, 09:15 - Ann: Hello\n", "its first line, '12/03, 09:15 - Ann: Hello'"),
        ("a.jsonl", '{"tree": 1}\n{"tree": 2}\n', "the fields are 'tree'"),
    ],
)
def test_other_layouts_are_named_by_what_was_found_with_a_way_out(write, name, content, found):
    path = write(name, content)
    parts = [path, found, "a function of your own, reader my_module:load or my_file.py:load"]
    assert_user_error(lambda: load_bare(path), parts)


def test_a_function_may_be_named_by_the_path_of_its_file(write):
    reader = write(
        "sub/mine.py", "def load(path):\n    yield {'prompt': 'a', 'completion': path}\n"
    )
    dialogues, _ = read("anything", f"{reader}:load")
    assert pairs_of(dialogues) == [(["a"], ["anything"])]
