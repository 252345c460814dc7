"""Text files line by line: unpacked and decoded as they are read, whatever is wrong named."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from convai_fast.errors import UserError
from convai_fast.files import open_bytes

_LONGEST_FIRST_LINE = 1 << 24  # characters looked at to recognise a format
_OTHER_FILES = {
    b"PK\x03\x04": "a spreadsheet or a zip archive: save the sheet as CSV, or unpack the archive",
    b"%PDF": "a PDF: copy its text into one of the layouts that are known",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet or document: save it as CSV",
    b"SQLite": "a SQLite database: export the dialogues as JSON lines",
    b"\x93NUMPY": "a NumPy array: write the dialogues as JSON lines",
    b"ARROW1": "an Arrow file: read its folder with the reader hub",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class TextFile:
    """A file of UTF-8 text, read as often as it is asked for.

    Raises UserError when it cannot be read, is empty, or is not text.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with self._reading(), open_bytes(path) as file:
            first = file.read(4096)
        for magic, what in _OTHER_FILES.items():
            if first.startswith(magic):
                raise UserError(f"{path} is no text but {what}")
        if first.startswith(_UTF16) or first.count(b"\0") * 3 > len(first):
            raise UserError(
                f"{path} is text in UTF-16, as PowerShell and some editors write it; save it as "
                "UTF-8 (in PowerShell: Get-Content FILE | Set-Content -Encoding utf8 NEW)"
            )

    @property
    def suffix(self) -> str:
        """The name's extension in lower case, that of a compression left out."""
        suffixes = [s.lower() for s in Path(self.path).suffixes]
        while suffixes and suffixes[-1] in (".gz", ".bz2", ".xz", ".zst"):
            suffixes.pop()
        return suffixes[-1] if suffixes else ""

    def lines(self) -> Iterator[tuple[int, str]]:
        """Number, from 1, and text of each line, without its end and a byte-order mark."""
        with self.opened("\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n").lstrip("\ufeff")

    def rows(self) -> Iterator[str]:
        """Lines with their ends, which may be `\\n`, `\\r\\n` or `\\r`, for a reader of CSV."""
        with self.opened("") as file:
            yield from file

    def first_lines(self, count: int) -> list[str]:
        """The first lines that are not blank, cut to what a format is recognised by.

        Raises UserError where there is none.
        """
        with self.opened("") as file:
            lines = iter(lambda: file.readline(_LONGEST_FIRST_LINE), "")
            found = list(islice((line for line in lines if line.strip("\ufeff \t\r\n")), count))
        if not found:
            raise UserError(f"{self.path} is empty; give a file with dialogues")
        return [line.strip("\ufeff \t\r\n") for line in found]

    @contextmanager
    def opened(self, newline: str | None) -> Iterator[TextIO]:
        """The file as text; errors of reading within the context become UserErrors."""
        with (
            self._reading(),
            open_bytes(self.path) as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text,
        ):
            yield text

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except UnicodeDecodeError:
            raise self._not_utf8() from None
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror}); check its permissions"
            ) from error

    def _not_utf8(self) -> UserError:
        with open_bytes(self.path) as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    return UserError(
                        f"{self.path}, line {number}: the byte 0x{line[error.start]:02x} is not "
                        "UTF-8; save the file as UTF-8 text (a file of an older Windows program is "
                        "often Windows-1252: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW)"
                    )
        return UserError(f"{self.path} is not UTF-8; save the file as UTF-8 text")
