"""What a command line and a file of options say, as the options of a command."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convai_fast.cli.options.common import ProcessOptions
from convai_fast.errors import UserError, shown
from convai_fast.options import Option, build, meant, options_of, read_options

# Second names of options.
ALIASES = {"data": "dataset_path", "model_checkpoint": "model", "n": "num_return"}

_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


def parse(options_class: Any, words: Sequence[str]) -> tuple[Any, ProcessOptions, frozenset[str]]:
    """The options of a command, those of all commands, and the names of all that were given.

    What the words give counts over what the file of --config gives.

    Raises UserError at the first word, or line of the file, that cannot be understood, and for code
    that the file alone names.
    """
    options = options_of(options_class) | options_of(ProcessOptions)
    given = _given(options, words)
    if "config" in given:
        file = given["config"]
        values = read_options(file, options, ALIASES)
        if "config" in values:
            raise UserError(f"{file}: config can only be given on the command line: leave it out")
        if "reader" not in given:
            _check_no_code(file, values.get("reader", ()))
        given = values | given
    return build(options_class, given), build(ProcessOptions, given), frozenset(given)


def _check_no_code(file: Path, readers: Sequence[str]) -> None:
    """Raise UserError where the file, which may come from anybody, names a function as a reader."""
    from convai_fast.data.readers.user_function import is_function  # --help does not wait for it

    if any(map(is_function, readers)):
        reader = " ".join(readers)
        raise UserError(
            f"{file} names the reader {reader}, which is code: give `reader` {reader} on the "
            "command line, too, to allow it"
        )


def _given(options: Mapping[str, Option], words: Sequence[str]) -> dict[str, Any]:
    """The values that the words give, by the options' own names."""
    given: dict[str, Any] = {}
    named: dict[str, str] = {}  # how
    left = list(words)
    while left:
        option, flag, attached = _option(options, left.pop(0))
        if option.is_list:
            texts = _values_of_list(left) if attached is None else [attached]
            if not texts:
                raise UserError(f"{flag} needs a value: {option.what_it_is}, or several")
            found = tuple(_value(option, flag, text) for text in texts)
            given[option.name] = given.get(option.name, ()) + found
            continue
        if option.name in given:
            twice = f"{named[option.name]} and {flag} are the same option"
            if named[option.name].replace("-", "_") == flag.replace("-", "_"):
                twice = f"{flag} is given twice"
            raise UserError(f"{twice}: give it once")
        named[option.name] = flag
        if attached is None and option.kind is bool:
            attached = "true"
        elif attached is None:
            if not left or _FLAG.fullmatch(left[0]):
                raise UserError(f"{flag} needs a value: {option.what_it_is}")
            attached = left.pop(0)
        given[option.name] = _value(option, flag, attached)
    return given


def _option(options: Mapping[str, Option], word: str) -> tuple[Option, str, str | None]:
    """The option that a word names, how it names it, and the value after its equals sign."""
    match = _FLAG.fullmatch(word)
    if match is None:
        raise UserError(f"{shown(word)} belongs to no option: name the option before it")
    name = match[1].replace("-", "_")
    if (option := options.get(ALIASES.get(name, name))) is None:
        known = [*options, *(alias for alias, own in ALIASES.items() if own in options)]
        near = meant(name, known).replace(" mean ", " mean --")
        raise UserError(f"there is no option --{match[1]}{near or ': see --help'}")
    return option, f"--{match[1]}", match[2]


def _values_of_list(left: list[str]) -> list[str]:
    """Takes the words before the next option off the front."""
    texts = []
    while left and not _FLAG.fullmatch(left[0]):
        texts.append(left.pop(0))
    return texts


def _value(option: Option, flag: str, text: str) -> Any:
    try:
        return option.from_text(text)
    except ValueError:
        raise UserError(f"{flag} must be {option.what_it_is}, not {shown(text)}") from None
