"""Where figures go beside metrics.jsonl, and that nothing there can end a run."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from convai_fast.errors import UserError
from convai_fast.training.options import TrainOptions
from convai_fast.training.resume import resolve_resume
from convai_fast.training.run_folder import Claim, RunFolder
from tests.helpers.killed_runs import records

RECORDS = [(0, "valid", {"nll": 5.0}), (10, "train", {"loss": 4.5, "lr": 1e-3})]
LOGGED = [({"valid/nll": 5.0}, 0), ({"train/loss": 4.5, "train/lr": 1e-3}, 10)]


class FakeTracker:
    """What wandb and trackio have in common, and what was done with it."""

    __spec__ = "installed"

    def __init__(self, name):
        self.name, self.begun, self.logged, self.finished, self.fails = name, [], [], 0, ""

    def init(self, **settings):
        self._fail("init")
        self.begun.append(settings)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        self._fail("log")
        self.logged.append((values, step))

    def finish(self):
        self._fail("finish")
        self.finished += 1

    def _fail(self, name):
        if self.fails == name:
            raise ConnectionError("no route to host")


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    module = FakeTracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


@pytest.fixture
def record(tmp_path):
    """Records figures in the folder of a run, which begins or goes on."""

    def record(*report_to):
        path = tmp_path / "my run"
        name = "resume" if path.exists() else "output"
        options = TrainOptions(report_to=report_to, max_steps=3, **{name: str(path)})
        options.check()
        folder = RunFolder(options)
        for step, split, values in RECORDS:
            folder.log(step, split, values)
        folder.close()
        return folder.path

    return record


def test_a_tracker_has_the_records_and_options_of_the_run(tracker, record, monkeypatch):
    monkeypatch.setenv(f"{tracker.name.upper()}_PROJECT", "dialogues")
    folder = record(tracker.name, "tensorboard", tracker.name)
    (begun,) = tracker.begun
    assert begun["project"] == "dialogues"
    assert begun["config"]["max_steps"] == 3 and "output" not in begun["config"]
    assert tracker.logged == LOGGED
    assert tracker.finished == 1
    assert list(folder.glob("events.out.tfevents.*"))


def test_a_run_that_goes_on_is_the_same_for_a_tracker(tracker, record):
    folder = record("none")
    assert [path.name for path in folder.glob("[er]*")] == []  # neither events nor an id
    for _ in range(2):
        record(tracker.name)
    first, second = tracker.begun
    assert (first["name"], first["resume"]) == (second["name"], "allow")
    assert first["name"].startswith("my-run-")
    assert first.get("id", first["name"]) == first["name"]
    assert first["project"] == "convai-fast"


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(tracker, record, fails, capsys):
    tracker.fails = fails
    folder = record(tracker.name, "tensorboard")
    assert capsys.readouterr().err == (
        f"warning: from here on nothing is recorded in {tracker.name} (no route to host); "
        "metrics.jsonl has all figures\n"
    )
    assert len(records(folder)) == len(RECORDS)
    assert list(folder.glob("events.out.tfevents.*"))


def test_a_run_that_goes_on_may_be_recorded_elsewhere(record):
    folder = record("tensorboard")
    options = TrainOptions(resume=str(folder), report_to="none")
    with Claim() as claim:
        assert resolve_resume(options, None, claim).report_to == ("none",)


def test_no_other_place_is_known(run_options):
    with pytest.raises(UserError, match=r"`report_to` must be of tensorboard, wandb, .*, not mlfl"):
        dataclasses.replace(run_options, report_to="mlflow").check()


def test_trackio_has_the_records_of_one_run(record, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="the extra `report` is not installed")
    for _ in range(2):
        folder = record("trackio")
    (run,) = trackio.Api().runs("convai-fast")
    assert run.name == (folder / "run_id").read_text().strip()
