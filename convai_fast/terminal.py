"""What is told on the terminal, whose other end may close at any moment.

Ctrl-C under `convai-fast train … 2>&1 | tee log` ends `tee` first. What is said then is lost, but
the run must still save.
"""

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line on the standard output, or where that is closed on the standard error."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """1 reply, 2 replies."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"


def progress_bar(items: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A bar on the standard error, in a log a line each half minute; `settings` as in tqdm."""
    stream: Any
    often: dict[str, Any]
    if sys.stderr.isatty():
        stream, often = _Unbroken(sys.stderr), {"mininterval": 0.5, "dynamic_ncols": True}
    else:
        stream, often = _Lines(sys.stderr), {"mininterval": 30, "delay": 30}
    return tqdm(items, file=stream, **often, **settings)


class _Unbroken:
    """A stream to which writing does not fail when nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(BrokenPipeError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Lines(_Unbroken):
    """One where a bar that is drawn again is another line."""

    def write(self, text: str) -> None:
        if drawn := text.strip():
            super().write(f"{drawn}\n")
