"""`--output .`: an empty folder or an older store is filled where it is, and never replaced."""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from convai_fast import files
from convai_fast.cli.main import main
from convai_fast.data import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.store import DialogueStore
from convai_fast.errors import UserError
from convai_fast.loading import load
from tests.helpers.old_checkpoints import LAYOUTS, write_old_checkpoint


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
        data = ["--data", "../dialogues.json", "--tokenizer", "../tokenizer"]
        return main(["prepare", *data, "--output", "."])

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


def kill_at(patch, moved):
    """Let the process die after so many renames into its folder, whatever it would tidy up."""
    replace, calls = os.replace, []

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    def replace_or_die(*args):
        calls.extend(args[1:] if Path(args[1]).parent.resolve() == Path.cwd() else ())
        if len(calls) > moved:
            patch.setattr(Path, "unlink", killed)
            killed()
        replace(*args)

    patch.setattr(files.os, "replace", replace_or_die)


@pytest.mark.parametrize("earlier", [0, 3])
@pytest.mark.parametrize("moved", [0, 1, 9])  # the first names the files that are coming
def test_a_kill_while_a_folder_is_filled_costs_nothing_but_a_second_try(
    prepare, monkeypatch, earlier, moved
):
    if earlier:
        assert prepare(earlier) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, moved)
        assert prepare(5) == 130
    Path(".writing-left").mkdir()  # as a kill leaves it
    if earlier and moved < 9:
        assert DialogueStore(".").splits["train"].num_dialogues == earlier
    else:
        with pytest.raises(UserError, match="`convai-fast prepare`"):
            DialogueStore(".")
    assert prepare(5) == 0
    assert DialogueStore(".").splits["train"].num_dialogues == 5
    assert sorted(name for name in os.listdir(".") if name[0] == ".") == [".writing-left"]


def test_an_error_while_a_folder_is_filled_takes_back_what_was_moved(prepare, monkeypatch, capsys):
    replace = os.replace

    def fail(source, target):
        if Path(target).name == "tokens.bin":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        assert prepare(3) == 2
    assert "cannot write a store to .: Input/output error" in capsys.readouterr().err
    assert os.listdir(".") == []
    assert prepare(3) == 0


@pytest.mark.parametrize("name", ["notes.txt", "meta.json"])
def test_what_others_put_into_the_folder_meanwhile_stays(prepare, there, monkeypatch, capsys, name):
    write = build_store._Writer.write

    def slow(*args):
        write(*args)
        (there / name).write_text("mine")

    monkeypatch.setattr(build_store._Writer, "write", slow)
    assert prepare(3) == 2
    assert f". holds {name}, which is no store's: choose another" in capsys.readouterr().err
    assert (there / name).read_text() == "mine"
    assert os.listdir(".") == [name]


def test_a_store_whose_meta_json_is_damaged_is_known_and_replaced(prepare, there, capsys):
    assert prepare(3) == 0
    (there / "meta.json").write_text('{"ver')
    assert main(["prepare", "--data", ".", "--tokenizer", "../tokenizer", "--preview", "1"]) == 2
    assert ". holds no whole store" in capsys.readouterr().err
    assert prepare(4) == 0
    assert "in place of the store that was there" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["tokens", "utterance_offsets", "train.candidate_ids"])
def test_a_disk_that_fills_up_while_a_store_is_written_is_one_sentence(
    prepare, monkeypatch, capsys, name
):
    opened = open

    def full(path, *mode):
        return opened("/dev/full" if Path(path).name == f"{name}.bin" else path, *mode)

    monkeypatch.setattr(build_store, "open", full, raising=False)
    assert prepare(3) == 2
    assert "cannot write a store to .: No space left on device" in capsys.readouterr().err
    assert os.listdir(".") == []


def test_a_store_that_names_files_of_others_makes_none_of_them_go(prepare, there):
    assert prepare(3) == 0
    meta = json.loads((there / "meta.json").read_text())
    meta["sizes"]["../mine"] = 1
    (there / "meta.json").write_text(json.dumps(meta))
    (there.parent / "mine.bin").write_bytes(b"x")
    assert prepare(4) == 0
    assert (there.parent / "mine.bin").read_bytes() == b"x"


def test_a_model_is_converted_into_the_folder_that_the_command_runs_in(there, tmp_path):
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "openai-gpt")
    folder, parent = there.stat().st_ino, tmp_path.stat().st_mtime_ns
    assert main(["convert", "--model", "../old", "--output", "."]) == 0
    load(".")
    assert (there.stat().st_ino, tmp_path.stat().st_mtime_ns) == (folder, parent)
    assert Path("config.json").is_file()
    assert main(["convert", "--model", "../old", "--output", "."]) == 2


def test_half_a_model_that_a_kill_leaves_is_replaced_by_the_same_command(
    there, tmp_path, monkeypatch
):
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "openai-gpt")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        assert main(["convert", "--model", "../old", "--output", "."]) == 130
    assert len([name for name in os.listdir(".") if name[0] != "."]) == 2
    assert main(["convert", "--model", "../old", "--output", "."]) == 0
    load(".")


def test_a_folder_that_cannot_be_listed_is_one_sentence(there, tmp_path, monkeypatch, capsys):
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "openai-gpt")

    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert main(["convert", "--model", "../old", "--output", "."]) == 2
    assert ". cannot be read: Permission denied" in capsys.readouterr().err
