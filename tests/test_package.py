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


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = convai_fast.nonsense


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from convai_fast.cli.main import main; main(['--help']); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("False\n"), result.stderr


def test_the_tree_in_the_readme_is_the_tree():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1]
    named = set(re.findall(r"^    (\w+\.py)", tree, re.MULTILINE))
    modules = {
        path.name
        for folder in ("dialogue", "data", "model", "training", "generation", "evaluation", "ops")
        for path in (ROOT / "convai_fast" / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    assert modules == named
