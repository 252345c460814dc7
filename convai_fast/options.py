"""Options: what a dataclass of them says of each, and files that give them by name."""

import dataclasses
import difflib
import json
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from convai_fast.errors import UserError, reason_of, shown

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Weights = Literal["auto", "float32", "bfloat16", "int8"]

_WHAT_IT_IS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
}


@dataclass(frozen=True)
class Option:
    """One option, as its field's type says.

    Attributes:
        kind: int, float, bool, str or Path: of the value, or of each value of a list.
        choices: the texts that it may be; empty where it may be any.
        is_optional: whether it may be None.
        default: of its field.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    is_list: bool
    is_optional: bool
    default: Any

    @classmethod
    def of(cls, name: str, hint: Any, default: Any) -> "Option":
        """The option of a field with this type."""
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        (main,) = (part for part in parts if part is not types.NoneType)
        is_list = get_origin(main) is tuple
        kind = get_args(main)[0] if is_list else main
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        return cls(name, str if choices else kind, choices, is_list, len(parts) > 1, default)

    @property
    def what_it_is(self) -> str:
        """What a value has to be, in words."""
        return f"one of {', '.join(self.choices)}" if self.choices else _WHAT_IT_IS[self.kind]

    def from_text(self, text: str) -> Any:
        """One value, as the command line gives it; ValueError where it can be none."""
        if self.choices and text not in self.choices:
            raise ValueError
        if self.kind is bool:
            if text not in ("true", "false"):
                raise ValueError
            return text == "true"
        return self.kind(text)

    def from_yaml(self, value: Any) -> Any:
        """The value, as YAML or JSON has it; ValueError where it can be none."""
        if value is None and self.is_optional:
            return None
        if self.is_list:
            return tuple(map(self._one, value if isinstance(value, list) else [value]))
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, str):  # a number, too, as 1e-3 is a text for YAML
            return self.from_text(value)
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in kinds:
            raise ValueError
        return self.kind(value)


def options_of(options_class: Any) -> dict[str, Option]:
    """The options of a dataclass, and of dataclasses in its fields, whose metadata may name some
    that are left out as `without`."""
    return {option.name: option for option in _options_of(options_class)}


def _options_of(options_class: Any) -> Iterator[Option]:
    hints = get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        if dataclasses.is_dataclass(hints[field.name]):
            left_out = field.metadata.get("without", ())
            nested = options_of(hints[field.name])
            yield from (option for name, option in nested.items() if name not in left_out)
        else:
            yield Option.of(field.name, hints[field.name], field.default)


def build(options_class: Any, values: Mapping[str, Any]) -> Any:
    """An `options_class` with these values of its options, and of those of dataclasses in it."""
    hints = get_type_hints(options_class)
    arguments = {}
    for field in dataclasses.fields(options_class):
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = build(hints[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return options_class(**arguments)


def meant(name: str, names: Collection[str]) -> str:
    """Which of `names` is meant by one that is none of them, as the end of a sentence."""
    near = difflib.get_close_matches(name, names, 1)
    return f": do you mean {near[0]}?" if near else ""


def read_options(
    path: Path,
    options: Mapping[str, Option],
    aliases: Mapping[str, str] | None = None,
    missing: str = "",
) -> dict[str, Any]:
    """The values that a YAML file gives to options, by their own names.

    Args:
        options: those that it may name.
        aliases: other names of theirs.
        missing: the sentence where there is no such file, if that means more than a file to get.

    Raises UserError, with the line, for what is no YAML, and for an option that is not there, is
    named twice, or has a value that it cannot have.
    """
    aliases = aliases or {}
    values: dict[str, Any] = {}
    for line, key, value in _entries(path, missing):
        where = f"{path}, line {line}"
        name = key.replace("-", "_") if isinstance(key, str) else str(key)
        option = options.get(aliases.get(name, name))
        if option is None:
            known = [*options, *(alias for alias, own in aliases.items() if own in options)]
            raise UserError(f"{where}: there is no option {shown(key)}{meant(name, known)}")
        if option.name in values:
            raise UserError(f"{where}: {key} is given twice: give it once")
        try:
            values[option.name] = option.from_yaml(value)
        except ValueError:
            many = ", or a list of such" if option.is_list else ""
            raise UserError(
                f"{where}: {key} must be {option.what_it_is}{many}, not {shown(value)}"
            ) from None
    return values


def _entries(path: Path, missing: str) -> Iterator[tuple[int, Any, Any]]:
    """The line, the key and the value of each entry of a YAML mapping."""
    import yaml  # what only computes reads no files: the operators do without

    try:
        loader = yaml.SafeLoader(path.read_bytes())
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path} must hold options, one a line, as in `lr: 0.001`")
        for key, value in node.value:
            line = key.start_mark.line + 1
            yield line, loader.construct_object(key, True), loader.construct_object(value, True)
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(missing) from error
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    # A tag such as !!float, and a date that there is not, may raise anything of a value.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        reason = getattr(error, "problem", None) or reason_of(error)
        raise UserError(f"{where}: this is not YAML ({reason}): mend it") from error


def as_yaml(values: Mapping[str, Any]) -> str:
    """The text of a YAML file that `read_options` reads as these values."""
    import yaml

    plain = json.loads(json.dumps(values))  # a list for a tuple, a float for numpy's
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=float("inf"))


def options_file(run: Path) -> Path | None:
    """Where a run folder keeps its options, if it is one; those of earlier versions had JSON."""
    files = (run / "options.yaml", run / "options.json")
    return next((file for file in files if file.is_file()), None)


def check_at_least(options: Any, least: Mapping[str, float]) -> None:
    """Raise UserError at the first of these options that is less, or no number."""
    for name, value in least.items():
        if not getattr(options, name) >= value:
            raise UserError(f"`{name}` must be at least {value}, not {getattr(options, name)}")
