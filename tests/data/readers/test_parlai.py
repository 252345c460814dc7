"""ParlAI's text formats, as people have them."""

import json

import pytest

from convai_fast.dialogue.dialogue import Dialogue, Utterance
from tests.helpers.conversations import DOG, PARLAI, TEA
from tests.helpers.reading import assert_user_error, load_bare, pairs_of, read


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
