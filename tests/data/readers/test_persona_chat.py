"""Synthetic-Persona-Chat's CSV."""

import csv

import pytest

from convai_fast.dialogue.dialogue import Dialogue, Utterance
from tests.helpers.conversations import CSV, TEA_WITHOUT_CANDIDATES
from tests.helpers.reading import load_bare


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
