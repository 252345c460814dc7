"""The file of replies: safe at every moment while it grows, complete or absent in the end.

While a run lasts, `OUTPUT.partial` holds a header and then a line for each request, in the order in
which they were answered, with the number of the request before what `OUTPUT` will hold. A line is
handed to the operating system as soon as it is there, so a kill costs at most a torn last line, and
the next run continues behind the last whole one. At the end the lines are put in the order of the
requests, beside `OUTPUT`, and renamed to it; where `OUTPUT` is a link, beside what it points to.
`OUTPUT.errors.jsonl` holds the bad lines of the requests, if there are any; each run finds them
anew. No other file is touched: what a run writes meanwhile has no name, or one that nobody else
has.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

from convai_fast.bulk.scratch import room_for_scratch, scratch_database
from convai_fast.errors import UserError
from convai_fast.files import try_lock, write_whole

_FORMAT = "convai_fast replies 2"
_NUMBER = "number"  # what a line of the partial file begins with, and one of the output does not
# By the number of the request: where its line begins in the partial file, or why there is none.
_TABLES = """
CREATE TABLE replies (number INTEGER PRIMARY KEY, position INTEGER);
CREATE TABLE errors (number INTEGER PRIMARY KEY, line BLOB);
"""


class ReplyFile:
    """Where the replies of a run go; see the top of this file. A context manager.

    `settings` are what the replies depend on, by name: replies that were drawn with other settings
    are not continued. A file that is there is replaced only with `overwrite`.

    Attributes:
        num_replies, num_errors: requests with replies, also of earlier runs, and bad lines, so far.

    Raises:
        UserError: a file cannot be written, belongs to other settings, or to a run that goes on.
    """

    @room_for_scratch()
    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output = output
        _, self.partial, self.errors = written_paths(output)
        self.num_replies = self.num_errors = 0
        self._scratch = scratch_database(self, _TABLES)
        try:
            _check_is_ours(self.errors)
            for folder in (output.parent, output.resolve().parent):  # that of a link's target
                folder.mkdir(parents=True, exist_ok=True)
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
        if not self.num_replies:  # there is nothing to continue
            self.partial.unlink(missing_ok=True)
        self._file.close()  # last, since it ends the lock

    def __contains__(self, number: int) -> bool:
        """Whether there are replies to the request with this number."""
        found = self._scratch.execute("SELECT 1 FROM replies WHERE number = ?", (number,))
        return found.fetchone() is not None

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Append the replies to one request; once this returns, a kill cannot lose them."""
        line = _to_line({_NUMBER: number, **record})
        position = self._end
        with self._writing(self.partial):
            self._append(line)
        self.num_replies += 1
        self._note(number, position)

    def add_error(self, number: int, record: dict[str, Any]) -> None:
        """Note why the request with this number cannot be answered."""
        self._scratch.execute("INSERT INTO errors VALUES (?, ?)", (number, _to_line(record)))
        self.num_errors += 1

    def finish(self, *, may_be_empty: bool = False) -> None:
        """Put replies and errors in the order of the requests, and each file in its place.

        Without any reply there is no file of replies, unless it `may_be_empty`.
        """
        with self._writing(self.errors):
            if self.num_errors:
                lines = self._scratch.execute("SELECT line FROM errors ORDER BY number")
                write_whole(self.errors, lambda file: file.writelines(line for (line,) in lines))
            else:
                self.errors.unlink(missing_ok=True)
        with self._writing(self.output):
            if self.num_replies or may_be_empty:
                write_whole(self.output, self._write_replies)
            self.partial.unlink()

    def _write_replies(self, file: BinaryIO) -> None:
        positions = self._scratch.execute("SELECT position FROM replies ORDER BY number")
        with open(self.partial, "rb") as source:
            for (position,) in positions:
                source.seek(position)
                _, _, rest = source.readline().partition(b", ")  # behind the number
                file.write(b"{" + rest)

    def _note(self, number: int, position: int) -> None:
        self._scratch.execute("REPLACE INTO replies VALUES (?, ?)", (number, position))

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
                number = _number_of(line)
                if number is None:
                    break
                self._note(number, self._end)
                self._end += len(line)
        (self.num_replies,) = self._scratch.execute("SELECT count(*) FROM replies").fetchone()
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


def _number_of(line: bytes) -> int | None:
    """The number of the request that a whole line answers; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)[_NUMBER])
    except (ValueError, TypeError, KeyError):
        return None
