"""What a run keeps of its requests, and where."""

import sqlite3
import tracemalloc
from pathlib import Path

import pytest

from convai_fast.bulk import scratch
from convai_fast.bulk.answers import Answers
from convai_fast.bulk.jsonl import RequestFile
from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.bulk.run import BulkRun
from convai_fast.errors import UserError
from tests.helpers.bulk_files import read_lines, write_lines


class Echo(Answers):
    """Answers at once, and fails every tenth."""

    noun, unit = "reply", "token"

    def answer(self, items, fail):
        for item in items:
            if item.number % 10:
                yield item, {"id": item.id, "replies": []}
            else:
                fail(item, "it is a tenth")


@pytest.fixture
def run(tokenizer):
    def run(path):
        source = RequestFile(path)
        with ReplyFile(path.with_suffix(".replies"), source.settings) as replies:
            BulkRun(Echo(tokenizer), source, replies, report=lambda line: None).run()

    return run


def requests(folder, count):
    """A file of requests of which some repeat an id, and some have none."""
    lines = [{"id": f"{i}"} for i in range(count)]
    lines[3::10] = [{}] * len(lines[3::10])
    lines[5::10] = [{"id": "again"}] * len(lines[5::10])
    return Path(write_lines(folder / f"{count}.jsonl", *lines))


def test_memory_does_not_grow_with_the_requests(run, tmp_path):
    peaks = []
    for path in [requests(tmp_path, count) for count in (10, 400, 1400)]:
        tracemalloc.start()
        try:
            run(path)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[2] - peaks[1] < 1000 * 50  # the bytes of an empty text each


@pytest.mark.parametrize("whose", ["requests", "replies"])
def test_a_temporary_file_without_room_is_one_sentence_and_costs_nothing_that_was_written(
    run, tmp_path, monkeypatch, whose
):
    path = requests(tmp_path, 2000)
    connect, limits = sqlite3.connect, {"requests": [8], "replies": [10_000, 8]}[whose]

    def limited(*given, **options):
        connection = connect(*given, **options)
        connection.execute(f"PRAGMA max_page_count = {limits.pop(0)}")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(scratch.sqlite3, "connect", limited)
        with pytest.raises(UserError, match=r"no room for a .*\(database or disk is full\): make"):
            run(path)
    partial = path.with_suffix(".replies.partial")
    written = read_lines(partial)[1:] if partial.exists() else []
    assert bool(written) == (whose == "replies")
    run(path)
    answered = {record["id"]: record for record in read_lines(path.with_suffix(".replies"))}
    assert all({**record, **answered[record["id"]]} == record for record in written)
    assert len(answered) == 1601  # but for each tenth, and those that repeat an id
