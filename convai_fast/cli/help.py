"""What `--help` of a command prints, out of the docstrings of its options."""

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from convai_fast.cli.options.common import ProcessOptions
from convai_fast.cli.parse import ALIASES
from convai_fast.options import Option, options_of

_MOST_COLUMNS = 100
_TEXT_BEGINS = 26
_ATTRIBUTE = re.compile(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", re.MULTILINE)
_KINDS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


def help_of(command: str, options_class: Any) -> str:
    """What `convai-fast COMMAND --help` prints."""
    options = options_of(options_class) | options_of(ProcessOptions)
    lacks: dict[str, str] = getattr(options_class(), "missing", dict)()
    needed = (f"--{_names(name)[0]} {_value(options[name])}" for name in lacks)
    columns = min(_MOST_COLUMNS, shutil.get_terminal_size().columns)
    parts = [f"usage: {' '.join([f'convai-fast {command}', *needed])} [options]"]
    parts += [
        textwrap.fill(" ".join(paragraph.split()), columns)
        for paragraph in (options_class.__doc__ or "").split("\n\n")
    ]
    for group in (*_groups(options_class), ProcessOptions):
        names = [name for name in options_of(group) if name in options]
        if not names:
            continue
        is_all = group is options_class
        title = "Options" if is_all else (group.__doc__ or "").splitlines()[0].rstrip(".")
        texts = dict(_texts(group))
        lines = [_describe(options.pop(name), texts.get(name, ""), columns) for name in names]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def _groups(options_class: Any) -> Iterator[Any]:
    """The classes that are a group of options each: those that have fields of their own."""
    if "__annotations__" in vars(options_class) or options_class.__bases__ == (object,):
        yield options_class
        return
    for base in reversed(options_class.__bases__):  # in the order of fields
        yield from _groups(base)


def _describe(option: Option, text: str, columns: int) -> str:
    flags = ", ".join(f"--{name}" for name in _names(option.name))
    head = f"  {flags} {_value(option)}".rstrip()
    default = option.default
    if option.kind is not bool and default not in (None, "", ()):
        values = map(str, default if option.is_list else [default])
        text = f"{text} (default: {' '.join(values)})"
    indent = " " * _TEXT_BEGINS
    body = textwrap.fill(text, columns, initial_indent=indent, subsequent_indent=indent)
    if len(head) < _TEXT_BEGINS - 1:
        return head + body[len(head) :]
    return f"{head}\n{body}"


def _names(name: str) -> list[str]:
    """The names of an option, the one that the documentation uses first."""
    aliases = [alias for alias, own in ALIASES.items() if own == name]
    return [*aliases, name] if name == "dataset_path" else [name, *aliases]


def _value(option: Option) -> str:
    if option.kind is bool:
        return ""
    kind = "|".join(option.choices) or _KINDS[option.kind]
    return f"{kind} …" if option.is_list else kind


def _texts(options_class: Any) -> Iterator[tuple[str, str]]:
    """What is said of each field, by its docstring or by its class's, on one line."""
    for base in reversed(options_class.__mro__[:-1]):
        for name, text in _ATTRIBUTE.findall((base.__doc__ or "").partition("Attributes:\n")[2]):
            yield name, " ".join(text.split())
        source = textwrap.dedent(inspect.getsource(base))
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for pair in pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    yield name, " ".join(text.split())
    for hint in get_type_hints(options_class).values():
        if hasattr(hint, "__dataclass_fields__"):
            yield from _texts(hint)
