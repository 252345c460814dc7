"""Text files as people have them: compressed, in other encodings."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard

from tests.helpers.reading import assert_user_error, load_bare

RECORD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]}
LINES = f"{json.dumps(RECORD, ensure_ascii=False)}\n" * 2
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("kind", PACKERS)
def test_compressed_files_and_folders_are_read(write, kind):
    expected = load_bare(write("plain.jsonl", LINES))
    packed = PACKERS[kind](LINES.encode())
    path = write(f"f/train.jsonl.{kind}", packed)
    assert load_bare(path) == load_bare(path.parent) == expected
    assert load_bare(write("named_otherwise", packed)) == expected
    cut = write("cut.jsonl", packed[: len(packed) * 2 // 3])
    assert_user_error(lambda: load_bare(cut), [cut])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LINES.encode("utf-16"), "is text in UTF-16"),
        (LINES.encode("cp1252"), "line 1: the byte 0xe9 is not UTF-8"),
        (b"PK\x03\x04 a workbook", "a spreadsheet or a zip archive"),
    ],
)
def test_what_is_no_utf8_text_is_named(write, content, says):
    path = write("a.jsonl", content)
    assert_user_error(lambda: load_bare(path), [path, says])


def test_byte_order_marks_do_not_matter_anywhere(write):
    line = json.dumps(RECORD, ensure_ascii=False)
    path = write("a.jsonl", f"\ufeff{line}\r\n\ufeff{line}\r\n")
    assert load_bare(path) == load_bare(write("b.jsonl", LINES))


def test_line_separators_inside_a_json_line_do_not_end_it(write):
    record = {"utterances": [{"history": ["a\u2028b\x85"], "candidates": ["c"]}]}
    path = write("x.jsonl", f"{json.dumps(record, ensure_ascii=False)}\n" * 2)
    assert load_bare(path)["train"][1].utterances[0].history == ["a\u2028b\x85"]
