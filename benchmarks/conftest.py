"""Benchmarks run with two threads unless OMP_NUM_THREADS says otherwise."""

import os

import pytest
import torch

from benchmarks.timing import machine

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def pytest_report_header() -> str:
    return f"machine: {machine()}"


@pytest.fixture
def say(capsys: pytest.CaptureFixture):
    """Prints past pytest's capture: the figures are the point."""

    def print_line(line: str) -> None:
        with capsys.disabled():
            print(line)

    return print_line
