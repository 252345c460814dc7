"""What is logged of a step is what that step did."""

import dataclasses
import json
from pathlib import Path

import pytest

from convai_fast.training.loop import train
from convai_fast.training.optimizer import lr_factor


def test_a_record_has_the_learning_rate_with_which_its_step_was_taken(
    options, model_folder, data_file
):
    options = dataclasses.replace(
        options, model=str(model_folder), dataset_path=(str(data_file),), from_scratch=True
    )
    options.max_steps, options.warmup_steps = 4, 1
    train(options, lambda _: None)
    lines = Path(options.output, "metrics.jsonl").read_text().splitlines()
    rates = [record["lr"] for record in map(json.loads, lines) if record["split"] == "train"]
    assert rates == pytest.approx([options.lr * lr_factor(step, 1, 4) for step in range(4)])
    assert rates[-1] > 0
