"""A reader of the user's own: a function."""

import sys
import textwrap
from pathlib import Path

import pytest

from convai_fast.data.readers import load_dialogues
from tests.helpers.conversations import DOG
from tests.helpers.reading import assert_user_error, pairs_of, read


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module into the working directory; its name is new in every test."""
    monkeypatch.chdir(tmp_path)
    names = []

    def make(source):
        names.append(f"my_reader_{tmp_path.name}_{len(names)}".replace("-", "_"))
        Path(f"{names[-1]}.py").write_text(textwrap.dedent(source))
        return names[-1]

    yield make
    for name in names:
        sys.modules.pop(name, None)


def test_a_function_of_the_users_reads_what_it_likes(user_module):
    module = user_module("""
        from convai_fast.dialogue.dialogue import Dialogue, Utterance
        THEIRS = Dialogue([], [Utterance(["hey"], ["i have a dog"])])
        def read(path):
            assert path == "anything at all"
            other = {"utterances": [{"history": ["x"], "candidates": ["y"]}]}
            return {"train": (THEIRS, other), "valid": [THEIRS]}
    """)
    before = list(sys.path)
    splits = load_dialogues("anything at all", f"{module}:read")
    assert splits["train"][0].utterances[0].candidates == ["y", "i have a dog"]
    assert splits["valid"] == [DOG]
    assert sys.path == before
    assert sys.modules[module].THEIRS == DOG, "the user's objects must stay as they are"


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (
            "return {'train': [D, D, D, {'utterances': [U, U, {'history': [], 'candidates': 3}]}]}",
            ["train[3].utterances[2].candidates must be a list, not a number"],
        ),
        (
            "return {'train': [{'utterances': [Utterance('x', ['y'])]}]}",
            ["train[0].utterances[0].history must be a list, not text"],
        ),
        ("return [D, None]", ["[1] must be an object, not null"]),
        ("return None", ["the result holds null", "list of dialogues"]),
        ("return {'valid': [D]}", ["train is missing"]),
        ("return {}['x']", ["KeyError: 'x'", ".py, line 5"]),
        ("return open(path)", ["FileNotFoundError", "some path"]),
        ("yield D; yield {}['x']", ["reading failed in", ".py, line 5", "KeyError: 'x'"]),
        ("return {'train': (1 // n for n in [0])}", [".py, line 5", "ZeroDivisionError"]),
        (
            "return [{'messages': [{1: 'a', 2: 'b'}]}]",
            ["[0].messages[0].role is missing (found are '1', '2')"],
        ),
    ],
)
def test_what_a_function_of_the_users_returns_is_checked(user_module, body, parts):
    module = user_module(f"""
        from convai_fast.dialogue.dialogue import Utterance
        U = {{"history": ["x"], "candidates": ["y"]}}
        D = {{"utterances": [U]}}
        def read(path): {body}
    """)
    assert_user_error(lambda: load_dialogues("some path", f"{module}:read"), [module, *parts])


@pytest.mark.parametrize(
    ("reader", "parts"),
    [
        ("no_such_module_at_all:read", ["no_such_module_at_all", "ModuleNotFoundError"]),
        ("{module}:nothing", ["no function nothing"]),
        ("{module}:VALUE", ["no function VALUE"]),
        ("{broken}:read", ["SyntaxError"]),
        ("{module}:takes_none", ["TypeError"]),
    ],
)
def test_a_function_that_cannot_be_called_is_named(user_module, reader, parts):
    module = user_module("VALUE = 1\ndef takes_none(): pass")
    reader = reader.format(module=module, broken=user_module("def read(:"))
    assert_user_error(lambda: load_dialogues("path", reader), [f"reader {reader}", *parts])


def test_a_function_may_be_named_by_the_path_of_its_file(write):
    reader = write(
        "sub/mine.py", "def load(path):\n    yield {'prompt': 'a', 'completion': path}\n"
    )
    dialogues, _ = read("anything", f"{reader}:load")
    assert pairs_of(dialogues) == [(["a"], ["anything"])]
