"""A run whose batches are as many examples as a budget of tokens takes."""

import dataclasses
import json

from convai_fast.training import loop, step
from convai_fast.training.interruption import StoppedError
from convai_fast.training.options import TrainOptions
from tests.helpers.killed_runs import assert_equal_runs


def test_a_run_by_tokens_that_stops_within_an_epoch_ends_as_one_that_did_not(
    run_options, tmp_path, monkeypatch
):
    options = dataclasses.replace(run_options, train_batch_tokens=500, eval_before_start=False)
    take, said = step.TrainStep.take, []

    def stop_at_7(train_step, number, *arguments):
        if number == 7:
            raise StoppedError
        take(train_step, number, *arguments)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = loop.train(dataclasses.replace(options, output=str(whole)), said.append)
    assert f"{expected.steps} optimizer steps of up to 500 x 3 tokens" in "".join(said)
    with monkeypatch.context() as patch:
        patch.setattr(step.TrainStep, "take", stop_at_7)
        loop.train(dataclasses.replace(options, output=str(stopped)), lambda _: None)
    progress = json.loads((stopped / "last" / "metrics.json").read_text())
    assert (progress["step"], progress["epoch"]) == (6, 1)
    assert loop.train(TrainOptions(resume=str(stopped)), lambda _: None).steps == expected.steps
    assert_equal_runs(whole, stopped)
