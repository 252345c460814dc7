"""What a run remembers of each request, in temporary files: memory is that of the few under way."""

import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from convai_fast.errors import UserError


def scratch_database(owner: object, tables: str) -> sqlite3.Connection:
    """A database with `tables` for as long as `owner` lives.

    It lies in a temporary file without a name, of which SQLite has some MB in memory.
    """
    connection = sqlite3.connect("", check_same_thread=False)
    weakref.finalize(owner, connection.close)
    connection.executescript(tables)
    return connection


@contextmanager
def room_for_scratch() -> Iterator[None]:
    """Raises UserError where a scratch database finds no room."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(
            f"there is no room for a temporary file about the requests ({error}): make some, or "
            "name a folder with more in TMPDIR, and give the same command again"
        ) from error
