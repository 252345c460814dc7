"""The tests of a module are found by its name, and what tests share is in tests/helpers."""

from pathlib import Path

import convai_fast
from tests.helpers.imports import imported_modules

TESTS, PACKAGE = Path(__file__).parent, Path(convai_fast.__file__).parent
OF_NO_MODULE = {
    "ops/test_instruction_sets.py",  # of all kernels
    "test_custom_dataset.py",  # a page of docs/
    "test_docs.py",
    "test_imports.py",
    "test_package.py",
    "test_setup.py",
    "test_tests.py",
}
TOOLS = ("faults", "fuzz")  # commands, each with files of its own
FILES = [path for path in TESTS.rglob("*.py") if path.relative_to(TESTS).parts[0] not in TOOLS]
FILES_OF_TESTS = [path for path in FILES if path.parent.name != "helpers"]


def belongs_to_a_module(path):
    """Whether convai_fast/a has a module b, or b_c, where the path is tests/a/test_b_c.py."""
    folder = PACKAGE / path.relative_to(TESTS).parent
    words = path.stem.removeprefix("test_").split("_")
    modules = [folder / "_".join(words[: i + 1]) for i in range(len(words))]
    return any(
        module.with_suffix(".py").is_file()
        # Each part of the package has a folder of tests.
        or (folder != PACKAGE and (module / "__init__.py").is_file())
        for module in modules
    )


def test_every_file_of_tests_is_named_after_a_module():
    named = {path for path in FILES_OF_TESTS if path.name.startswith("test_")}
    others = {path for path in named if not belongs_to_a_module(path)}
    assert {path.relative_to(TESTS).as_posix() for path in others} == OF_NO_MODULE


def test_files_of_tests_hold_tests_alone():
    others = [path for path in FILES_OF_TESTS if not path.name.startswith("test_")]
    assert {path.name for path in others} == {"__init__.py", "conftest.py"}


def test_what_tests_share_comes_from_the_helpers():
    for path in FILES:
        for name in imported_modules(path):
            is_of_tests = name.startswith((".", "tests."))
            assert not is_of_tests or name.startswith("tests.helpers."), f"{path} imports {name}"
