"""The command `generate` on a small model, a model to talk to, and dialogues to prepare."""

import dataclasses
import json

import pytest

from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues
from tests.helpers.bulk_files import read_lines, save_model, write_lines
from tests.helpers.small_tokenizers import save_model_of_letters


@pytest.fixture(scope="module", autouse=True)
def quick(no_measured_speed):
    """Runs are many here, and none is timed."""


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture
def generate(model, tmp_path):
    """Run the command on some requests, into tmp_path / "replies.jsonl"."""

    def generate(*options, requests=None):
        if requests is not None:
            options = ("--input", write_lines(tmp_path / "requests.jsonl", *requests), *options)
        output = str(tmp_path / "replies.jsonl")
        return main(["generate", "--model", model, "--output", output, *map(str, options)])

    return generate


@pytest.fixture
def replies(tmp_path):
    """What the command wrote, by id."""
    return lambda: {line["id"]: line["replies"] for line in read_lines(tmp_path / "replies.jsonl")}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model_of_letters(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A folder with dialogues.json and a tokenizer."""
    folder = tmp_path_factory.mktemp("commands")
    dialogues = builtin_dialogues(num_train=10, num_valid=3)
    (folder / "dialogues.json").write_text(
        json.dumps({s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()})
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder
