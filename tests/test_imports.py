"""Imports run one way, so that each part can be read, and used, without those above it.

Nor does a part speak of what is above it, such as the flags of the command line.
"""

import ast
import re
from pathlib import Path

import pytest

import convai_fast
from tests.helpers.imports import imported_modules

PACKAGE = Path(convai_fast.__file__).parent
# From the bottom up; parts of one layer do not import each other.
LAYERS = [
    ["errors"],
    ["options", "extras"],
    ["files", "hardware", "hub", "terminal"],
    ["archive"],
    ["dialogue"],
    ["ops"],
    ["data", "model"],
    ["loading"],
    ["conversion", "generation", "publishing", "training"],
    ["bulk", "evaluation"],
    ["comparison", "serving"],
    ["cli"],
]
# Whole commands are a way out in themselves, whoever names them.
COMMAND = re.compile(r"(convai-fast|pip install|`make|torchrun) [^`,:;]*")
PARTS = {"_native": "ops"}  # it loads the compiled operators
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}
OUTSIDE = (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
FILES = [path for path in PACKAGE.rglob("*.py") if path not in OUTSIDE]


def imported_parts(path):
    """The parts of the package that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package == "convai_fast":
                yield PARTS.get(rest[0], rest[0])


def part_of(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return PARTS.get(name, name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_what_lies_below_it(path):
    own = part_of(path)
    for part in imported_parts(path):
        assert part == own or LAYER_OF[part] < LAYER_OF[own], f"{own} imports {part}"


def test_every_part_has_its_place():
    assert {part_of(path) for path in FILES} == LAYER_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_operators_know_their_reference(path):
    if part_of(path) != "ops":
        assert not [name for name in imported_modules(path) if "ops.reference" in name]


def test_the_scheduler_computes_with_plain_integers():
    names = imported_modules(PACKAGE / "generation" / "scheduler.py")
    assert {name.split(".")[0] for name in names} <= {
        "collections",
        "dataclasses",
        "numpy",
        "typing",
    }


def texts_of(path):
    """The strings of a file but for its docstrings, with {} where a value is put in."""
    parts = set()  # docstrings, and what belongs to an f-string
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr):
            parts.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_speaks_of_flags(path):
    if part_of(path) != "cli":
        flags = [text for text in texts_of(path) if "--" in COMMAND.sub("", text)]
        assert not flags, "name an option as `precision`: see CONTRIBUTING.md"
