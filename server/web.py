"""HTTP below the routes: limits of connections and bodies, clients that go away, server-sent events, metrics."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError

encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps() would make one anew
DISCARD = 64 << 20  # bytes of a too large body that are read nevertheless: most clients hear nothing while they send
LAST_WORDS = 1.0  # seconds to tell a client that its time is up


class Connection(H11Protocol):
    """uvicorn's, but its timeout_keep_alive (seconds) ends every wait for a client: also that for a first request, for
    the rest of a header that has begun, and for somebody to read what was written."""

    idle: asyncio.TimerHandle | None = None  # while no request is being answered
    unread: asyncio.TimerHandle | None = None  # while too much is unread to write more, or to close

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._time_idleness()

    def handle_events(self) -> None:
        super().handle_events()
        self._time_idleness()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_idleness()

    def _time_idleness(self) -> None:
        answering = self.cycle and not self.cycle.response_complete
        if answering and self.idle:
            self.idle.cancel()
            self.idle = None
        elif not answering and not self.idle:  # a piece of a header does not begin it anew
            self.idle = self.loop.call_later(self.timeout_keep_alive, self._close)

    def _close(self) -> None:
        self.transport.close()  # when all is read
        self._time_reading()

    def _time_reading(self, before: int | None = None) -> None:
        size = self.transport.get_write_buffer_size()
        if size == before:
            self.transport.abort()
        else:
            self.unread = self.loop.call_later(self.timeout_keep_alive, self._time_reading, size)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self.unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self.idle, self.unread)):
            timer.cancel()


class ClientGone(Exception):
    """The client closed the connection."""


async def read_limited(request: Request, limit: int, seconds: float) -> bytes:
    """The body. ApiError 413 for one of more than `limit` bytes, 408 for one that takes too long, 400 for a form."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page elsewhere can make a browser send forms, but not JSON, without being asked
        raise ApiError(400, f"Content-Type is {kind[:80]}, not application/json")
    size = int(request.headers.get("content-length") or 0)
    try:
        body, size = await asyncio.wait_for(_read(request, limit, size), seconds)
    except asyncio.TimeoutError:
        text = f"the body did not come within {seconds:g} seconds"
        raise ApiError(408, text, headers={"Connection": "close"}) from None
    if size > limit:
        text = f"the body has {size} bytes or more; at most {limit} are allowed"
        raise ApiError(413, text, code="request_too_large", headers={"Connection": "close"})
    return body


async def _read(request: Request, limit: int, size: int) -> tuple[bytes, int]:
    body, read = bytearray(), 0
    if size <= DISCARD:
        async for piece in request.stream():
            read += len(piece)
            if max(read, size) <= limit:
                body += piece
            elif read > DISCARD:
                break
    return bytes(body), max(read, size)


async def until_gone(receive: Receive, work: Awaitable, seconds: float) -> Any:
    """The result of `work`, unless the client goes away (ClientGone) or the time is up (TimeoutError) before."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if watch.done() else TimeoutError
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sse(data: dict, event: str | None = None) -> bytes:
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {encode_json(data)}\n\n".encode()


class Plumbing:
    """ASGI middleware for what clients do to addresses: a route is found without its /v1, with slashes too many, and by
    HEAD where there is a GET. Each answer has the x-request-id that the client sent, or one of its own."""

    def __init__(self, app: ASGIApp, paths: Collection[str]):
        self.app, self.paths = app, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        head = scope["method"] == "HEAD"
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if re.fullmatch(rb"[!-~]{1,200}", given) else uuid.uuid4().hex.encode()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), (b"x-request-id", name)]}
            elif head:
                message = message | {"body": b""}
            await send(message)

        method = "GET" if head else scope["method"]
        await self.app(scope | {"path": self._path(scope["path"]), "method": method}, receive, answer)

    def _path(self, path: str) -> str:
        path = re.sub("/+", "/", path).rstrip("/") or "/"
        first = path.split("/")[1]
        return f"/v1{path}" if first in self.paths else path


class EventStream(Response):
    """Server-sent events from an iterator of bytes. `finish` is called at the end, whatever the end is; `failure` makes
    the last event of a stream whose time is up."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        seconds: float,
        finish: Callable[[], None],
        failure: Callable[[ApiError], bytes],
    ):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.events, self.seconds, self.finish, self.failure = events, seconds, finish, failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send_all(send), self.seconds)
        except ClientGone:
            pass
        except TimeoutError:
            error = ApiError(504, f"the answer was not complete after {self.seconds:g} seconds", code="timeout")
            try:
                last = {"type": "http.response.body", "body": self.failure(error), "more_body": False}
                await asyncio.wait_for(send(last), LAST_WORDS)
            except asyncio.TimeoutError:  # nobody reads
                pass
        finally:
            self.finish()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Metrics:
    """What /metrics shows. An ASGI middleware counts the requests; the routes count tokens."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("minimind_requests", "HTTP requests, by route and status", ["route", "status"], **own)
        self.seconds = Histogram("minimind_request_seconds", "Time to the end of an answer", ["route"], **own)
        self.first_token = Histogram("minimind_first_token_seconds", "Time to the first token", **own)
        self.prompt_tokens = Counter("minimind_prompt_tokens", "Tokens of prompts", **own)
        self.generated_tokens = Counter("minimind_generated_tokens", "Tokens generated", **own)
        self.cancelled = Counter("minimind_cancelled_requests", "Requests cut off: client gone or time up", **own)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"minimind_{name}", text, registry=self.registry).set_function(value)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        async def observed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            begin, status = time.perf_counter(), 499  # 499: the client left before there was an answer

            async def observe(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            try:
                await app(scope, receive, observe)
            finally:
                route = getattr(scope.get("route"), "path", "other")
                self.requests.labels(route, status).inc()
                self.seconds.labels(route).observe(time.perf_counter() - begin)

        return observed
