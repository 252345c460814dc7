"""`--out .`: an empty folder or an older store is filled where it is, never replaced by another."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from convai_fast import files
from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.store import DialogueStore
from convai_fast.errors import UserError
from convai_fast.loading import load
from tests.old_checkpoints import LAYOUTS, write_old_checkpoint


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The folder that a command runs in."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


@pytest.fixture
def prepare(there, tmp_path, tokenizer):
    """Make a store of so many dialogues in the folder that the command runs in."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def prepare(num_dialogues):
        dialogues = builtin_dialogues(num_train=num_dialogues, num_valid=2)
        content = {split: [asdict(each) for each in own] for split, own in dialogues.items()}
        (tmp_path / "dialogues.json").write_text(json.dumps(content))
        return main(
            ["prepare", "--data", "../dialogues.json", "--tokenizer", "../tokenizer", "--out", "."]
        )

    return prepare


def test_a_store_is_made_and_replaced_in_the_folder_that_the_command_runs_in(prepare, there):
    (there / ".git").mkdir()
    beside = there.parent
    folder, parent = there.stat().st_ino, None
    for number in (3, 5):
        assert prepare(number) == 0
        assert DialogueStore(".").splits["train"].num_dialogues == number
        assert there.stat().st_ino == folder
        # Its parent, which perhaps cannot be written, is left alone.
        names = sorted(path.name for path in beside.iterdir())
        assert names == ["dialogues.json", "there", "tokenizer"]
        parent = parent or beside.stat().st_mtime_ns
        assert beside.stat().st_mtime_ns == parent
    assert [name for name in os.listdir(".") if name.startswith(".")] == [".git"]


@pytest.mark.parametrize("earlier", [0, 3])
@pytest.mark.parametrize("moved", [0, 1, 9])
def test_a_kill_while_a_folder_is_filled_costs_nothing_but_a_second_try(
    prepare, monkeypatch, earlier, moved
):
    if earlier:
        assert prepare(earlier) == 0
    replace, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if len(calls) > moved:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        assert prepare(5) == 130
    Path(".writing-left").mkdir()  # as a kill leaves it
    if moved:
        with pytest.raises(UserError, match="make the store anew with `convai-fast prepare`"):
            DialogueStore(".")
    assert prepare(5) == 0
    assert DialogueStore(".").splits["train"].num_dialogues == 5


def test_a_model_is_converted_into_the_folder_that_the_command_runs_in(there, tmp_path):
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "openai-gpt")
    folder, parent = there.stat().st_ino, tmp_path.stat().st_mtime_ns
    assert main(["convert", "../old", "."]) == 0
    load(".")
    assert (there.stat().st_ino, tmp_path.stat().st_mtime_ns) == (folder, parent)
    assert Path("config.json").is_file()
    assert main(["convert", "../old", "."]) == 2
