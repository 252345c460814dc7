"""What the tests of training share: dialogues, a store, a shape without weights, options."""

import dataclasses
import json

import pytest

from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.training.options import TrainOptions


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
