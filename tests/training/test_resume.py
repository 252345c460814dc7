"""A run that was killed and continued ends as one that was not."""

import dataclasses
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
import yaml

from convai_fast.archive import checkpoint_of
from convai_fast.cli.main import main
from convai_fast.errors import UserError
from convai_fast.training import checkpoints, loop, run_folder, step
from convai_fast.training.evaluation import MetricSums
from convai_fast.training.options import TrainOptions
from tests.helpers.killed_runs import (
    STEPS,
    assert_equal_runs,
    chosen,
    die_at,
    in_a_process,
    records,
)


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (MetricSums, "add", 2),  # evaluating before the first step
        (step, "combined_loss", 23),  # a step half accumulated
        (MetricSums, "add", 6),  # evaluating after an epoch
        (checkpoints.torch, "save", 4),  # of the checkpoint after an epoch
        (checkpoints.torch, "save", 9),  # of the same step once more, when it is evaluated
        (run_folder.os, "rename", 3),
        (run_folder.RunFolder, "_point", 1),  # before there is any link
        (run_folder.RunFolder, "_point", 2),  # between `last` and `best`
        (run_folder.RunFolder, "_point", 10),
        (checkpoints.os, "replace", 19),
        (run_folder.shutil, "rmtree", 9),
    ],
)
def test_killed_at_a_chosen_moment(run_options, undisturbed, tmp_path, target, name, call):
    options = dataclasses.replace(run_options, output=str(tmp_path / "run"))
    process = in_a_process(options, lambda: die_at(target, name, call))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    loop.train(TrainOptions(resume=str(tmp_path / "run")), lambda _: None)
    assert_equal_runs(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_again_and_again_at_random_moments(run_options, undisturbed, tmp_path, seed):
    options = dataclasses.replace(run_options, output=str(tmp_path / "run"), resume="auto")
    draw, kills = random.Random(seed), 0
    while True:
        process = in_a_process(options)
        process.join((1 + kills / 2) * 0.1 * draw.random())  # longer and longer: it must end
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills > 0
    assert_equal_runs(tmp_path / "run", undisturbed)


def test_the_command_line_continues_a_killed_run(run_options, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    options = dataclasses.replace(run_options, output=str(run))
    process = in_a_process(options, lambda: die_at(checkpoints.torch, "save", 2))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert main(["train", "--resume", str(run)]) == 0
    assert "continuing after step" in capsys.readouterr().out
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize("moment", ["combined_loss", "add"])
def test_a_signal_within_a_step_or_an_evaluation_saves_and_says_how_to_go_on(
    run_options, undisturbed, tmp_path, monkeypatch, moment
):
    target, call = {"combined_loss": (step, 23), "add": (MetricSums, 6)}[moment]
    function, calls = getattr(target, moment), []

    def signalled(*args):
        calls.append(moment)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(target, moment, signalled)
    said, run = [], tmp_path / "run"
    options = dataclasses.replace(run_options, output=str(run), save_every=0)
    result = loop.train(options, said.append)
    assert result.stopped_by == signal.SIGTERM
    assert len(calls) == call  # not one batch more
    assert said[-1] == f"continue with: convai-fast train --resume {run}"
    loop.train(TrainOptions(resume=str(run)), lambda _: None)
    assert_equal_runs(run, undisturbed)


def test_a_full_disk_is_one_sentence_and_loses_nothing_before_it(
    run_options, undisturbed, tmp_path, monkeypatch
):
    fsync, run = os.fsync, tmp_path / "run"

    def full(descriptor):
        if (run / "checkpoints" / ".step-000006").exists():
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left") as raised:
        patch.setattr(checkpoints.os, "fsync", full)
        loop.train(dataclasses.replace(run_options, output=str(run)), lambda _: None)
    assert "step 6 cannot be saved" in str(raised.value)
    assert "make room" in str(raised.value)
    assert not (run / "checkpoints" / ".step-000006").exists()
    assert json.loads((run / "last" / "metrics.json").read_text())["step"] == 4
    loop.train(TrainOptions(resume=str(run)), lambda _: None)
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize("left", [None, "dangling"])
def test_a_run_that_lost_its_links_continues_from_its_newest_checkpoint(
    killed, undisturbed, left, capsys
):
    for link in ("last", "best"):
        (killed / link).unlink()
        if left:
            (killed / link).symlink_to("/absent/step-000014")
    assert main(["train", "--resume", str(killed)]) == 0
    assert "this run is finished, with 14 steps" in capsys.readouterr().out
    assert_equal_runs(killed, undisturbed)


def test_a_best_checkpoint_that_was_deleted_leaves_no_link(killed):
    best, path = killed / "best", killed / "last" / checkpoints.STATE_FILE
    state = torch.load(path)
    state["progress"]["best_step"] = 7
    torch.save(state, path)
    best.unlink()
    best.symlink_to("checkpoints/step-000007")
    loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert not best.is_symlink()
    assert (killed / "last").is_dir()


def test_a_checkpoint_whose_options_are_named_as_flags_can_be_continued(killed, undisturbed):
    path = killed / "last" / checkpoints.STATE_FILE
    state = torch.load(path)
    state["identity"] = {
        f"--{name.strip('`')}" if "`" in name else name: value
        for name, value in state["identity"].items()
    }
    assert "--lr" in state["identity"]
    torch.save(state, path)
    loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert_equal_runs(killed, undisturbed)


def test_the_time_of_earlier_sessions_counts(killed):
    path = killed / "last" / checkpoints.STATE_FILE
    torch.save({**torch.load(path), "seconds": 1000.0}, path)
    result = loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert result.is_resumed
    assert result.seconds > 1000


def test_a_finished_run_says_so_and_changes_nothing(killed, undisturbed, capsys):
    assert main(["train", "--resume", str(killed)]) == 0
    printed = capsys.readouterr().out
    assert "this run is finished, with 14 steps" in printed
    assert "tokens/s" not in printed
    assert_equal_runs(killed, undisturbed)


def test_a_bar_counts_the_steps_of_its_own_time(killed, monkeypatch):
    done = json.loads((killed / "last" / "metrics.json").read_text())["step"]
    bars, progress_bar = [], loop.progress_bar

    def noted(*arguments, **settings):
        bars.append(settings)
        return progress_bar(*arguments, **settings)

    monkeypatch.setattr(loop, "progress_bar", noted)
    options = TrainOptions(resume=str(killed), max_steps=0, n_epochs=4)
    loop.train(options, lambda _: None)
    totals = [bar["total"] for bar in bars if bar["unit"] == "step"]
    assert sum(totals) == 2 * STEPS - done


def test_a_finished_run_can_be_made_longer(killed):
    result = loop.train(TrainOptions(resume=str(killed), max_steps=0, n_epochs=4), lambda _: None)
    assert result.steps == 2 * STEPS
    assert yaml.safe_load((killed / "options.yaml").read_text())["n_epochs"] == 4
    assert records(killed)[-1]["step"] == 2 * STEPS


def test_auto_takes_the_newest_unfinished_run_with_these_options(
    run_options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("finished", "other", "older", "newer"):
        options = dataclasses.replace(run_options, output=f"runs/{name}", max_steps=1)
        options.lr = 0.5 if name == "other" else options.lr
        loop.train(options, lambda _: None)
        metrics = Path("runs", name, "last", "metrics.json")
        metrics.write_text(json.dumps({"finished": name == "finished"}))
    for age, name in enumerate(("finished", "other", "newer", "older")):
        os.utime(f"runs/{name}/options.yaml", (1e9 - age, 1e9 - age))
    auto = dataclasses.replace(run_options, resume="auto")
    assert chosen(auto) == "runs/newer"
    with open("runs/newer/metrics.jsonl") as file:
        assert run_folder.try_lock(file.fileno())  # as by a process that trains there
        assert chosen(auto) == "runs/older"
        with pytest.raises(UserError, match="another process is training in runs/newer"):
            loop.train(TrainOptions(resume="runs/newer"), lambda _: None)
    assert chosen(dataclasses.replace(auto, seed=9)) == ""
    assert chosen(dataclasses.replace(auto, dataset_path=("b.json",))) == ""
    assert chosen(dataclasses.replace(auto, output="runs/new")) == ""


def test_a_run_of_an_earlier_version_has_its_options_in_json(killed, undisturbed):
    options = {**yaml.safe_load((killed / "options.yaml").read_text()), "output": str(killed)}
    del options["eval_every"]
    (killed / "options.json").write_text(json.dumps(options))
    (killed / "options.yaml").unlink()
    assert checkpoint_of(killed) == (killed / "best").resolve()
    loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert_equal_runs(killed, undisturbed)
    assert (killed / "options.yaml").is_file()
    assert not (killed / "options.json").exists()


def test_the_options_of_a_run_begin_another_like_it(killed, undisturbed, tmp_path):
    config = str(killed / "options.yaml")
    assert main(["train", "--config", config, "--output", str(tmp_path / "other")]) == 0
    assert_equal_runs(tmp_path / "other", undisturbed)


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(run_options, tmp_path, capsys):
    options = dataclasses.replace(run_options, output=str(tmp_path / "run"))
    process = in_a_process(options, lambda: die_at(step, "combined_loss", 2))
    process.join()
    assert main(["train", "--resume", str(tmp_path / "run"), "--max_steps", "1"]) == 0
    assert "nothing was saved in this run yet: beginning it anew" in capsys.readouterr().out
