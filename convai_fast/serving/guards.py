"""What a request has to pass before it is looked at: host, key, kind and size of its body.

Each is an ASGI application around another one; errors have OpenAI's shape.
"""

import asyncio
import hmac
import json
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")


def error_body(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    """An error as OpenAI's clients read it; `param` is the field that it is about."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def refuse(send: Send, status: int, message: str, **headers: str) -> None:
    """Answer with an error."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps(error_body(message, kind)).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class OnlyLocalHosts:
    """Refuses requests for another host name, which a foreign page may have bound to this machine.

    A server that other machines may reach takes any name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = _header(scope, b"host")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.lower() not in _LOCAL_HOSTS:
                await refuse(send, 421, f"this server answers for {_LOCAL_HOSTS[0]} alone")
                return
        await self.app(scope, receive, send)


class KeyRequired:
    """Lets through who sends the key as `Authorization: Bearer KEY`; `open_paths` are for all."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]) -> None:
        self.app, self._key, self._open = app, f"Bearer {key}".encode(), frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A browser asks with OPTIONS, without the key, whether it may ask.
        is_open = scope["type"] != "http" or scope["path"] in self._open
        if not is_open and scope["method"] != "OPTIONS":
            given = _header(scope, b"authorization").encode("latin-1")
            if not hmac.compare_digest(given, self._key):  # takes equally long for any key
                message = "this server asks for a key: send it as Authorization: Bearer KEY"
                await refuse(send, 401, message, www_authenticate="Bearer")
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Takes bodies of JSON alone, of at most so many bytes and seconds (None: any).

    A foreign page can have a browser send other types without asking; for JSON it has to ask.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, most_seconds: float | None) -> None:
        self.app, self.most_bytes, self._most_seconds = app, most_bytes, most_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if _header(scope, b"content-type").split(";")[0].strip().lower() != "application/json":
            await refuse(send, 415, "the body must be JSON, with Content-Type: application/json")
            return
        length = _header(scope, b"content-length")
        if length.isdecimal() and int(length) > self.most_bytes:
            await self._refuse(send)
            return
        try:
            async with asyncio.timeout(self._most_seconds):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the body has not come within {self._most_seconds:g} seconds"
            await refuse(send, 408, message, connection="close")
            return
        if body is None:  # the client has left
            return
        if len(body) > self.most_bytes:
            await self._refuse(send)
            return
        whole: list[Message] = [{"type": "http.request", "body": body}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, receive_whole, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or as much of it as shows that it is too large."""
        body = bytearray()
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > self.most_bytes or not message.get("more_body"):
                return bytes(body)
        return None

    async def _refuse(self, send: Send) -> None:
        await refuse(
            send, 413, f"the body is larger than {self.most_bytes:,} bytes", connection="close"
        )


def _header(scope: Scope, name: bytes) -> str:
    found: list[bytes] = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if found else ""
