"""Signals that end a run, and the random state with which it goes on."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from convai_fast.training.distributed import Ranks


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of every generator that dropout on `device` draws from; needs no device wait."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` returned; the CPU's alone if it comes from another device."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class StoppedError(Exception):
    """A signal asked the run to end."""


class Stop:
    """The signal that asked the run to end: known to all ranks at the same batch."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received = 0  # by this rank
        self.signal: signal.Signals | None = None

    def poll(self) -> bool:
        """Tell the other ranks of a signal, and hear of theirs. Collective."""
        number = self.ranks.largest(self.received)
        self.signal = signal.Signals(number) if number else None
        return self.signal is not None

    def raise_if_asked(self) -> None:
        """Raise StoppedError where a rank has received a signal. Collective."""
        if self.poll():
            raise StoppedError


@contextmanager
def stop_on_signal(ranks: Ranks) -> Iterator[Stop]:
    """Notes SIGINT and SIGTERM in what it yields, so that the run can save before it ends.

    A second signal interrupts at once if it is Ctrl-C and no launcher started this process: a
    launcher or a scheduler may send the same signal more than once.
    """
    stop = Stop(ranks)
    is_launched = "RANK" in os.environ

    def receive(number: int, frame: object) -> None:
        if stop.received:
            if number == signal.SIGINT and not is_launched:
                raise KeyboardInterrupt
            return
        stop.received = number
        if ranks.is_main:
            again = "" if is_launched else " (one more Ctrl-C stops without saving)"
            # Not print, which may be at work just now. Who reads it may be gone already.
            with suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), f"\nsaving, then stopping{again} …\n".encode())

    # Signals reach the main thread alone, and only there can one ask for them.
    is_main_thread = threading.current_thread() is threading.main_thread()
    watched = (signal.SIGINT, signal.SIGTERM) if is_main_thread else ()
    previous = {number: signal.signal(number, receive) for number in watched}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
