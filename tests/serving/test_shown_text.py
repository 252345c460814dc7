"""The text of a reply as it is shown, token by token."""

import pytest

from convai_fast.serving.shown_text import stream_text
from tests.helpers.small_tokenizers import byte_tokenizer, gpt_tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (gpt_tokenizer(), "i like tea , do you ? yes ."),
        (byte_tokenizer(), "I don't: naïve 日本 🙂👩‍👧\ttoo\n ok"),
    ],
)
def test_pieces_join_to_the_text_and_never_show_half_a_character(tokenizer, text):
    ids, seen = tokenizer.encode(text), []
    pieces = list(stream_text(tokenizer, ids, seen))
    assert "".join(pieces) == text
    assert all(piece and "�" not in piece for piece in pieces)
    assert seen == ids


def test_a_piece_is_shown_as_soon_as_its_token_comes():
    tokenizer = gpt_tokenizer()
    assert list(stream_text(tokenizer, tokenizer.encode("i like tea ."), [])) == [
        "i",
        " like",
        " tea",
        " .",
    ]


def test_a_character_cut_off_by_the_end_of_the_reply_is_left_out():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("tea 日")
    assert "".join(stream_text(tokenizer, ids[:-1], [])) == "tea "


def test_bytes_that_are_no_character_are_shown_as_one_replacement():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer.encode("日")[:2], *tokenizer.encode("tea")]
    assert "".join(stream_text(tokenizer, ids, [])) == "�tea"


def test_spaces_are_not_tidied_away_where_a_tokenizers_file_asks_for_it():
    tokenizer = gpt_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer.encode("i like tea , do you ?")
    assert "".join(stream_text(tokenizer, ids, [])) == "i like tea , do you ?"


def test_spaces_in_front_of_the_first_word_are_left_out():
    tokenizer = byte_tokenizer()
    assert "".join(stream_text(tokenizer, tokenizer.encode("  tea"), [])) == "tea"


def test_a_reply_cannot_drive_the_terminal():
    tokenizer = byte_tokenizer()
    assert "".join(stream_text(tokenizer, tokenizer.encode("a\x1b[2J\r\x07b"), [])) == "a�[2J��b"
