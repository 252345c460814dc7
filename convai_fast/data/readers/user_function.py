"""A reader of the user's own: a function, as package.module:function or file.py:function."""

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convai_fast.errors import UserError

_FUNCTION = re.compile(r".+:\w+")


def is_function(reader: str) -> bool:
    """Whether `reader` names a function: code, that is."""
    return _FUNCTION.fullmatch(reader) is not None


def call_function(reader: str, path: str) -> Any:
    """What the function that `reader` names returns for `path`.

    Raises UserError, with the line of the user's code, when it cannot be found or fails.
    """
    module_name, _, function_name = reader.rpartition(":")
    sys.path.insert(0, "")  # the working directory
    try:
        is_file = module_name.endswith(".py")
        with _users_code(f"reader {reader}: importing {module_name}"):
            module = (_import_file if is_file else importlib.import_module)(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise UserError(
                f"reader {reader}: the module has no function {function_name}; mend the name"
            )
        with _users_code(f"reader {reader}: reading {path}"):
            return function(path)
    finally:
        if "" in sys.path:
            sys.path.remove("")


def items_of(values: Iterable[Any], reader: str) -> Iterator[Any]:
    """The items of what the function returned, which may be a generator that fails only now."""
    with _users_code(f"reader {reader}: reading"):
        yield from values


def _import_file(path: str) -> Any:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no file {path} to take a reader from; mend its path")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # there is a loader for every .py file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Make errors of the user's own code UserErrors that name its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # anything can go wrong in code that is not ours
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if not f.filename.startswith("<") and f.filename != __file__]
        place = f" in {theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else ""
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = f"; looked for in {Path.cwd()} and where Python looks: a path works, too"
        raise UserError(
            f"{what} failed{place} ({reason_of_code(error)}){hint}; mend that function or its name"
        ) from error


def reason_of_code(error: Exception) -> str:
    """An exception of somebody else's, as a part of our sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(". ")
