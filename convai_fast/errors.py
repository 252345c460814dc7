"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave: a file, an option, a record.

    The message is one sentence that names the file, line, index or field and the way out. The
    command line prints it without a traceback and exits with code 2.
    """
