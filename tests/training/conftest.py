"""What the tests of training share: dialogues, a store, a shape without weights, options."""

import dataclasses
import json
import shutil

import pytest

from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.training import loop
from convai_fast.training.options import TrainOptions
from tests.helpers.killed_runs import STEPS


@pytest.fixture(scope="module", autouse=True)
def quick(no_measured_speed):
    """Runs are many here, and none is timed."""


@pytest.fixture(scope="module")
def dialogues():
    return builtin_dialogues(num_train=8, num_valid=3)


@pytest.fixture(scope="module")
def store(dialogues, tokenizer, tmp_path_factory):
    return build_store(dialogues, tokenizer, tmp_path_factory.mktemp("training") / "store")


@pytest.fixture
def options(tmp_path):
    return TrainOptions(
        output=str(tmp_path / "run"),
        dataset_cache=str(tmp_path / "cache"),
        precision="fp32",
        device="cpu",
        n_epochs=2,
        gradient_accumulation_steps=3,
        lr=1e-3,
        log_every=1,
    )


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    """A folder with the shape of a tiny model and a tokenizer, but no weights."""
    folder = tmp_path_factory.mktemp("model") / "shape"
    tokenizer.save_pretrained(folder)
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def data_file(dialogues, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dialogues.json"
    path.write_text(
        json.dumps({s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()})
    )
    return path


@pytest.fixture(scope="module")
def run_options(model_folder, data_file, tmp_path_factory):
    """Dropout, accumulation, and saving and logging at steps that fall together only sometimes."""
    return TrainOptions(
        model=str(model_folder),
        from_scratch=True,
        dataset_path=str(data_file),
        dataset_cache=str(tmp_path_factory.mktemp("cache")),
        precision="fp32",
        device="cpu",
        n_epochs=2,
        train_batch_size=2,
        gradient_accumulation_steps=3,
        valid_batch_size=6,
        lr=1e-2,
        eval_before_start=True,
        log_every=3,
        save_every=2,
    )


@pytest.fixture(scope="module")
def undisturbed(run_options, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = loop.train(dataclasses.replace(run_options, output=str(run)), lambda _: None)
    assert result.steps == STEPS
    return run


@pytest.fixture
def killed(undisturbed, tmp_path):
    """A run in the middle of its second epoch; a copy of one that is at rest serves as well."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    return run
