import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.errors import UserError

SETTINGS = {"input": "0123", "temperature": 0.7, "stop": (".",)}
IDS = ["a", 1, "1", 2.5, "naïve 🙂", "line\nbreak", "{", 0]


def record(id):
    return {"id": id, "replies": [{"text": f"to {id}\n"}]}


def add(replies, id):
    replies.add(IDS.index(id), record(id))


def content(output):
    return output.read_bytes() if output.exists() else None


def complete(output, order=IDS):
    """Do what a run does: answer, in some order, what is not answered yet."""
    with ReplyFile(output, SETTINGS, overwrite=True) as replies:
        for id in order:
            if IDS.index(id) not in replies:
                add(replies, id)
        replies.finish()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "replies.jsonl"
    complete(output)
    return output.read_bytes()


def test_the_replies_come_in_the_order_of_the_requests(tmp_path, undisturbed):
    lines = undisturbed.decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [record(id) for id in IDS]
    assert lines[-1] == ""
    complete(tmp_path / "replies.jsonl", order=IDS[::-1])
    assert content(tmp_path / "replies.jsonl") == undisturbed
    assert os.listdir(tmp_path) == ["replies.jsonl"]


def test_replies_are_on_disk_once_added_and_the_output_only_in_the_end(tmp_path):
    output = tmp_path / "replies.jsonl"
    with ReplyFile(output, SETTINGS) as replies:
        for done, id in enumerate(IDS, start=1):
            add(replies, id)
            _, *lines = replies.partial.read_bytes().split(b"\n")[:-1]
            assert [json.loads(line) for line in lines] == [
                {"number": number, **record(id)} for number, id in enumerate(IDS[:done])
            ]
            assert not output.exists()
        replies.finish()
        assert output.exists()
        assert not replies.partial.exists()


def test_a_partial_file_torn_at_any_byte_is_continued_to_the_same_file(tmp_path, undisturbed):
    whole = tmp_path / "whole.jsonl"
    with ReplyFile(whole, SETTINGS) as replies:
        for id in IDS[::-1]:
            add(replies, id)
    partial = replies.partial.read_bytes()
    output = tmp_path / "replies.jsonl"
    for cut in range(len(partial) + 1):
        (tmp_path / "replies.jsonl.partial").write_bytes(partial[:cut])
        with ReplyFile(output, SETTINGS) as replies:
            kept = max(partial.count(b"\n", 0, cut) - 1, 0)
            assert replies.num_replies == kept
            assert [id in replies for id in reversed(range(len(IDS)))] == [
                place < kept for place in range(len(IDS))
            ]
        complete(output)
        assert content(output) == undisturbed
        output.unlink()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_number_of_interruptions_leave_the_same_file(tmp_path_factory, undisturbed, data):
    output = tmp_path_factory.mktemp("torn") / "replies.jsonl"
    for _ in range(data.draw(st.integers(1, 4))):
        with ReplyFile(output, SETTINGS) as replies:
            left = [id for number, id in enumerate(IDS) if number not in replies]
            for id in data.draw(st.permutations(left))[: data.draw(st.integers(0, len(left)))]:
                add(replies, id)
            size = replies.partial.stat().st_size
        if not replies.num_replies:
            assert not replies.partial.exists()  # there is nothing to continue
            continue
        os.truncate(replies.partial, size - data.draw(st.integers(0, min(40, size))))
        if b"\n" in replies.partial.read_bytes():
            # A file system that lost power may leave zeros where the last write was.
            with open(replies.partial, "ab") as file:
                file.write(data.draw(st.sampled_from([b"", b"\0" * 9, b"\0\n", b"{}\n", b"3\n"])))
    complete(output)
    assert content(output) == undisturbed


def test_replies_drawn_otherwise_are_not_continued(tmp_path):
    output = tmp_path / "replies.jsonl"
    with ReplyFile(output, SETTINGS) as replies:
        add(replies, "a")
    before = content(replies.partial)
    with pytest.raises(UserError, match="begun with another temperature, n: delete it, or"):
        ReplyFile(output, {**SETTINGS, "temperature": 0.8, "n": 2})
    assert content(replies.partial) == before


@pytest.mark.parametrize("text", ["important\n", "important", "[]\n", '{"a": 1}\n'])
def test_a_file_of_somebody_else_is_left_alone(tmp_path, text):
    partial = tmp_path / "replies.jsonl.partial"
    partial.write_text(text)
    with pytest.raises(UserError, match="is no file of replies: move it away"):
        ReplyFile(tmp_path / "replies.jsonl", SETTINGS)
    assert partial.read_text() == text


def test_two_runs_at_once_do_not_write_the_same_file(tmp_path):
    output = tmp_path / "replies.jsonl"
    with ReplyFile(output, SETTINGS), pytest.raises(UserError, match="another run is writing"):
        ReplyFile(output, SETTINGS)
    complete(output)


def test_bad_lines_are_listed_anew_by_each_run_and_the_list_goes_with_the_last(tmp_path):
    output = tmp_path / "replies.jsonl"
    errors = tmp_path / "replies.jsonl.errors.jsonl"
    for _ in range(2):  # interrupted the first time
        with ReplyFile(output, SETTINGS) as replies:
            replies.add_error(2, {"line": 2, "reason": "so is this"})
            replies.add_error(1, {"line": 1, "id": "ä", "reason": "it is bad"})
            assert replies.num_errors == 2
            assert not errors.exists()
            if replies.num_replies:
                replies.finish()
            else:
                add(replies, IDS[0])
    assert errors.read_text("utf-8") == (
        '{"line": 1, "id": "ä", "reason": "it is bad"}\n{"line": 2, "reason": "so is this"}\n'
    )
    complete(output)
    assert os.listdir(tmp_path) == ["replies.jsonl"]


def test_without_a_reply_there_is_a_list_of_bad_lines_and_no_file_of_replies(tmp_path):
    with ReplyFile(tmp_path / "replies.jsonl", SETTINGS) as replies:
        replies.add_error(1, {"line": 1, "reason": "it is bad"})
        replies.finish()
    assert os.listdir(tmp_path) == ["replies.jsonl.errors.jsonl"]


def test_the_folder_of_the_output_is_made_and_one_that_cannot_be_is_named(tmp_path):
    complete(tmp_path / "a" / "b" / "replies.jsonl")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file"):
        ReplyFile(tmp_path / "file" / "replies.jsonl", SETTINGS)


def test_what_another_run_finished_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "replies.jsonl"
    output.write_text("those of another run\n")
    with pytest.raises(UserError, match="already there: choose another `output`"):
        ReplyFile(output, {"seed": 1})
    with ReplyFile(output, {"seed": 1}, overwrite=True) as replies:
        replies.add(1, {"id": 1})
        replies.finish()
    assert output.read_text() == '{"id": 1}\n'
