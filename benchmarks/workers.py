"""Ways to do the same work, each in a process of its own and called in turn.

A process of its own has its own memory, so that its peak can be told, and its own settings of the
allocator, so that what one way does to them is no help to the other.
"""

import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from convai_fast.comparison.measure import ratios

Work = Callable[[int], Any]  # called with the number of the round


@dataclass(frozen=True)
class Turn:
    """One call of a worker: how long it took, what it returned, and its process's peak memory."""

    seconds: float
    result: Any
    peak_mb: float


def pairwise(turns: dict[str, list[Turn]], ours: str, other: str) -> tuple[float, float, float]:
    """Median, smallest and largest of other's seconds / ours, pair by pair."""
    seconds = {name: [turn.seconds for turn in done] for name, done in turns.items()}
    return ratios(seconds, ours, other)


class Worker:
    """Runs `make(*arguments)`, which gives the work, in another process."""

    def __init__(self, make: Callable[..., Work], *arguments: Any, repeats: int = 1) -> None:
        """With `repeats`, a turn does its work so often, and its time is the median of them.

        A process that has been idle for a minute finds its memory cold: one that needs a tenth of
        the other's time is measured as it is in use, when it is not idle nine tenths of the time.
        """
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(
            target=_serve, args=(theirs, threads, repeats, make, arguments), daemon=True
        )
        self._process.start()

    def run(self, turn: int) -> Turn:
        """Do the work of round `turn` and wait for it."""
        self._connection.send(turn)
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


class PeerProcess:
    """A peer of `benchmarks.peers` in a process, which may be that of another environment."""

    def __init__(
        self,
        python: str,
        peer: str,
        folder: Path,
        number_format: str,
        environment: dict[str, str],
    ) -> None:
        threads = str(torch.get_num_threads())
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.serve", peer, str(folder), number_format, threads],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": threads, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._answer()
        self.missing: str | None = hello.get("missing")  # the module that it lacks
        self.version: str | None = hello.get("version")

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended: {' '.join(self._process.args)}")
        return json.loads(line)

    def run(self, request: tuple) -> Turn:
        """Send `request`, the arguments of the peer's `generate`, and wait for the replies."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Turn(**self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def _serve(
    connection: Connection,
    threads: int,
    repeats: int,
    make: Callable[..., Work],
    arguments: tuple,
) -> None:
    torch.set_num_threads(threads)
    work = make(*arguments)
    while True:
        turn = connection.recv()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            result = work(turn)
            times.append(time.perf_counter() - started)
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send(Turn(statistics.median(times), result, peak_kb / 1e3))


def take_turns(workers: dict[str, Worker], rounds: int, warm_up: int = 1) -> dict[str, list[Turn]]:
    """All workers in turn (A B C A B C …), `rounds` times after `warm_up` rounds that do not count.

    Every worker does the work of round 0, 1, 2, …
    """
    turns: dict[str, list[Turn]] = {name: [] for name in workers}
    for i in range(warm_up + rounds):
        for name, worker in workers.items():
            turns[name].append(worker.run(i))
    for worker in workers.values():
        worker.close()
    return {name: done[warm_up:] for name, done in turns.items()}
