"""Signals that wait until the engine's state is whole again."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Those whose handlers raise exceptions: Ctrl-C, a request to end, a time limit.
_RAISING = [int(each) for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGALRM")]


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Handles a signal that comes within when all of it is done, as if it came just afterwards.

    Python runs handlers between any two instructions of the main thread; in other threads there is
    nothing to defer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {each: old for each in _RAISING if callable(old := signal.getsignal(each))}
    received: list[tuple[int, FrameType | None]] = []
    is_done = False

    def receive(number: int, frame: FrameType | None) -> None:
        if is_done:  # and the handler before is just being put back
            previous[number](number, frame)
        else:
            received.append((number, frame))

    try:
        for each in previous:
            signal.signal(each, receive)
        yield
    finally:
        is_done = True
        for each, handler in previous.items():
            signal.signal(each, handler)
        for number, frame in received:  # not raised anew, which would wake an event loop twice
            previous[number](number, frame)
