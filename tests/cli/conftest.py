"""The command `generate` on a small model, and a model to talk to."""

import pytest
from bulk import read_lines, save_model, write_lines

from convai_fast.cli.main import main
from tests.tokenizers_of_letters import save_model_of_letters


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
