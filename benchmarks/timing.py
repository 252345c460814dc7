"""Timing that holds on a noisy machine: the ways to compare run in turn, ratios pair by pair."""

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from convai_fast.hardware import processor_name

RESULTS = Path(__file__).parent / "results.jsonl"


def seconds_per_call(
    function: Callable[[], object],
    min_seconds: float = 0.02,
    wait: Callable[[], object] | None = None,
) -> float:
    """Mean time of one call, over as many calls as `min_seconds` needs.

    `wait` waits for a device that computes behind the host. Calls are queued, as many as there were
    so far, before it is waited for again.
    """
    calls, elapsed = 0, 0.0
    started = time.perf_counter()
    while elapsed < min_seconds:
        more = max(1, calls) if wait else 1
        for _ in range(more):
            function()
        if wait:
            wait()
        calls += more
        elapsed = time.perf_counter() - started
    return elapsed / calls


@cache
def memory_bandwidth() -> float:
    """Bytes a second of one read of memory: the best of five tries, since it is a limit."""
    large = torch.randn(64 << 20)
    return large.nbytes / min(seconds_per_call(large.sum, 0.1) for _ in range(5))


def compare(
    ways: dict[str, Callable[[], object]],
    rounds: int = 15,
    min_seconds: float = 0.02,
    wait: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call of each way, `rounds` times in turn (A B C A B C …) after one warm-up.

    `min_seconds` and `wait` are those of `seconds_per_call`.
    """
    for function in ways.values():
        function()
    if wait:
        wait()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, function in ways.items():
            times[name].append(seconds_per_call(function, min_seconds, wait))
    return times


def machine() -> str:
    """The processor and torch, in a few words."""
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} threads, {capability}, torch {torch.__version__}"


def record(benchmark: str, workload: str, figures: dict[str, float | str]) -> None:
    """Append one line to results.jsonl, which is not under version control."""
    line = {
        "benchmark": benchmark,
        "workload": workload,
        "machine": machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        **figures,
    }
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
