"""What a terminal does for who types in it."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_MAX_LINES = 1000


@contextmanager
def line_editing(commands: Sequence[str]) -> Iterator[None]:
    """Give `input` line editing, Tab for `commands`, and a history that outlives the session.

    A history that cannot be read or written is none.
    """
    try:
        import readline
    except ImportError:  # as on Windows
        yield
        return

    def complete(text: str, state: int) -> str | None:
        begins_line = readline.get_begidx() == 0 and text.startswith("/")
        matches = [name for name in commands if begins_line and name.startswith(text)]
        return matches[state] if state < len(matches) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")

    readline.set_history_length(_MAX_LINES)
    with suppress(OSError, RuntimeError):
        readline.read_history_file(_history_file())
    try:
        yield
    finally:
        with suppress(OSError, RuntimeError):
            path = _history_file()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(path)


@contextmanager
def unechoed() -> Iterator[None]:
    """Let keys that are typed meanwhile wait, unseen, for the next `input`."""
    try:
        import termios
    except ImportError:  # as on Windows
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _history_file() -> Path:
    """Its place; RuntimeError for a user without a home."""
    # An XDG folder that is not absolute does not count, says its specification.
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path("~/.local/state").expanduser()
    return state / "convai_fast" / "history"
