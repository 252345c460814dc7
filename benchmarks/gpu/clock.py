"""Timing on a device: ways in turn, as `benchmarks.timing` has them on a CPU."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu.notes import Setting
from convai_fast.comparison.measure import ratios

Call = Callable[[], object]


def as_graph(function: Call, setting: Setting) -> Call:
    """`function` as a CUDA graph, so that its kernels are timed and not the host; elsewhere itself.

    It may not wait for the device.
    """
    if not setting.is_gpu:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made at a first call is not for the graph
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def in_turn(
    ways: dict[str, Call],
    setting: Setting,
    rounds: int = 9,
    calls: int = 1,
    min_seconds: float = 0.02,
) -> dict[str, list[float]]:
    """Seconds of one of the `calls` that each way makes, in turn (A B C A B C …)."""
    if setting.smoke:
        rounds, min_seconds = 2, 1e-6
    times = timing.compare(ways, rounds, min_seconds, setting.wait)
    return {way: [t / calls for t in seconds] for way, seconds in times.items()}


def figures(times: dict[str, list[float]], ours: str = "convai_fast") -> dict[str, Any]:
    """Microseconds of each way; how many times ours is as fast as each other, pair by pair."""
    values: dict[str, Any] = {}
    for way, seconds in times.items():
        values[f"{way}_us"] = round(statistics.median(seconds) * 1e6, 2)
        if way != ours:
            values |= ratio(times, ours, way)
    return values


def ratio(times: dict[str, list[float]], ours: str, other: str) -> dict[str, Any]:
    """Median and spread of other / ours, pair by pair."""
    median, least, most = ratios(times, ours, other)
    return {f"{other}_ratio": round(median, 2), f"{other}_spread": f"{least:.2f}-{most:.2f}"}


def read_bandwidth(setting: Setting) -> float:
    """Bytes a second of a reduction over memory far larger than any cache: the best of five."""
    large = torch.ones(1 << (22 if setting.smoke else 28), device=setting.device)
    seconds = in_turn({"sum": large.sum, "amax": large.amax}, setting, rounds=5)
    return large.nbytes / min(t for times in seconds.values() for t in times)
