"""One file: its format is recognised by its content, or what was found is named."""

import json

import pytest

from tests.helpers.conversations import (
    CSV,
    MESSAGES,
    PARLAI,
    TEA,
    TEA_DIALOGUE,
    TEA_WITHOUT_CANDIDATES,
)
from tests.helpers.reading import assert_user_error, load_bare


@pytest.mark.parametrize(
    ("content", "expected"),
    [(json.dumps([TEA_DIALOGUE]), TEA), (PARLAI, TEA), (CSV, None), (json.dumps(MESSAGES), None)],
)
def test_content_is_recognised_whatever_the_extension(write, content, expected):
    train = load_bare(write("chat.data", content))["train"]
    assert train[0] == expected if expected else TEA_WITHOUT_CANDIDATES in train


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


RECORD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]}
LINES = f"{json.dumps(RECORD, ensure_ascii=False)}\n" * 2


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
