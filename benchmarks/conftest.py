"""Benchmarks run with two threads unless OMP_NUM_THREADS says otherwise."""

import os

import pytest
import torch

from benchmarks import shapes
from benchmarks.timing import machine
from convai_fast.data.build_store import build_store

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def pytest_report_header() -> str:
    return f"machine: {machine()}"


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dialogues that are measured on, as a store."""
    _, dialogues, tokenizer = shapes.dialogues_and_tokenizer()
    folder = tmp_path_factory.mktemp("bench") / "store"
    build_store(dialogues, tokenizer, folder)
    return str(folder)


@pytest.fixture
def say(capsys: pytest.CaptureFixture):
    """Prints past pytest's capture: the figures are the point."""

    def print_line(line: str) -> None:
        with capsys.disabled():
            print(line)

    return print_line
