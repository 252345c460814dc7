"""JSON documents and JSON lines, record after record, without holding the file in memory."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from convai_fast.errors import UserError

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
# An id is told from its neighbour by its last digit, which a float loses; but int refuses those of
# more than 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=lambda digits: (int if len(digits) < 1000 else float)(digits))


def parse_line(text: str, name: str, line: int) -> Any:
    """The JSON value in one line; UserError naming line and column."""
    try:
        return _DECODER.decode(text.strip("\ufeff \t\r\n"))
    except json.JSONDecodeError as error:
        left = len(text) - len(text.lstrip("\ufeff \t\r\n")) if error.lineno == 1 else 0
        raise _invalid(name, line + error.lineno - 1, left + error.colno, error.msg) from None
    except RecursionError:
        raise _too_deep(name, line) from None


class JsonDocument:
    """One JSON value, of which the elements of lists can be read one by one.

    Memory is that of the largest element. UserError where the text is not JSON.
    """

    def __init__(self, file: TextIO, name: str) -> None:
        self.file, self.name = file, name
        self.text, self.at = "", 0
        self.line, self.column = 1, 1  # of the first character of `text`
        self.is_complete = False

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it may be empty
            self.at = space.end()
            if self.at < len(self.text) or self.is_complete:
                return self.text[self.at : self.at + 1]
            self._fill()

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                # A number may go on in what has not been read yet: "1" in "12", or in "1.5".
                if self.text[end : end + 1] not in ("", ".", "e", "E") or self.is_complete:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.text) - 100 or "Unterminated" in error.msg
                if self.is_complete or not is_cut:
                    raise self._error(error.msg, error.pos) from None
            except RecursionError:
                raise _too_deep(self.name, self._position(self.at)[0]) from None
            self._fill(size)
            size *= 2  # so that a huge value is not parsed anew for each chunk of it

    def elements(self) -> Iterator[Any]:
        """The elements of the list that comes next."""
        self._expect("[", "a list")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.peek() != ",":
                break
            self.at += 1
        self._expect("]", "a comma or the end of the list")

    def members(self) -> Iterator[str]:
        """The names in the object that comes next; the caller takes the value of each."""
        self._expect("{", "an object")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._error("Expecting property name enclosed in double quotes", self.at)
            name = self.value()
            self._expect(":", "a colon")
            yield name
            if self.peek() != ",":
                break
            self.at += 1
        self._expect("}", "a comma or the end of the object")

    def end(self) -> None:
        """Raise UserError where more follows."""
        if self.peek():
            raise self._error("Extra data", self.at)

    def _expect(self, character: str, what: str) -> None:
        if self.peek() != character:
            raise self._error(f"Expecting {what}", self.at)
        self.at += 1

    def _fill(self, size: int = _CHUNK) -> None:
        used = self.text[: self.at]
        newlines = used.count("\n")
        self.line += newlines
        self.column = len(used) - used.rfind("\n") if newlines else self.column + len(used)
        more = self.file.read(size)
        self.text, self.at = self.text[self.at :] + more, 0
        self.is_complete = not more

    def _position(self, at: int) -> tuple[int, int]:
        before = self.text[:at]
        newlines = before.count("\n")
        column = at - before.rfind("\n") if newlines else self.column + at
        return self.line + newlines, column

    def _error(self, message: str, at: int) -> UserError:
        return _invalid(self.name, *self._position(at), message)


def is_json(text: str) -> bool:
    """Whether `text` is one JSON value."""
    try:
        _DECODER.decode(text.strip("\ufeff \t\r\n"))
    except (ValueError, RecursionError):
        return False
    return True


def goes_on(lines: list[str]) -> bool:
    """Whether the last of `lines` continues the JSON value that those before it begin."""
    text = "\n".join(lines)
    try:
        _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return error.pos > len(text) - len(lines[-1])
    except RecursionError:
        return False
    return True


def _invalid(name: str, line: int, column: int, message: str) -> UserError:
    return UserError(
        f"{name}, line {line}: this is not valid JSON ({message}: column {column}); mend it, or "
        "write the file again if it was cut short"
    )


def _too_deep(name: str, line: int) -> UserError:
    return UserError(
        f"{name}, line {line}: the JSON is nested too deeply to be a dialogue; mend it"
    )
