"""A model behind OpenAI's HTTP interface: one engine, whose batch all callers share."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from convai_fast.bulk.request_line import named_as_in, read_object
from convai_fast.errors import UserError
from convai_fast.generation.async_engine import AsyncEngine
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.events import Done, Event, Failed, Tokens
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import prompt_room
from convai_fast.serving.guards import BodyLimit, KeyRequired, OnlyLocalHosts, error_body
from convai_fast.serving.metrics import Metrics
from convai_fast.serving.openai_api import Answer, Asked, Kind, field_of, read_body, usage_of
from convai_fast.serving.page import page
from convai_fast.serving.schema import described, errors

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_SECONDS_FOR_THE_LAST = 1.0  # of a stream, that it has taken too long
_HTTP_ERRORS = {404: "there is nothing at this address", 405: "this address takes another method"}


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
        model: the name under which it is asked for.
        params: how replies are drawn where a request does not say.
        max_history: exchanges of history that the model sees.
        max_requests: that are answered or wait at a time, each as often as it draws replies; more
            are refused.
        max_body_bytes: of a request.
        timeout_s: seconds that a body may take, and then its answer; 0: as long as they take.
        api_key: that requests must give; empty: none.
        allow_origins: of pages whose scripts may ask (CORS).
        only_local: whether only names of this machine are answered for.
    """

    model: str
    params: SamplingParams = field(default_factory=SamplingParams)
    max_history: int = 2
    max_requests: int = 512
    max_body_bytes: int = 1 << 18
    timeout_s: float = 60.0
    api_key: str = ""
    allow_origins: tuple[str, ...] = ()
    only_local: bool = True


class RefusedError(Exception):
    """A request that gets an error for an answer, and nobody else's fault."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return error_body(str(self), kind, self.code, self.param)


def make_app(engine: GenerationEngine, settings: Settings) -> FastAPI:
    """The application; its engine works in a thread of its own, from start to shutdown."""
    server = _Server(engine, settings)
    app = FastAPI(
        title="convai_fast", lifespan=server.lifespan, docs_url=None, redoc_url=None, version="1"
    )
    app.add_exception_handler(RefusedError, _answer_refused)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_unexpected)
    chat, text = described("chat"), described("text")
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], openapi_extra=chat)
    app.add_api_route("/v1/completions", server.complete, methods=["POST"], openapi_extra=text)
    app.add_api_route("/", page, response_class=HTMLResponse, include_in_schema=False)
    others: dict[str, Any] = {"openapi_extra": {"responses": errors()}}
    app.add_api_route("/v1/models", server.models, **others)
    app.add_api_route("/v1/models/{name:path}", server.model, **others)
    app.add_api_route("/health", server.health, **others)
    app.add_api_route("/metrics", server.show_metrics, response_class=PlainTextResponse, **others)
    app.add_middleware(
        BodyLimit, most_bytes=settings.max_body_bytes, most_seconds=settings.timeout_s or None
    )
    if settings.api_key:
        app.add_middleware(KeyRequired, key=settings.api_key, open_paths=["/", "/health"])
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a browser sends some of its own
        )
    if settings.only_local:
        app.add_middleware(OnlyLocalHosts)
    return app


class _Server:
    """What the addresses answer."""

    def __init__(self, engine: GenerationEngine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._shared: AsyncEngine | None = None
        self._started = int(time.time())
        self._num_open = 0
        self.metrics = Metrics(lambda: engine.load)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Has the engine's thread run; at the end what is under way is answered."""
        self._shared = AsyncEngine(self._engine)
        yield
        shared, self._shared = self._shared, None
        await asyncio.to_thread(shared.close)

    # --- addresses ------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Answer the last turn of a conversation (OpenAI's chat completions)."""
        return await self._answer(request, "chat")

    async def complete(self, request: Request) -> Response:
        """Answer a text (OpenAI's completions)."""
        return await self._answer(request, "text")

    async def models(self) -> dict[str, Any]:
        """The one model, in a list."""
        return {"object": "list", "data": [await self.model(self._settings.model)]}

    async def model(self, name: str) -> dict[str, Any]:
        """The model, if that is its name."""
        if name != self._settings.model:
            raise self._no_model(name)
        owner = {"object": "model", "created": self._started, "owned_by": "convai_fast"}
        return {"id": name, **owner}

    def _no_model(self, name: str) -> RefusedError:
        message = f"there is no model {name!r} here, but {self._settings.model!r}"
        return RefusedError(404, message, "model_not_found")

    async def health(self) -> JSONResponse:
        """Whether requests are answered."""
        is_ready = self._shared is not None and self._shared.is_open
        return JSONResponse({"status": "ok" if is_ready else "closed"}, 200 if is_ready else 503)

    async def show_metrics(self) -> Response:
        """Counters, for Prometheus."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    # --- completions ----------------------------------------------------------------------------

    async def _answer(self, request: Request, kind: Kind) -> Response:
        started, path, status = time.perf_counter(), request.url.path, 500
        try:
            response = await self._respond(request, kind, started)
            status = response.status_code
            return response
        except RefusedError as error:
            status = error.status
            raise
        finally:
            self.metrics.requests.labels(path, status).inc()

    async def _respond(self, request: Request, kind: Kind, started: float) -> Response:
        settings, engine = self._settings, self._shared
        try:
            body = read_object(await request.body())
            asked = read_body(body, kind, settings.params, settings.max_history)
            with named_as_in(body):  # whose words the engine would not know
                for each in asked.requests:
                    positions = self._engine.model.config.n_positions
                    prompt_room(positions, each.params, self._engine.layout)
        except UserError as error:
            raise RefusedError(400, str(error), param=field_of(str(error), kind)) from None
        if asked.model not in (None, settings.model):
            raise self._no_model(asked.model)
        if engine is None or not engine.is_open:
            raise RefusedError(503, "the server is closing")
        count = sum(each.params.num_drafts for each in asked.requests)
        if count > settings.max_requests:
            message = f"this asks for {count:,} replies, but at most {settings.max_requests:,} are"
            raise RefusedError(400, f"{message} written at a time: ask for fewer in one request")
        if self._num_open + count > settings.max_requests:
            raise RefusedError(429, "too many requests are waiting: try again later", "queue_full")
        answer = Answer(kind, settings.model, self._engine.tokenizer)
        self._num_open += count
        if asked.stream:
            return await self._stream(request, engine, asked, answer, started)
        try:
            done = await _unless_left(request, self._whole(engine, asked))
        finally:
            self._num_open -= count
        self._count(done, started)
        return JSONResponse(answer.whole(done))

    async def _whole(self, engine: AsyncEngine, asked: Asked) -> list[Done]:
        """What came of each request, all of them at a time."""

        async def one(each: Any) -> Done:
            async with aclosing(engine.events_async(each)) as events:
                return _done(await anext(events))

        tasks = [asyncio.ensure_future(one(each)) for each in asked.requests]
        try:
            async with asyncio.timeout(self._settings.timeout_s or None):
                return await asyncio.gather(*tasks)
        except TimeoutError:
            raise self._too_late() from None
        finally:
            for task in tasks:
                task.cancel()

    async def _stream(
        self, client: Request, engine: AsyncEngine, asked: Asked, answer: Answer, started: float
    ) -> Response:
        """Chunks as the tokens are drawn; what fails before the first is an error by itself."""
        (request,) = asked.requests
        events = engine.events_async(request, stream=True)
        deadline = started + (self._settings.timeout_s or float("inf"))

        async def close() -> None:
            self._num_open -= request.params.num_drafts
            await events.aclose()

        try:
            first = await _unless_left(client, self._next(events, deadline))
        except BaseException:
            await close()
            raise
        if isinstance(first, Tokens):
            self.metrics.first_token_seconds.observe(time.perf_counter() - started)
        chunks = self._chunks(first, events, asked, answer, started, deadline)
        return _EventStream(chunks, close, deadline)

    async def _chunks(
        self,
        first: Tokens | Done,
        events: AsyncGenerator[Event],
        asked: Asked,
        answer: Answer,
        started: float,
        deadline: float,
    ) -> AsyncIterator[bytes]:
        event, began = first, time.perf_counter()
        for chunk in answer.opening(asked.requests[0].params.n):
            yield _sent(chunk)
        try:
            while isinstance(event, Tokens):
                yield _sent(answer.chunk(event))
                event = await self._next(events, deadline)
        except RefusedError as error:
            yield _sent(error.body)
            return
        for chunk in answer.ending(event):
            yield _sent(chunk)
        if asked.tells_usage:
            yield _sent(answer.usage(event))
        yield b"data: [DONE]\n\n"
        self._count([event], started)
        if (count := usage_of([event])["completion_tokens"]) > 1:
            self.metrics.token_seconds.observe((time.perf_counter() - began) / (count - 1))

    async def _next(self, events: AsyncGenerator[Event], deadline: float) -> Tokens | Done:
        left = deadline - time.perf_counter()
        try:
            event = await asyncio.wait_for(anext(events), None if left == float("inf") else left)
        except TimeoutError:
            raise self._too_late() from None
        return event if isinstance(event, Tokens) else _done(event)

    def _too_late(self) -> RefusedError:
        return RefusedError(504, f"not answered within {self._settings.timeout_s:g} seconds")

    def _count(self, done: list[Done], started: float) -> None:
        usage = usage_of(done)
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.reply_tokens.inc(usage["completion_tokens"])
        self.metrics.request_seconds.observe(time.perf_counter() - started)


class _EventStream(StreamingResponse):
    """Server-sent events; `close` is called when they end or the client has left.

    A client that does not read them all by the deadline is left.
    """

    def __init__(
        self, chunks: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], deadline: float
    ) -> None:
        # A proxy shall pass each on as it comes.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._close, self._deadline = close, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `StreamingResponse`."""
        left = self._deadline - time.perf_counter() + _SECONDS_FOR_THE_LAST
        try:
            async with asyncio.timeout(None if left == float("inf") else left):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _LOG.warning("a client has read too slowly, and its stream is cut off")
        finally:
            await self._close()


async def _unless_left(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """What `answer` gives; it is cancelled when the client leaves."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    own, left = asyncio.ensure_future(answer), asyncio.ensure_future(leave())
    try:
        await asyncio.wait([own, left], return_when=asyncio.FIRST_COMPLETED)
        if not own.done():
            raise RefusedError(499, "the client has left")
        return own.result()
    finally:
        own.cancel()
        left.cancel()
        await asyncio.gather(own, left, return_exceptions=True)


def _done(event: Event) -> Done:
    if isinstance(event, Failed):
        if not event.is_requests_fault:
            _LOG.error("no reply: %s", event.reason)
        raise RefusedError(400 if event.is_requests_fault else 500, event.reason)
    assert isinstance(event, Done)
    return event


def _sent(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


async def _answer_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = _HTTP_ERRORS.get(error.status_code, str(error.detail))
    return JSONResponse(
        RefusedError(error.status_code, message).body, error.status_code, error.headers
    )


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(RefusedError(500, "the server has failed: its log says why").body, 500)
