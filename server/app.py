"""The routes of the server, and its life from the first request to the last.

app = build_app(service, runner, Limits(timeout=300))
Server(uvicorn.Config(app), app).run()
"""

import asyncio
import hmac
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from model.inference.tools import SCHEMAS, run_tool
from server.errors import ApiError
from server.replies import ChatReply, CompletionReply, Reply
from server.runner import Job, Overloaded, Runner, Update
from server.schemas import parse_body
from server.service import Service
from server.web import ClientGone, EventStream, Metrics, read_limited, sse, until_gone

PAGE = Path(__file__).resolve().parent / "static" / "chat.html"
TOOL_BODY = 1 << 16  # bytes of a call of a built-in tool


@dataclass
class Limits:
    """Who may ask, for how much, for how long."""

    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()  # web pages from elsewhere that may use it
    timeout: float = 300  # seconds for a request
    max_body: int = 4 << 20  # bytes of a request


def build_app(service: Service, runner: Runner, limits: Limits) -> FastAPI:
    """app.state.draining: refuse what comes; app.state.active: requests that are being answered."""
    metrics = Metrics()
    metrics.gauge("running_sequences", "Sequences being generated", lambda: runner.engine.running)
    metrics.gauge("waiting_sequences", "Sequences that wait for a slot", lambda: runner.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        runner.start(asyncio.get_running_loop())
        yield
        runner.stop()

    # The pages that FastAPI makes of the routes would load scripts from elsewhere.
    app = FastAPI(title="MiniMind", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.draining, app.state.active = False, 0
    app.add_middleware(metrics.middleware)
    if limits.cors_origins:
        origins = list(limits.cors_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    add_error_handlers(app)
    app.include_router(open_routes(runner))
    guard = [Depends(Guard(limits.api_key))]
    app.include_router(model_routes(service, metrics, limits), dependencies=guard)
    app.include_router(answer_routes(Answering(app, service, runner, metrics, limits)), dependencies=guard)
    return app


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, text).body(), error.status_code, error.headers)

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)  # in the middle of its request
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "the server failed; its log says why").body(), 500)


# ------------------------------------------------------------------------------------------------ routes


def open_routes(runner: Runner) -> APIRouter:
    """For everybody, without a key."""
    router = APIRouter()

    @router.get("/")
    async def page() -> Response:
        if not PAGE.exists():
            raise ApiError(404, f"there is no chat page: {PAGE.name} is missing in server/static")
        return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})

    @router.get("/health")
    async def health(request: Request) -> JSONResponse:
        draining = request.app.state.draining
        state = {"status": "draining" if draining else "ok"}
        state |= {"running": runner.engine.running, "waiting": runner.waiting}
        return JSONResponse(state, 503 if draining else 200)

    return router


@dataclass(frozen=True)
class Guard:
    """Lets those in who send the key, until the server shuts down."""

    api_key: str | None

    async def __call__(self, request: Request) -> None:
        if request.app.state.draining:
            raise ApiError(503, "the server is shutting down", headers={"Connection": "close", "Retry-After": "10"})
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # Compared as bytes: a header may hold characters that compare_digest does not take in a str.
        given = key.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
        if self.api_key and not hmac.compare_digest(given, self.api_key.encode()):
            text = "wrong API key" if given else "an API key is needed: send it as Authorization: Bearer KEY"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def model_routes(service: Service, metrics: Metrics, limits: Limits) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": service.model_cards()}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        return service.model_card(name)

    @router.get("/v1/tools")
    async def tools() -> list:
        return SCHEMAS

    @router.post("/v1/tools/{name}")
    async def tool(name: str, request: Request) -> Response:
        body = await read_limited(request, TOOL_BODY, limits.timeout)
        return Response(run_tool(name, parse_body(body)), media_type="application/json")

    return router


def answer_routes(answering: "Answering") -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answering.answer(request, answering.service.prepare_chat, ChatReply)

    @router.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await answering.answer(request, answering.service.prepare_completion, CompletionReply)

    return router


# ------------------------------------------------------------------------------------------------ answers


@dataclass
class Answering:
    """From a request for an answer to its response, whole or as a stream."""

    app: FastAPI
    service: Service
    runner: Runner
    metrics: Metrics
    limits: Limits

    async def answer(self, http: Request, prepare: Callable, reply_type: type[Reply]) -> Response:
        begin = time.monotonic()
        if not self.runner.room(1):  # before there is work with it
            raise self._overloaded()
        body = await read_limited(http, self.limits.max_body, self.limits.timeout)
        request, job = await asyncio.to_thread(prepare, body)
        try:
            self.runner.submit(job)
        except Overloaded:
            raise self._overloaded() from None
        self.app.state.active += 1
        reply = reply_type(request, job, self.service.tokenizer)

        def finish() -> None:
            self._finish(reply, job)

        seconds = self.limits.timeout - (time.monotonic() - begin)
        if request.stream:
            return EventStream(self._events(reply, job, begin), seconds, finish)
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
        usage = reply.usage()
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.generated_tokens.inc(usage["completion_tokens"])
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
        yield b"".join(map(sse, reply.opening()))
        try:
            while not job.done:
                updates = await self._next_updates(job, begin)
                begin = None
                if data := b"".join(sse(chunk) for update in updates for chunk in reply.chunks(update)):
                    yield data
        except ApiError as error:
            yield sse(error.body())
            return
        if reply.with_usage:
            yield sse(reply.usage_chunk())
        yield b"data: [DONE]\n\n"


class Server(uvicorn.Server):
    """Goes on answering (503) until what runs has ended, then closes."""

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self.app = app

    async def startup(self, sockets: list) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame) -> None:
        if self.app.state.draining:
            sys.exit(128 + sig)
        self.app.state.draining = True
        print(f"finishing {self.app.state.active} requests; again to end at once", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        if self.app.state.draining and not self.app.state.active:
            self.should_exit = True
        return await super().on_tick(counter)
