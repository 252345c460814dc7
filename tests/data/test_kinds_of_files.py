"""Files as people have them: compressed, Parquet, in other encodings; JSON of any size."""

import bz2
import gzip
import io
import json
import lzma

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from reading import assert_user_error, load_bare

from convai_fast.data.readers import json_stream
from convai_fast.data.readers.fields import is_blank
from convai_fast.errors import UserError

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


def test_parquet_is_read(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([RECORD] * 2), path)
    assert load_bare(path) == load_bare(write("a.jsonl", LINES))
    damaged = write("b.parquet", b"PAR1 nothing")
    assert_user_error(lambda: load_bare(damaged), [damaged, "Parquet"])
    latin_1 = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    path = tmp_path / "latin_1.parquet"
    parquet.write_table(pyarrow.table({"prompt": latin_1, "completion": latin_1}), path)
    assert_user_error(lambda: load_bare(path), [path, "Parquet", "0xe9"])


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


LISTS = ["[\n{0}\n]", "[\n{0}\n,{0}\n]", "[\n{0},\n{0},\n{0}\n]"]
DOCUMENTS = [*LISTS, "[{0},\n{0}]", '{{"train": [\n{0}\n]}}', '{{"train": [\n{0},\n{0}\n]\n}}']


@pytest.mark.parametrize(
    ("suffix", "form"),
    [("jsonl", form) for form in LISTS] + [(s, f) for s in ("json", "txt") for f in DOCUMENTS],
)
def test_a_document_may_be_written_a_record_a_line(write, suffix, form):
    record = json.dumps({"prompt": "a", "completion": "b"})
    dialogues = load_bare(write(f"a.{suffix}", form.format(record)))["train"]
    assert len(dialogues) == form.count("{0}")


@pytest.mark.parametrize("suffix", ["json", "txt", "jsonl"])
@pytest.mark.parametrize(
    "broken",
    ["{oops", '{"prompt": "a', '{"prompt": "a"', '{"messages": [', '{"prompt":', '{"prompt": "a",'],
)
def test_lines_of_which_the_first_is_broken_are_lines(write, suffix, broken):
    record = json.dumps({"prompt": "a", "completion": "b"})
    path = write(f"a.{suffix}", "\n".join([broken, record, record]))
    assert_user_error(lambda: load_bare(path), [f"{path}, line 1: this is not valid JSON"])
    assert len(load_bare(path, skip_bad_records=True)["train"]) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=5), st.integers(1, 7), st.sampled_from([None, 1]))
def test_elements_are_those_of_the_whole_document(values, chunk, indent):
    text = json.dumps(values, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        patch.setattr(json_stream.JsonDocument._fill, "__defaults__", (chunk,))
        document = json_stream.JsonDocument(io.StringIO(text), "a.json")
        assert list(document.elements()) == values
        document.end()


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.integers(1, 7))
def test_members_are_those_of_the_whole_document(values, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        patch.setattr(json_stream.JsonDocument._fill, "__defaults__", (chunk,))
        document = json_stream.JsonDocument(io.StringIO(json.dumps(values)), "a.json")
        assert {name: document.value() for name in document.members()} == values


@given(st.text('[]{}",: \n\\u1e', max_size=30))
def test_what_is_no_json_is_an_error_in_its_line(text):
    try:
        json.loads(text)
        return
    except (ValueError, RecursionError):
        pass
    document = json_stream.JsonDocument(io.StringIO(text), "a.json")
    with pytest.raises(UserError, match=r"a\.json, line \d+: "):
        document.value()
        document.end()
