"""Of the processes that could continue a run, one does; the others look further."""

import dataclasses
import errno
import multiprocessing
from pathlib import Path

import pytest

from convai_fast.errors import UserError
from convai_fast.training import loop, run_folder
from convai_fast.training.resume import resolve_resume
from convai_fast.training.run_folder import Claim, RunFolder


@pytest.fixture
def runs(options, tmp_path, monkeypatch):
    """Three runs that were killed before they saved anything."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        RunFolder(dataclasses.replace(options, output=f"runs/{name}")).close()
    return dataclasses.replace(options, output="", resume="auto")


def test_processes_that_look_for_a_run_at_the_same_moment_find_another_each(runs):
    context = multiprocessing.get_context("fork")
    together, found = context.Barrier(5), context.SimpleQueue()

    def look():
        together.wait()
        with Claim() as claim:
            found.put(resolve_resume(runs, None, claim).resume)
            together.wait()  # as long as it trains

    processes = [context.Process(target=look) for _ in range(5)]
    for process in processes:
        process.start()
    assert sorted(found.get() for _ in processes) == ["", "", "runs/a", "runs/b", "runs/c"]
    for process in processes:
        process.join()


def test_a_run_that_cannot_be_written_is_left_alone(runs, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(run_folder, "open", refuse, raising=False)
    with Claim() as claim:
        assert resolve_resume(runs, None, claim).resume == ""
        assert claim.metrics is None


def test_a_run_is_claimed_before_anything_of_it_is_read(runs, monkeypatch):
    """What another process saved meanwhile must not be dropped as if it were of later steps."""

    def start(options, report):
        with Claim() as other, pytest.raises(UserError, match="another process is training in"):
            other.take(Path(options.resume))
        raise UserError("begun")

    monkeypatch.setattr(loop, "start_or_continue", start)
    with pytest.raises(UserError, match="begun"):
        loop.train(dataclasses.replace(runs, resume="runs/b"), lambda _: None)
    with Claim() as again:
        again.take(Path("runs/b"))


def test_a_new_run_is_claimed_from_the_moment_that_it_is_there(runs):
    folder = RunFolder(dataclasses.replace(runs, resume=""))
    with Claim() as claim, pytest.raises(UserError, match="another process is training in"):
        claim.take(folder.path)
    folder.close()
