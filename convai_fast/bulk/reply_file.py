"""The file of replies: safe at every moment while it grows, complete or absent in the end.

While a run lasts, `OUTPUT.partial` holds a header and then a line for each request, in the order in
which they were answered. A line is handed to the operating system as soon as it is there, so a
kill costs at most a torn last line, and the next run continues behind the last whole one. At the
end the lines are put in the order of the requests, beside `OUTPUT`, and renamed to it; where
`OUTPUT` is a link, beside what it points to. `OUTPUT.errors.jsonl` holds the bad lines of the
requests, if there are any; each run finds them anew. No other file is touched: what a run writes
meanwhile has no name, or one that nobody else has.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Self

from convai_fast.bulk.jsonl import BadLine
from convai_fast.errors import UserError
from convai_fast.files import try_lock, write_whole
from convai_fast.generation.identified import id_key

_FORMAT = "convai_fast replies 1"


class ReplyFile:
    """Where the replies of a run go; see the top of this file. A context manager.

    `settings` are what the replies depend on, by name: replies that were drawn with other settings
    are not continued. A file that is there is replaced only with `overwrite`. Only ids and
    positions are kept in memory.

    Attributes:
        positions: by `id_key`, where in the partial file the replies to a request begin.

    Raises:
        UserError: a file cannot be written, belongs to other settings, or to a run that goes on.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output = output
        _, self.partial, self.errors = written_paths(output)
        self.positions: dict[str, int] = {}
        self._error_positions: list[tuple[int, int]] = []  # line of the requests, place in the list
        try:
            _check_is_ours(self.errors)
            for folder in (output.parent, output.resolve().parent):  # that of a link's target
                folder.mkdir(parents=True, exist_ok=True)
            self._errors_file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._file = open(self.partial, "ab", buffering=0)  # noqa: SIM115
            self._lock()
            if not overwrite:
                check_absent(output)  # a run may have finished it while this one began
            self._recover(settings)
        except OSError as error:
            raise UserError(
                f"cannot write {error.filename or self.partial}: {error.strerror}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be written has been reported
            self._errors_file.close()
        if not self.positions:  # there is nothing to continue
            self.partial.unlink(missing_ok=True)
        self._file.close()  # last, since it ends the lock

    def add(self, record: dict[str, Any]) -> None:
        """Append the replies to one request; once this returns, a kill cannot lose them."""
        line = _to_line(record)
        with self._writing(self.partial):
            self._append(line)
        self.positions[id_key(record["id"])] = self._end - len(line)

    def add_error(self, bad: BadLine) -> None:
        """Note a line that cannot be answered."""
        record = {name: value for name, value in asdict(bad).items() if value is not None}
        with self._writing(self.errors):
            position = self._errors_file.tell()
            self._errors_file.write(_to_line(record))
        self._error_positions.append((bad.line or 0, position))

    @property
    def num_errors(self) -> int:
        """Bad lines so far."""
        return len(self._error_positions)

    def finish(self, keys: Sequence[str], *, may_be_empty: bool = False) -> None:
        """Put the replies in the order of `keys`, and each file in its place.

        Without any key there is no file of replies, unless it `may_be_empty`.
        """
        with self._writing(self.errors):
            if self._error_positions:
                _write_lines(
                    self.errors, self._errors_file, [at for _, at in sorted(self._error_positions)]
                )
            else:
                self.errors.unlink(missing_ok=True)
        with self._writing(self.output):
            if keys or may_be_empty:
                with open(self.partial, "rb") as source:
                    _write_lines(self.output, source, [self.positions[key] for key in keys])
            self.partial.unlink()

    def _lock(self) -> None:
        if not try_lock(self._file.fileno()):
            raise UserError(
                f"another run is writing {self.partial}: wait for it, or choose another `output`"
            )

    def _recover(self, settings: dict[str, Any]) -> None:
        """Find the replies of earlier runs, and cut off what a kill left half-written."""
        header = {"format": _FORMAT, **settings}
        line = _to_line(header)
        with open(self.partial, "rb") as file:
            first = file.readline()
            if line.startswith(first) and first != line:  # nothing there, or not even the header
                self._file.truncate(0)
                self._end = 0
                self._append(line)
                return
            if first != line:
                raise UserError(self._mismatch(header, first))
            self._end = len(first)
            for line in file:
                key = _key_of(line)
                if key is None:
                    break
                self.positions[key] = self._end
                self._end += len(line)
        self._file.truncate(self._end)

    def _mismatch(self, header: dict[str, Any], line: bytes) -> str:
        try:
            found = json.loads(line)
            is_ours = found["format"] == _FORMAT
        except (ValueError, TypeError, KeyError):
            is_ours = False
        if not is_ours:
            return f"{self.partial} is no file of replies: move it away, or choose another `output`"
        header = json.loads(_to_line(header))  # a tuple becomes a list
        others = [name for name in header | found if header.get(name) != found.get(name)]
        added = (
            " (for lines that were added, make a file of their own)" if "input" in others else ""
        )
        return (
            f"{self.partial} was begun with another {', '.join(others)}: delete it, or choose "
            f"another `output`{added}"
        )

    def _append(self, line: bytes) -> None:
        self._end += len(line)
        while line:  # on a full disk, what fits is written before the error comes
            line = line[self._file.write(line) :]

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; what is there so far is kept in "
                f"{self.partial}, and the same command continues from there"
            ) from error


def check_absent(path: Path, option: str = "output") -> None:
    """Raise UserError if there is something already where `option` wants a file."""
    if path.exists():
        raise UserError(f"{path} is already there: choose another `{option}`, or give `overwrite`")


def written_paths(output: Path) -> tuple[Path, Path, Path]:
    """The files that a run writes: its replies, those so far, and the bad lines."""
    return output, Path(f"{output}.partial"), Path(f"{output}.errors.jsonl")


def _write_lines(path: Path, source: BinaryIO, positions: Iterable[int]) -> None:
    """Make a file of the lines of `source` that begin at `positions`, which appears complete."""

    def write(file: BinaryIO) -> None:
        for position in positions:
            source.seek(position)
            file.write(source.readline())

    write_whole(path, write)


def _check_is_ours(errors: Path) -> None:
    """Raise UserError if there is a file that is no list of bad lines."""
    try:
        with open(errors, "rb") as file:
            names = json.loads(file.readline(1 << 20)).keys()
    except FileNotFoundError:
        return
    except (ValueError, AttributeError):
        names = set()
    if "reason" not in names or names - {"line", "id", "reason"}:
        raise UserError(
            f"{errors} is no list of bad lines: move it away, or choose another `output`"
        )


def _to_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def _key_of(line: bytes) -> str | None:
    """The key of the request that a whole line answers; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        return id_key(json.loads(line)["id"])
    except (ValueError, TypeError, KeyError):
        return None
