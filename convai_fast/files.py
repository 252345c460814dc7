"""Files and folders: opened whether or not they are compressed, read as JSON, locked, flushed."""

import bz2
import errno
import hashlib
import io
import json
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from convai_fast.errors import UserError, reason_of
from convai_fast.extras import require

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def _zstd_decoder() -> Any:
    import zstandard  # nothing else needs it, and not every machine with a GPU has it

    return zstandard.ZstdDecompressor().decompressobj()


# By what a file of it begins with: a kind of archive, and what makes a decoder of one.
_KINDS: dict[bytes, tuple[str, Callable[[], Any]]] = {
    rb"\x1f\x8b": ("gzip", lambda: zlib.decompressobj(16 + zlib.MAX_WBITS)),
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": ("bzip2", bz2.BZ2Decompressor),
    rb"\xfd7zXZ\x00": ("xz", lzma.LZMADecompressor),
    rb"\x28\xb5\x2f\xfd": ("zstd", _zstd_decoder),
}
_UNFINISHED = ".unfinished.json"  # in a folder that is being filled: the files that are coming
_CHUNK_BYTES = 16 * 1024  # that are read at a time: unpacked, they may be a thousand times as many


def open_bytes(path: Path | str) -> BinaryIO:
    """Open a file to read its bytes, unpacked where it is gzip, bzip2, xz or zstd.

    What it begins with decides, whatever its name.

    Raises:
        OSError: it cannot be read.
        UserError: while it is read, that it is a damaged archive.
    """
    file = open(path, "rb")  # noqa: SIM115
    beginning = file.peek()
    for magic, (kind, new_decoder) in _KINDS.items():
        if re.match(magic, beginning):
            return io.BufferedReader(_Unpacked(path, file, kind, new_decoder))
    return file


class _Unpacked(io.RawIOBase):
    """What is packed in a file, be it one archive or several, one after another."""

    def __init__(
        self, path: Path | str, file: BinaryIO, kind: str, new_decoder: Callable[[], Any]
    ) -> None:
        self._path, self._file, self._kind, self._new_decoder = path, file, kind, new_decoder
        self._decoder: Any = None  # between archives there is none
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_CHUNK_BYTES)
            if not self._packed and not self._decoder:
                return 0
            self._decode()
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _decode(self) -> None:
        packed, self._packed = self._packed, b""
        try:
            if not self._decoder:
                packed = packed.lstrip(b"\0")  # which may fill up the last block of a tape
                if not packed:
                    return
                self._decoder = self._new_decoder()
            if not packed:
                raise EOFError("it ends too early")
            self._unpacked = memoryview(self._decoder.decompress(packed))
        except Exception as error:  # of four libraries, the last of which may not be there
            raise UserError(
                f"{self._path} cannot be unpacked as {self._kind} ({reason_of(error)}): get a "
                "complete copy of it, or unpack it yourself"
            ) from error
        if self._decoder.eof:
            self._packed, self._decoder = self._decoder.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()


def read_json(
    path: Path, way_out: str = "get a complete copy of it", missing: str = ""
) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        way_out: what to do about a file that holds anything else; ends the sentence of the error.
        missing: the sentence where there is no such file, if that means more than a file to get.

    Raises UserError when it cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(missing) from error
        if isinstance(error, PermissionError):
            way_out = "get permission for it"
        raise UserError(f"{path} cannot be read: {error.strerror}; {way_out}") from error
    # A file of nothing but brackets is too deep for the parser.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; {way_out}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} must hold a JSON object, not a {kind}; {way_out}")
    return content


def is_parquet(path: Path | str) -> bool:
    """Whether a file is Parquet; what cannot be opened is none."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def parquet_rows(path: Path | str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The columns of a Parquet file, and its rows, read some at a time.

    Raises UserError without pyarrow, and, also while it is read, for a damaged file.
    """
    require("pyarrow", f"{path} is Parquet, which")
    from pyarrow import ArrowException, parquet

    @contextmanager
    def reading() -> Iterator[None]:
        try:
            yield
        except (ArrowException, OSError, ValueError) as error:  # the last: text that is not UTF-8
            raise UserError(
                f"{path} cannot be read as Parquet ({reason_of(error)}): it is damaged or was cut "
                "short; get it again"
            ) from error

    with reading():
        table = parquet.ParquetFile(path)

    def rows() -> Iterator[dict[str, Any]]:
        with reading():
            for batch in table.iter_batches(1000):
                yield from batch.to_pylist()

    return table.schema_arrow.names, rows()


def fingerprint(*parts: bytes | memoryview) -> str:
    """A hash of bytes, however they are cut into parts: SHA-256, of which 16 digits are enough."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def flush(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, is on the disk.

    Some network file systems cannot wait for a folder; then nothing can.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder(parent: Path | None, prefix: str) -> Iterator[Path]:
    """A folder for what is not complete yet, beside its place, or (None) where temporary files are.

    It goes at the end.

    What is complete by then is not undone where the folder cannot be removed.
    """
    with tempfile.TemporaryDirectory(
        dir=parent, prefix=prefix, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make a file with what `write` writes: complete and on the disk, or not at all.

    Of a symbolic link, what it points to is replaced.
    """
    target = path.resolve()
    with scratch_folder(target.parent, ".writing-") as folder:
        scratch = folder / "file"
        with open(scratch, "wb") as file:
            write(file)
        flush(scratch)
        os.replace(scratch, target)
    flush(target.parent)


def move_whole(folder: Path, place: Path) -> None:
    """Rename a folder that is complete to its place, once all its files are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)
    os.rename(folder, place)
    flush(place.parent)


def fill(folder: Path, place: Path, replaced: Iterable[str] = ()) -> None:
    """Move the files of a folder into one that is there, all or none, in place of `replaced`.

    That may be where the command runs, a mounted disk, or in a folder that cannot be written: then
    it can be filled and not replaced. Of a kill in between `is_empty` knows. Hold `locked_folder`.
    """
    names = sorted(path.name for path in folder.iterdir())
    old = {*replaced, *_unfinished(place)}
    for name in names:
        flush(folder / name)
    coming = json.dumps(sorted({*names, *old})).encode()
    write_whole(place / _UNFINISHED, lambda file: file.write(coming))
    try:
        for name in old - {*names}:
            (place / name).unlink(missing_ok=True)
        for name in names:
            os.replace(folder / name, place / name)
        flush(place)
    except BaseException:
        for name in [*names, _UNFINISHED]:
            with suppress(OSError):
                (place / name).unlink(missing_ok=True)
        raise
    (place / _UNFINISHED).unlink()
    flush(place)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but hidden files, such as .git, or what a kill has left."""
    unfinished = _unfinished(folder)
    return all(path.name.startswith(".") or path.name in unfinished for path in folder.iterdir())


def _unfinished(folder: Path) -> list[str]:
    """The names of the files that a folder was being filled with when it was interrupted."""
    try:
        names = json.loads((folder / _UNFINISHED).read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    return [name for name in names if Path(name).name == name]


def is_free(place: Path) -> bool:
    """Whether a folder can be put there without a loss: nothing is there, or an empty folder."""
    return not place.exists() or (place.is_dir() and is_empty(place))


def check_is_free(place: Path) -> None:
    """Raise UserError unless `is_free`."""
    if not is_free(place):
        raise UserError(f"{place} is there already: name a folder that is not, or is empty.")


@contextmanager
def new_folder(place: Path, prefix: str) -> Iterator[Path]:
    """A path at which to make a folder, which at the end is at `place`, unless an error is raised.

    It appears complete or not at all. `place` must be free then; an empty folder there is filled.
    """
    is_there = place.exists()
    ancestor = next(parent for parent in place.absolute().parents if parent.is_dir())
    with scratch_folder(place if is_there else ancestor, prefix) as scratch:
        staging = scratch / "new"
        yield staging
        if is_there:
            with locked_folder(place):
                check_is_free(place)  # others may have filled it meanwhile
                fill(staging, place)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            move_whole(staging, place)


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file, which lasts until it is closed; False if another has it.

    On a file system without locks everybody gets it.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, in which no file is made for it, while the context lasts."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` of `folder`, which is made where missing, while the context lasts.

    Another process that wants it waits. On a file system without locks nobody does.

    Raises UserError when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f".{name}.lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    with file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
