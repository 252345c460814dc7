"""Fields of records: texts that are blank, and lists that are written as text."""

import pytest

from convai_fast.data.readers.fields import is_blank
from tests.helpers.reading import pairs_of, read


@pytest.mark.parametrize(
    "text", ["", " ", "\u200b", "\u00ad\u200e", "\ufe0f", "\u2800", "\u3164", "\x07"]
)
def test_texts_that_nobody_can_see_are_blank(text):
    assert is_blank(text) and not is_blank(f"{text}é")


@pytest.mark.parametrize("text", ["\U0001fae9", "\U0001fadf", "\ue000", "\U0010fffd", "\u0378"])
def test_characters_newer_than_this_python_and_private_ones_are_seen(text):
    assert not is_blank(text)


@pytest.mark.parametrize("text", ["\ufdd0", "\ufdef", "\ufffe", "\U0001ffff", "\U0010fffe"])
def test_what_will_never_be_a_character_is_blank(text):
    assert is_blank(text)


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
