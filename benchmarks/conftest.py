"""Benchmarks run with two threads unless OMP_NUM_THREADS says otherwise."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import shapes
from benchmarks.timing import machine
from convai_fast.data.build_store import build_store

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="the Python that runs a file of benchmarks/peers, if not this one",
    )


def pytest_report_header() -> str:
    return f"machine: {machine()}"


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dialogues that are measured on, as a store."""
    _, dialogues, tokenizer = shapes.dialogues_and_tokenizer()
    folder = tmp_path_factory.mktemp("bench") / "store"
    build_store(dialogues, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="session")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Format -> GFLOP/s (or GOP/s) that the instructions could do, where that is known."""
    program = tmp_path_factory.mktemp("peak") / "peak"
    source = Path(__file__).with_name("peak.cpp")
    built = subprocess.run(["c++", "-O2", "-pthread", source, "-o", program], capture_output=True)
    if built.returncode:  # another processor, or no compiler
        return {}
    command = [program, str(torch.get_num_threads())]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(lines[::2], map(float, lines[1::2]), strict=True))


@pytest.fixture
def say(capsys: pytest.CaptureFixture):
    """Prints past pytest's capture: the figures are the point."""

    def print_line(line: str) -> None:
        with capsys.disabled():
            print(line)

    return print_line
