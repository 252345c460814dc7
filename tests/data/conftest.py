"""Files for readers to read, and a store to make batches of."""

import json

import pytest

from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8", newline="")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def dialogues():
    return builtin_dialogues(num_train=30, num_valid=5)


@pytest.fixture(scope="module")
def store(dialogues, tokenizer, tmp_path_factory):
    return build_store(dialogues, tokenizer, tmp_path_factory.mktemp("batches") / "store")
