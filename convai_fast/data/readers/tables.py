"""Rows of CSV and TSV files as records: delimiter and header found out."""

import csv
from collections.abc import Callable, Iterable, Iterator

from convai_fast.data.readers.fields import OWN_READER, listed, quote
from convai_fast.errors import UserError

_DELIMITERS = ",;\t|"
_MAX_CELL = 2**31 - 1  # the csv module's default, 131,072 characters, is less than a conversation


def header_of(first_line: str) -> tuple[list[str], str]:
    """The columns that a table's first line names, and the delimiter between them."""
    delimiter = max(_DELIMITERS, key=first_line.count)
    cells = next(csv.reader([first_line], delimiter=delimiter), [])
    return [_clean(cell) for cell in cells], delimiter


def read_rows(
    lines: Iterable[str], name: str, is_known: Callable[[list[str]], bool]
) -> Iterator[tuple[str, dict[str, str] | UserError]]:
    """Yield (where, row by column) of each row; an error in place of a row that is not sound.

    `lines` keep their line ends, of any kind. A first line such as `sep=;` names the delimiter.

    Raises UserError when the columns are none that `is_known` takes, or for quotes that are never
    closed, behind which every row would be lost.
    """
    lines = iter(lines)
    num_before, first, delimiter = 0, "", ""
    for line in lines:
        if line.strip().lower().startswith("sep=") and not first:
            delimiter = line.strip()[4:5]
        elif line.strip():
            first = line
            break
        num_before += 1
    columns, found = header_of(first)
    if not is_known(columns):
        shown = listed(columns) if len(columns) > 1 else quote(first.strip())
        raise UserError(
            f"{name}, line {num_before + 1}: the columns are {shown}, none of the layouts that are "
            "known (user 1 personas, user 2 personas, Best Generated Conversation; or prompt and "
            f"completion, prompt and response, instruction and output): rename them, {OWN_READER}"
        )
    previous = csv.field_size_limit(_MAX_CELL)
    try:
        yield from _rows(lines, delimiter or found, name, num_before + 1, columns)
    finally:
        csv.field_size_limit(previous)


def _rows(
    lines: Iterator[str], delimiter: str, name: str, num_before: int, columns: list[str]
) -> Iterator[tuple[str, dict[str, str] | UserError]]:
    # strict: a quote that is never closed is an error, not one cell with the rest of the file.
    rows = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        where = f"{name}, line {num_before + rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{where}: the record that begins here is not valid CSV ({error}); check that its "
                "quotes are closed"
            ) from None
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(columns):
            yield (
                where,
                UserError(
                    f"{where}: the record that begins here has {len(row)} cells where the header "
                    f"has {len(columns)}; put quotes around cells that hold commas"
                ),
            )
        else:
            yield f"{where}: ", dict(zip(columns, row, strict=True))


def _clean(cell: str) -> str:
    """A column's name in lower case, without spaces of another kind around it or within."""
    return " ".join(cell.replace("\ufeff", "").split()).lower()
