"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave: a file, an option, a record.

    The message is one sentence that names the file, line, index or field and the way out. The
    command line prints it without a traceback and exits with code 2.
    """


def reason_of(error: BaseException) -> str:
    """The first line of what another library's exception says, short enough for a sentence."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (line if len(line) <= 200 else f"{line[:200]}…").rstrip(".: ")


def shown(value: object) -> str:
    """A value out of a user's file as a sentence quotes it, however long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
