"""The public names, and the files that speak of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import convai_fast

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", convai_fast.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name):
    assert getattr(convai_fast, name).__doc__


def test_public_names_are_not_hidden_by_modules_of_the_same_name():
    names = ", ".join(convai_fast.__all__)
    code = (
        f"from convai_fast import {names}; import convai_fast.cli.train, types\n"
        f"print([n for n in convai_fast.__all__ if isinstance(globals()[n], types.ModuleType)\n"
        "       or isinstance(getattr(convai_fast, n), types.ModuleType)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = convai_fast.nonsense


def test_type_checkers_see_every_public_name():
    source = Path(convai_fast.__file__).read_text(encoding="utf-8")
    imported = re.findall(r"(\w+) as \1", source.split("if TYPE_CHECKING:")[1])
    assert sorted(imported) == convai_fast.__all__
    assert (Path(convai_fast.__file__).parent / "py.typed").is_file()


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from convai_fast.cli.main import main\n"
        "main(['--help']); main(['train', '--help'])\n"
        "print([n for n in ('torch', 'numpy', 'transformers', 'tqdm') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stderr


PACKAGE_FOLDERS = ["dialogue", "data", "model", "training", "generation", "bulk", "evaluation"]
PACKAGE_FOLDERS += ["comparison", "serving", "ops"]


def test_the_tree_in_the_documentation_is_the_tree():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The tree")[1]
    named = set(re.findall(r"^    (\w+\.py)", tree, re.MULTILINE))
    modules = {
        path.name
        for folder in PACKAGE_FOLDERS
        for path in (ROOT / "convai_fast" / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    assert modules == named
