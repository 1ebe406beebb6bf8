"""From a request for an answer to its response, whole or as a stream.

answering = Answering(app, service, runner, metrics, Limits(timeout=300))
response = await answering.answer(request, service.prepare_chat, ChatReply)
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import Response

from server.errors import ApiError
from server.replies import Reply
from server.runner import Job, Overloaded, Runner, Update
from server.service import Service
from server.web import EventStream, Metrics, read_limited, until_gone


@dataclass
class Limits:
    """Who may ask, for how much, for how long."""

    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()  # web pages from elsewhere that may use it
    timeout: float = 300  # seconds for a request
    max_body: int = 4 << 20  # bytes of a request


@dataclass
class Answering:
    """From a request for an answer to its response, whole or as a stream."""

    app: FastAPI
    service: Service
    runner: Runner
    metrics: Metrics
    limits: Limits

    async def body(self, http: Request) -> bytes:
        return await read_limited(http, self.limits.max_body, self.limits.timeout)

    async def answer(self, http: Request, prepare: Callable, reply_type: type[Reply]) -> Response:
        begin = time.monotonic()
        if not self.runner.room(1):  # before there is work with it
            raise self._overloaded()
        request, job = await asyncio.to_thread(prepare, await self.body(http))
        try:
            self.runner.submit(job)
        except Overloaded:
            raise self._overloaded() from None
        self.app.state.active += 1
        reply = reply_type(request, job, self.service.tokenizer, request.model or self.service.settings.model_name)

        def finish() -> None:
            self._finish(reply, job)

        seconds = self.limits.timeout - (time.monotonic() - begin)
        if request.stream:
            return EventStream(self._events(reply, job, begin), seconds, finish, reply.failure)
        try:
            updates = await until_gone(http.receive, self._all_updates(job, begin), seconds)
            # In a thread: that of many choices with log-probabilities takes a second.
            content = await asyncio.to_thread(lambda: json.dumps(reply.whole(updates), ensure_ascii=False))
            return Response(content, media_type="application/json")
        except TimeoutError:
            text = f"the answer was not complete after {self.limits.timeout:g} seconds"
            raise ApiError(504, text, code="timeout") from None
        finally:
            finish()

    def _finish(self, reply: Reply, job: Job) -> None:
        self.app.state.active -= 1
        self.metrics.cancelled.inc(job.open > 0)
        self.metrics.prompt_tokens.inc(job.prompt_tokens)
        self.metrics.generated_tokens.inc(job.generated_tokens)
        self.runner.cancel(job)

    def _overloaded(self) -> ApiError:
        text = f"{self.runner.waiting} answers are waiting already; try again later"
        seconds = 1 + self.runner.waiting // len(self.runner.engine.slots)
        return ApiError(429, text, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})

    async def _next_updates(self, job: Job, begin: float | None) -> list[Update]:
        updates = await job.updates()
        if begin is not None:
            self.metrics.first_token.observe(time.monotonic() - begin)
        if errors := [update.error for update in updates if update.error]:
            raise errors[0]
        return updates

    async def _all_updates(self, job: Job, begin: float) -> list[Update]:
        updates = []
        while not job.done:
            updates += await self._next_updates(job, None if updates else begin)
        return updates

    async def _events(self, reply: Reply, job: Job, begin: float | None) -> AsyncIterator[bytes]:
        """All that has come since the last time goes out in one piece."""
        yield b"".join(map(reply.frame, reply.opening()))
        try:
            while not job.done:
                updates = await self._next_updates(job, begin)
                begin = None
                if data := b"".join(reply.frame(chunk) for update in updates for chunk in reply.chunks(update)):
                    yield data
        except ApiError as error:
            yield reply.failure(error)
            return
        yield b"".join(map(reply.frame, reply.closing())) + reply.end
