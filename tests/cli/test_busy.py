"""Other processes that take the cores."""

import os

import pytest

from convai_fast.cli.busy import OtherProcesses
from convai_fast.cli.main import main


@pytest.mark.parametrize(
    ("cores", "taken", "threads", "says"),
    [
        (2, 1.8, 2, "other processes take 1.8 of 2 cores, and 2 threads wait for one another: "),
        (8, 3.0, 8, "--threads 5 is often several times faster"),
        (2, 0.4, 2, ""),
        (2, 1.8, 1, ""),  # fewer do not help
        (64, 30.0, 16, ""),
    ],
)
def test_where_they_leave_too_few_it_is_said(monkeypatch, cores, taken, threads, says):
    clock = {"seconds": 100.0, "busy": 50.0}
    monkeypatch.setattr("time.monotonic", lambda: clock["seconds"])
    monkeypatch.setattr(OtherProcesses, "_seconds", lambda self: clock["busy"])
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    others = OtherProcesses()
    clock["seconds"] += 2
    clock["busy"] += 2 * taken
    assert says in others.warning(threads)
    assert bool(others.warning(threads)) == bool(says)


@pytest.mark.parametrize("content", [None, "cpu 1 2\n"])
def test_where_the_system_does_not_tell_nothing_is_said(monkeypatch, tmp_path, content):
    stat = tmp_path / "stat"
    if content is not None:
        stat.write_text(content)
    monkeypatch.setattr("convai_fast.cli.busy._STAT", stat)
    others = OtherProcesses()
    others._since -= 10
    assert others.warning(2) == ""


def test_a_command_computes_with_as_many_threads_as_it_is_told(capsys, monkeypatch):
    import torch

    monkeypatch.setenv("RAYON_NUM_THREADS", "")
    before = torch.get_num_threads()
    try:
        assert main(["info", "--threads", "3"]) == 0
        assert os.environ["RAYON_NUM_THREADS"] == "3"
    finally:
        torch.set_num_threads(before)
    assert "torch uses 3 threads" in capsys.readouterr().out
