"""What a run says of itself."""

import dataclasses
import json

from convai_fast.training import loop
from convai_fast.training.options import TrainOptions
from convai_fast.training.summary import TrainResult, conclude


def test_an_ended_run_names_its_best_checkpoint_its_figures_and_its_time(tmp_path):
    (tmp_path / "best").mkdir()
    figures = {"step": 1500, "nll": 2.5, "ppl": 12.18, "hits@1": 0.561}
    (tmp_path / "best" / "metrics.json").write_text(json.dumps(figures))
    result = TrainResult(
        run=tmp_path,
        options=TrainOptions(),
        before=None,
        after=None,
        stopped_by=None,
        steps=2000,
        seconds=3725,
        is_resumed=True,
        tokens_per_second=7908.0,
        mfu=0.35,
    )
    assert list(conclude(result)) == [
        f"best checkpoint: {tmp_path}/best, of step 1,500: nll 2.500, perplexity 12.18, "
        "hits@1 56.1%",
        "2,000 steps in 1:02:05, all sessions together; 7,908 tokens/s, using 35% of what the "
        "device can multiply",
    ]
    (tmp_path / "best" / "metrics.json").write_text(json.dumps({"step": 2000}))  # no validation
    rest = dataclasses.replace(result, is_resumed=False, tokens_per_second=0.0)
    assert list(conclude(rest)) == [
        f"best checkpoint: {tmp_path}/best, of step 2,000",
        "2,000 steps in 1:02:05",
    ]
    (tmp_path / "best").rename(tmp_path / "last")  # as in a run of which only that was copied
    assert next(conclude(rest)) == f"last checkpoint: {tmp_path}/last, of step 2,000"


def test_a_run_tells_that_examples_have_too_few_candidates(run_options, tmp_path):
    said = []
    options = dataclasses.replace(
        run_options, num_candidates=50, n_epochs=0, eval_before_start=False
    )
    loop.train(dataclasses.replace(options, output=str(tmp_path / "run")), said.append)
    (line,) = (line for line in said if "fewer than 50 candidates" in line)
    assert "(fewest 20, on average 20.0) and are learnt with those: add candidates" in line


def test_a_run_tells_that_there_is_nothing_to_choose_from_in_validation(run_options, tmp_path):
    options = dataclasses.replace(run_options, n_epochs=0, eval_before_start=False)
    alone = dataclasses.replace(options, fill_candidates=1, dataset_path=(str(tmp_path / "a.csv"),))
    (tmp_path / "a.csv").write_text("prompt,response\n" + "hi,hello\nhow,so\n" * 10)
    for number, (given, is_told) in enumerate([(options, False), (alone, True)]):
        said = []
        run = dataclasses.replace(given, output=str(tmp_path / f"run{number}"))
        loop.train(run, said.append)
        assert any("hits@1 says nothing there" in line for line in said) == is_told
