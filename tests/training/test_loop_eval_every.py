"""Evaluations every so many steps, within epochs and across them."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest

from convai_fast.training import loop
from convai_fast.training.evaluation import MetricSums
from convai_fast.training.options import TrainOptions
from tests.helpers.killed_runs import assert_equal_runs, die_at, in_a_process, records


@pytest.fixture(scope="module")
def whole(run_options, tmp_path_factory):
    """Two epochs of 7 steps, evaluated every 3, and what was said."""
    output = str(tmp_path_factory.mktemp("whole") / "run")
    options = dataclasses.replace(run_options, eval_every=3, eval_before_start=False, output=output)
    said = []
    loop.train(options, said.append)
    return options, said


def test_every_so_many_steps_and_at_the_end_is_evaluated(whole, undisturbed):
    said, run = whole[1], Path(whole[0].output)
    nll = {r["step"]: r["nll"] for r in records(run) if r["split"] == "valid"}
    assert list(nll) == [3, 6, 9, 12, 14]
    assert [int(line.split()[1].strip(":")) for line in said if "nll" in line] == list(nll)
    best = json.loads((run / "best" / "metrics.json").read_text())
    assert best["nll"] == min(nll.values()) == nll[best["step"]]
    # It changes no weight.
    losses = [r["loss"] for r in records(run) if r["split"] == "train"]
    assert losses == [r["loss"] for r in records(undisturbed) if r["split"] == "train"]


@pytest.mark.parametrize("call", [1, 4])  # within the first, and after an epoch
def test_a_run_that_is_killed_goes_on_bit_for_bit(whole, tmp_path, call):
    options = dataclasses.replace(whole[0], output=str(tmp_path / "run"))
    process = in_a_process(options, lambda: die_at(MetricSums, "add", call))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    loop.train(TrainOptions(resume=options.output), lambda _: None)
    assert_equal_runs(tmp_path / "run", Path(whole[0].output))


def test_patience_counts_evaluations(whole, tmp_path, monkeypatch):
    nlls = iter([5.0, 3.0, 4.0, 3.5, 1.0])
    compute = MetricSums.compute
    monkeypatch.setattr(
        MetricSums, "compute", lambda *args: dataclasses.replace(compute(*args), nll=next(nlls))
    )
    said = []
    options = dataclasses.replace(whole[0], patience=2, output=str(tmp_path / "run"))
    assert loop.train(options, said.append).steps == 12  # of the fourth evaluation
    assert said[-1] == "no better in 2 evaluations: stopping early"
