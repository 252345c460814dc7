"""One engine for many callers at a time: threads and coroutines, whose requests share its batch."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Iterator
from contextlib import aclosing, suppress
from types import TracebackType

from convai_fast.errors import UserError, reason_of
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.events import Done, Event, Failed, Tokens
from convai_fast.generation.request import Reply, Request

_CLOSED = "the engine is closed and takes no more requests"


class AsyncEngine:
    """Runs an engine in a thread of its own, for callers in others.

    Each caller gets the replies that it would get alone. One that goes away, a generator that is
    closed or a coroutine that is cancelled, frees its slots within a step.

    Args:
        engine: used by that thread alone until `close` has returned; then it is idle, and yours
            again.

    Example:
        >>> with AsyncEngine(engine) as shared:                        # in threads
        ...     replies = shared.generate(request)
        >>> async for event in shared.stream_async(request):           # in coroutines
        ...     print(event.text, end="")
    """

    def __init__(self, engine: GenerationEngine) -> None:
        self.engine = engine
        self._calls: deque[Callable[[], None]] = deque()  # for the engine's thread to make
        self._callers: dict[Hashable, Callable[[Event], None]] = {}
        self._gone: set[Hashable] = set()  # callers that need no reply any more
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- threads --------------------------------------------------------------------------------

    def generate(self, request: Request) -> list[Reply]:
        """The replies to a request.

        Raises:
            UserError: it cannot be answered, or the engine is closed.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        id = self._ask(request, events.put)
        try:
            return _replies(events.get())
        finally:
            self._forget(id)

    def stream(self, request: Request) -> Iterator[Tokens]:
        """Yield the tokens of a request's replies as they are drawn; see `Tokens`.

        The request is made when the first of them is asked for.

        Raises:
            UserError: what `generate` raises, or that `best_of` chooses among whole replies, which
                cannot be streamed; with the first tokens, not with the call. If a step fails, with
                the tokens that it would have given.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        id = self._ask(request, events.put, stream=True)
        try:
            while isinstance(event := events.get(), Tokens):
                yield event
            _replies(event)
        finally:
            self._forget(id)

    # --- coroutines -----------------------------------------------------------------------------

    async def generate_async(self, request: Request) -> list[Reply]:
        """As `generate`, without blocking the event loop."""
        events, put = _async_queue()
        id = self._ask(request, put)
        try:
            return _replies(await events.get())
        finally:
            self._forget(id)

    async def stream_async(self, request: Request) -> AsyncIterator[Tokens]:
        """As `stream`, also in when it raises, without blocking the event loop."""
        async with aclosing(self.events_async(request, stream=True)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    yield event
                else:
                    _replies(event)

    async def events_async(
        self, request: Request, *, stream: bool = False
    ) -> AsyncGenerator[Event]:
        """Yield what the engine tells of a request: with `stream` tokens, and at last how it ends.

        Raises UserError if the engine is closed.
        """
        events, put = _async_queue()
        id = self._ask(request, put, stream=stream)
        try:
            while isinstance(event := await events.get(), Tokens):
                yield event
            yield event
        finally:
            self._forget(id)

    # --- the engine's thread --------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return not self._is_closed

    def close(self) -> None:
        """Take no more requests, and wait until those that are under way are answered.

        A stream whose first tokens nobody has asked for yet is not under way.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self, request: Request, put: Callable[[Event], None], *, stream: bool = False
    ) -> Hashable:
        """Let the engine take a request and `put` its events; returns its id."""
        id = object()

        def add() -> None:
            if id in self._gone:  # before its turn: to read its prompt would keep the others
                return
            self._callers[id] = put
            try:
                self.engine.add(id, request, stream=stream)
            except Exception as error:  # also what is no request at all
                del self._callers[id]
                reason = str(error) if isinstance(error, UserError) else reason_of(error)
                put(Failed(id, reason, is_requests_fault=True))

        self._call(add)
        return id

    def _forget(self, id: Hashable) -> None:
        def cancel() -> None:
            self._gone.discard(id)
            self._callers.pop(id, None)
            self.engine.cancel(id)

        self._gone.add(id)
        with suppress(UserError):  # closed: whatever is under way will end, and nobody listens
            self._call(cancel)

    def _call(self, call: Callable[[], None]) -> None:
        with self._changed:
            if self._is_closed:
                raise UserError(_CLOSED)
            self._calls.append(call)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._take_turn():
                pass
        finally:  # nobody waits for ever, whatever has happened
            with self._changed:
                self._is_closed = True
            for id, put in self._callers.items():
                put(Failed(id, _CLOSED))

    def _take_turn(self) -> bool:
        """Do what was asked for meanwhile, and a step; False when the engine is closed and done."""
        with self._changed:
            while not (self._calls or self.engine.num_unfinished or self._is_closed):
                self._changed.wait()
            calls, self._calls = self._calls, deque()
            is_last = self._is_closed
        for call in calls:
            call()
        if self.engine.num_unfinished:
            self._step()
        return bool(self.engine.num_unfinished) or not is_last

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:  # no memory, say: those under way fail, and others may come
            events = [Failed(id, reason_of(error)) for id in self._callers]
            for event in events:
                self.engine.cancel(event.id)
        for event in events:
            put = self._callers.get(event.id)
            if not isinstance(event, Tokens):
                self._callers.pop(event.id, None)
            if put is not None:
                put(event)


def _async_queue() -> tuple["asyncio.Queue[Event]", Callable[[Event], None]]:
    """A queue of the running event loop, and what puts into it from another thread."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(events.put_nowait, event)

    return events, put


def _replies(event: Event) -> list[Reply]:
    if isinstance(event, Failed):
        raise UserError(event.reason)
    assert isinstance(event, Done)
    return list(event.replies)
