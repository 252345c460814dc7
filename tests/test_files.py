"""A file is read alike, whether and however it is compressed."""

import bz2
import errno
import gzip
import lzma
import os
from pathlib import Path

import pytest
import zstandard

from convai_fast.errors import UserError
from convai_fast.files import flush, locked, open_bytes, read_json, try_lock

PACK = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
}
# Long enough for many chunks, packed and unpacked.
TEXT = b"".join(b"%d is a line, naturally\n" % (i**5 % 10**9 + 7) for i in range(50_000))


@pytest.fixture
def read(tmp_path):
    def read(content):
        (tmp_path / "file.txt").write_bytes(content)
        with open_bytes(tmp_path / "file.txt") as file:
            return file.read()

    return read


@pytest.mark.parametrize("kind", PACK)
def test_an_archive_is_known_by_what_it_begins_with(read, kind):
    pack = PACK[kind]
    assert read(pack(TEXT)) == TEXT
    assert read(pack(b"")) == b""
    assert read(pack(TEXT) + pack(b"") + pack(b"more")) == TEXT + b"more"  # as `cat` joins them
    assert read(pack(TEXT) + b"\0" * 70_000) == TEXT


@pytest.mark.parametrize("kind", PACK)
def test_lines_come_one_by_one(tmp_path, kind):
    (tmp_path / "lines").write_bytes(PACK[kind](TEXT))
    with open_bytes(tmp_path / "lines") as file:
        assert b"".join(line for line in file if line.endswith(b"\n")) == TEXT
    assert file.closed


@pytest.mark.parametrize("content", [b"", b"B", b"BZh9 is a text\n", b"\x1f", TEXT])
def test_anything_else_is_read_as_it_is(read, content):
    assert read(content) == content


@pytest.mark.parametrize("kind", PACK)
def test_a_damaged_archive_is_one_sentence(read, kind, tmp_path):
    packed = PACK[kind](TEXT)
    middle = len(packed) // 2
    flipped = bytes(byte ^ 255 for byte in packed[middle : middle + 9])
    for damaged in (
        packed[:middle],
        packed[:-1],
        packed[:middle] + flipped + packed[middle + 9 :],
        packed + b"something else",
    ):
        with pytest.raises(UserError, match=rf"file.txt cannot be unpacked as {kind} \(.+\): get"):
            read(damaged)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_bytes(tmp_path / "absent")


def test_a_file_system_that_cannot_flush_a_folder_or_lock_is_no_mistake(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()

    def refuse(number):
        def call(*_):
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    flush(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        flush(file)  # what is in a file must be on the disk
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        flush(tmp_path)
    monkeypatch.setattr("convai_fast.files.fcntl.flock", refuse(errno.ENOLCK))
    with open(file) as opened:
        assert try_lock(opened.fileno())
    monkeypatch.setattr("convai_fast.files.fcntl", None)  # Windows
    with open(file) as opened, locked(tmp_path, "name"):
        assert try_lock(opened.fileno())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file or directory; get a complete copy of it"),
        (b"{", "is not JSON: .*; get a complete copy of it"),
        (b"\xff", "is not JSON: .*; get a complete copy of it"),
        (b"[" * 100_000, "is not JSON: .*; get a complete copy of it"),
        (b"[]", "must hold a JSON object, not a list; get a complete copy of it"),
    ],
)
def test_json_is_an_object_or_one_sentence(tmp_path, content, says):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file} {says}$"):
        read_json(file)
    file.write_bytes(b'{"a": 1}')
    assert read_json(file) == {"a": 1}


def test_json_that_is_missing_or_may_not_be_read_has_its_own_way_out(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^name another one$"):
        read_json(tmp_path / "absent", missing="name another one")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied; get permission for it"):
        read_json(tmp_path / "secret", way_out="restore it", missing="name another one")
