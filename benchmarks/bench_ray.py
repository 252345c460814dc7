"""Replies by the actors of a Ray cluster of this machine beside an engine in one process.

python -m pytest benchmarks/bench_ray.py --benchmark-only

What is measured begins with the first request that an engine takes: that a cluster and its engines
begin takes seconds, once. The driver's own cost is measured with actors that answer at once.
"""

import json
import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import shapes
from benchmarks.timing import record
from benchmarks.workers import Work, Worker, take_turns
from convai_fast.bulk.answers import Answers, Replies
from convai_fast.bulk.jsonl import RequestFile
from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.bulk.run import BulkRun
from convai_fast.comparison.measure import ratios
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.identified import IdentifiedRequest
from convai_fast.generation.request import Reply, Request
from convai_fast.terminal import counted

ray = pytest.importorskip("ray", reason="needs ray: pip install 'convai-fast[ray]'")
from convai_fast.bulk import ray as on_ray  # noqa: E402

ROUNDS, NUM_SLOTS, WEIGHTS = 2, 64, "bfloat16"
SHAPE = shapes.GenerateShape(192, new_tokens=16)
NUM_LINES = 20_000
THREADS = torch.get_num_threads()


class Silent(on_ray.Writer):
    """An actor that answers at once."""

    async def write(self, shared: list, requests: Sequence[Request]) -> list[list[Reply]]:
        return [[Reply([5] * 20, "i drink a lot of tea .", "length")] for _ in requests]


def begin_cluster() -> None:
    os.environ.update(PYTHONPATH=str(Path(__file__).parents[1]), RAY_USAGE_STATS_ENABLED="0")
    ray.init(num_cpus=16, log_to_driver=False, logging_level=logging.ERROR)


def seconds_a_reply(answers: Answers, turn: int) -> float:
    """From the first request that an engine takes, which is there by then, to the last reply."""
    _, requests = shapes.generate_requests(SHAPE)
    started: list[float] = []

    def items() -> Iterator[IdentifiedRequest]:
        started.append(time.perf_counter())
        for i, request in enumerate(requests):
            yield IdentifiedRequest(f"{turn} {i}", request)

    for _ in answers.answer(items(), lambda item, reason: None):
        pass
    return (time.perf_counter() - started[0]) / len(requests)


def make_plain() -> Work:
    model, tokenizer = shapes.model_and_tokenizer("gpt2")

    def work(turn: int) -> float:  # with a new engine, as the actors have
        engine = GenerationEngine(model, tokenizer, max_batch_size=NUM_SLOTS, weights=WEIGHTS)
        return seconds_a_reply(Replies(engine), turn)

    return work


def make_ray(number: int, cpus: int) -> Work:
    model, tokenizer = shapes.model_and_tokenizer("gpt2")
    begin_cluster()
    actors = on_ray.Actors(number, cpus, max_batch_size=NUM_SLOTS // number, weights=WEIGHTS)
    return lambda turn: seconds_a_reply(on_ray.RayReplies(actors, model, tokenizer), turn)


def make_driver(number: int, folder: str) -> Work:
    """A whole run of as many silent actors, from the file of requests to that of replies."""
    _, tokenizer = shapes.model_and_tokenizer("gpt2")
    begin_cluster()
    on_ray.Writer = Silent
    path = Path(folder) / "requests.jsonl"

    def work(turn: int) -> float:
        answers = on_ray.RayReplies(on_ray.Actors(number), None, tokenizer)
        output, times = Path(folder) / f"{number}-{turn}", []
        with ReplyFile(output, {}) as file:
            add = file.add
            file.add = lambda *given: (times.append(time.perf_counter()), add(*given))
            BulkRun(answers, RequestFile(path), file, report=lambda line: None).run()
        return (times[-1] - times[0]) / len(times)

    return work


def medians(workers: dict[str, Worker]) -> dict[str, list[float]]:
    turns = take_turns(workers, ROUNDS)
    return {name: [turn.result for turn in done] for name, done in turns.items()}


@pytest.mark.parametrize("number", [1, THREADS])
def test_ray_beside_plain(benchmark, say, number):
    workers = {"plain": Worker(make_plain), "ray": Worker(make_ray, number, THREADS // number)}
    seconds = benchmark.pedantic(lambda: medians(workers), rounds=1)
    plain = statistics.median(seconds["plain"])
    median, least, most = ratios(seconds, "plain", "ray")
    say(f"\n{SHAPE}, {WEIGHTS}, {NUM_SLOTS} at a time, {THREADS} threads")
    say(f"  one process {1 / plain:,.1f} replies/s")
    say(f"  {counted(number, 'actor')}: {median:.2f} x as long ({least:.2f}-{most:.2f})")
    figures = {"replies/s": round(1 / plain, 2), "ratio": round(median, 3)}
    record("ray", f"{SHAPE}, {WEIGHTS}, {counted(number, 'actor')}", figures)


def test_driver(benchmark, say, tmp_path):
    line = {"persona": ["i like tea .", "i have a dog ."], "history": ["hello ! how are you ?"] * 3}
    with open(tmp_path / "requests.jsonl", "w") as file:
        file.writelines(json.dumps({"id": f"{i}", **line}) + "\n" for i in range(NUM_LINES))
    numbers = (1, 2, 4)
    workers = {f"{number}": Worker(make_driver, number, str(tmp_path)) for number in numbers}
    seconds = benchmark.pedantic(lambda: medians(workers), rounds=1)
    figures: dict[str, float | str] = {}
    say(f"\nthe driver's own cost, {NUM_LINES:,} requests")
    for number, each in seconds.items():
        microseconds = 1e6 * statistics.median(each)
        say(f"  {number} actors: {microseconds:.0f} us a reply, {1e6 / microseconds:,.0f} a second")
        figures[f"{number} actors us"] = round(microseconds, 1)
    record("ray", f"driver, {NUM_LINES} requests", figures)
