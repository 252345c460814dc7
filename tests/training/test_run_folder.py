"""The run folder: made, written and tidied, or one sentence why not."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from convai_fast.errors import UserError
from convai_fast.training import checkpoints, loop, run_folder
from convai_fast.training.options import TrainOptions
from tests.helpers.killed_runs import tree


def test_a_run_can_be_made_in_the_empty_folder_it_is_started_in(run_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop.train(dataclasses.replace(run_options, output=".", max_steps=1), lambda _: None)
    assert Path("last", "model.safetensors").is_file()


def failing(name, number, when=lambda path: True):
    """A stand-in for a function of `os` or `open` that fails for some paths."""
    function = open if name == "open" else getattr(os, name)

    def fail(path, *args, **kwargs):
        if when(str(path)):
            raise OSError(number, os.strerror(number), str(path))
        return function(path, *args, **kwargs)

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("file", ["metrics.jsonl", "options.yaml"])
def test_a_run_that_cannot_be_written_is_one_sentence(killed, monkeypatch, file, number):
    before = tree(killed)
    stand_in = failing("open", number, lambda path: path.endswith(file) and "run" in path)
    for module in (run_folder, checkpoints):
        monkeypatch.setattr(module, "open", stand_in, raising=False)
    says = rf"the run .* cannot be written \({os.strerror(number)}: .*{file}\): (make|get) .*, then"
    with pytest.raises(UserError, match=says):
        loop.train(TrainOptions(resume=str(killed), n_epochs=3), lambda _: None)
    assert tree(killed) == before
    monkeypatch.undo()
    loop.train(TrainOptions(resume=str(killed), n_epochs=3), lambda _: None)


def test_a_full_disk_while_a_run_begins_or_is_logged_is_one_sentence(
    run_options, tmp_path, monkeypatch
):
    options = dataclasses.replace(run_options, output=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be made"):
        patch.setattr(checkpoints, "open", failing("open", errno.ENOSPC), raising=False)
        loop.train(options, lambda _: None)
    assert not any(tmp_path.iterdir())
    trainer_log = run_folder.RunFolder.log

    def log(self, *args):
        self._metrics.close()
        self._metrics = open("/dev/full", "w")  # noqa: SIM115
        trainer_log(self, *args)

    monkeypatch.setattr(run_folder.RunFolder, "log", log)
    with pytest.raises(UserError, match=r"cannot record the figures of step 0 \(No space left"):
        loop.train(options, lambda _: None)


def test_a_file_system_without_links_is_named_before_the_first_step(
    run_options, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    options = dataclasses.replace(run_options, output=str(tmp_path / "linkless"))
    with pytest.raises(UserError, match="no symbolic link can be made in"):
        loop.train(options, lambda _: None)


def test_two_runs_that_begin_in_one_second_have_two_folders(run_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260101-000000")
    paths = [run_folder.RunFolder(run_options).path for _ in range(3)]
    first = paths[0].name
    assert [path.name for path in paths] == [first, f"{first}-2", f"{first}-3"]
    assert all((path / "options.yaml").is_file() for path in paths)
    assert {path.name for path in Path("runs").iterdir()} == {path.name for path in paths}


def test_a_run_that_starts_from_a_run_is_named_after_that(
    run_options, killed, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    Path("best").mkdir()
    for model, name in ((killed / "best", killed.name), (killed, killed.name), ("best", "best")):
        path = run_folder.RunFolder(dataclasses.replace(run_options, model=str(model))).path
        assert path.name.split("_")[-1].startswith(name)


def test_only_checkpoints_of_its_own_are_removed(killed, capsys, monkeypatch):
    folder = killed / "checkpoints"
    shutil.copytree(folder / "step-000014", folder / "my-backup")
    (folder / ".DS_Store").write_text("")
    (folder / "step-000003").write_text("notes")
    (folder / "step-000004").symlink_to("my-backup")
    for name in (".step-000001", "step-000002"):
        (folder / name).mkdir()
    kept = {p.name for p in folder.iterdir()} - {".step-000001", "step-000002"}
    loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert {p.name for p in folder.iterdir()} == kept
    (folder / "step-000002").mkdir()
    broken = SimpleNamespace(rmtree=failing("rmdir", errno.ENOTEMPTY))
    monkeypatch.setattr(run_folder, "shutil", broken)
    loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert "step-000002 cannot be removed: Directory not empty" in capsys.readouterr().err
