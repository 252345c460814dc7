"""The dialogue formats: what each is read as."""

import csv
import json

import pytest
from reading import load_bare
from samples import CSV, DOG_DIALOGUE, MESSAGES, PARLAI, SHAREGPT, TEA_DIALOGUE

from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, Utterance

TEA = Dialogue(
    ["i like tea ."],
    [
        Utterance(["hello !"], ["no .", "hi , some tea ?"]),
        Utterance(["hello !", "hi , some tea ?", "yes ."], ["here you are ."]),
    ],
)
TEA_WITHOUT_CANDIDATES = Dialogue(
    ["I like tea.", "I am old."],
    [
        Utterance(["Hello!"], ["Hi, some tea?"]),
        Utterance(["Hello!", "Hi, some tea?", "Yes. Please."], ["Here you are."]),
    ],
)
DOG = Dialogue([], [Utterance(["hey"], ["i have a dog"])])


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


@pytest.mark.parametrize("reader", ["auto", "parlai"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_parlai_text(write, reader, line_end):
    path = write("chat.txt", PARLAI.replace("\n", line_end))
    assert load_bare(path, reader)["train"] == [TEA, DOG]


def test_parlai_silence_opens_a_dialogue_with_an_empty_history(write):
    path = write("chat.txt", "1 __SILENCE__\thi\n2 hello\thow are you ?\n")
    expected = [Utterance([], ["hi"]), Utterance(["hi", "hello"], ["how are you ?"])]
    assert load_bare(path)["train"] == [Dialogue([], expected)]


def test_parlai_number_that_does_not_go_up_begins_a_new_dialogue(write):
    path = write("chat.txt", "3 a\tb\n5 c\td\n2 e\tf\n")
    histories = [[u.history for u in d.utterances] for d in load_bare(path)["train"]]
    assert histories == [[["a"], ["a", "b", "c"]], [["e"]]]


def test_parlai_candidates_without_the_reply_are_distractors(write):
    path = write("chat.txt", "1 hi\tyes\t1\tno|maybe|\n2 so\tyes\t\tyes|no|yes\n")
    utterances = load_bare(path)["train"][0].utterances
    assert [u.candidates for u in utterances] == [["no", "maybe", "yes"], ["no", "yes"]]


def test_parlai_persona_may_stand_in_the_text_behind_escaped_line_breaks(write):
    path = write(
        "chat.txt", "1 your persona: i sing .\\nyour persona: i am old .\\nhi\\nyou\tyes\n"
    )
    expected = Dialogue(["i sing .", "i am old ."], [Utterance(["hi\nyou"], ["yes"])])
    assert load_bare(path)["train"] == [expected]


@pytest.mark.parametrize("reader", ["auto", "csv"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv_gives_both_sides_of_a_conversation(write, reader, line_end, bom):
    path = write("chat.csv", bom + CSV.replace("\n", line_end))
    thirsty = Utterance(["Hello!", "Hi, some tea?"], ["Yes. Please."])
    assert load_bare(path, reader)["train"] == [
        Dialogue(["I am thirsty."], [thirsty]),
        TEA_WITHOUT_CANDIDATES,
    ]


@pytest.mark.parametrize(
    ("lines", "turns"),
    [
        (["User 1: a", "[Later]", "(They eat.)", "* * *", "*At home*", "User 2: b"], ["a", "b"]),
        (["* * *", "Title", "User 1: a", "User 2: b"], ["a", "b"]),
        (["*User 1:* a", "", "*User 2:* *waves*"], ["a", "*waves*"]),
        (["* User 1: a *", "* User 2: b *"], ["a", "b"]),
        (["User 1: (a)", "User 2: *b*"], ["(a)", "*b*"]),
        (["User 1:", "a", "User 2:", "User 2: b", "User 1:"], ["a", "b"]),
        (["User 2: a", "USER 1 : User 2: b"], ["a", "User 2: b"]),
    ],
)
def test_csv_conversations_as_untidy_as_the_real_ones(write, lines, turns):
    header = CSV.split("\n")[0]
    path = write("chat.csv", header + '\np,p,"' + "\n".join(lines) + '"\n')
    assert load_bare(path)["train"] == [Dialogue(["p"], [Utterance(turns[:1], turns[1:])])]


def test_csv_finds_its_columns_in_any_order_and_case(write):
    header = "id,Best generated conversation,User 2 Personas,user 1 personas"
    path = write("chat.csv", f'{header}\n7,"User 1: a\nUser 2: b",q,p\n')
    assert load_bare(path)["train"] == [Dialogue(["q"], [Utterance(["a"], ["b"])])]


def test_csv_conversations_may_be_long(write):
    header, text = CSV.split("\n")[0], "a" * 200_000
    path = write("chat.csv", f'{header}\np,p,"User 1: hi\nUser 2: {text}"\n')
    assert load_bare(path)["train"] == [Dialogue(["p"], [Utterance(["hi"], [text])])]
    assert csv.field_size_limit() == 131_072


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


def test_line_separators_inside_a_json_line_do_not_end_it(write):
    record = {"utterances": [{"history": ["a\u2028b\x85"], "candidates": ["c"]}]}
    path = write("x.jsonl", f"{json.dumps(record, ensure_ascii=False)}\n" * 2)
    assert load_bare(path)["train"][1].utterances[0].history == ["a\u2028b\x85"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [(json.dumps([TEA_DIALOGUE]), TEA), (PARLAI, TEA), (CSV, None), (json.dumps(MESSAGES), None)],
)
def test_content_is_recognised_whatever_the_extension(write, content, expected):
    train = load_bare(write("chat.data", content))["train"]
    assert train[0] == expected if expected else TEA_WITHOUT_CANDIDATES in train
