"""The routes of the server, and its life from the first request to the last.

app = build_app(service, runner, Limits(timeout=300))
Server(uvicorn.Config(app), app).run()
"""

import asyncio
import hmac
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from model.inference.tools import SCHEMAS, run_tool
from server.answering import Answering, Limits
from server.anthropic_messages import MessagesReply, count_message_tokens, prepare_message
from server.errors import ApiError
from server.reading import parse_body
from server.replies import ChatReply, CompletionReply
from server.responses import ResponsesReply, count_response_tokens, prepare_response
from server.runner import Runner
from server.service import Service
from server.web import ClientGone, Metrics, Plumbing, read_limited

PAGE = Path(__file__).resolve().parent / "static" / "chat.html"
TOOL_BODY = 1 << 16  # bytes of a call of a built-in tool


# What these paths begin with stands under /v1, and is found without it.
WITHOUT_V1 = ("models", "chat", "completions", "responses", "messages", "tools")


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
    app.add_middleware(Plumbing, paths=WITHOUT_V1)
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
        anthropic = request.url.path.startswith("/v1/messages")
        return JSONResponse(error.anthropic() if anthropic else error.body(), error.status, error.headers)

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
        other = request.headers.get("x-api-key") or request.headers.get("api-key")  # Anthropic's and Azure's clients
        if other is not None and scheme.lower() != "bearer":
            scheme, key = "bearer", other
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


def answer_routes(answering: Answering) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answering.answer(request, answering.service.prepare_chat, ChatReply)

    @router.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await answering.answer(request, answering.service.prepare_completion, CompletionReply)

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await answering.answer(request, partial(prepare_response, answering.service), ResponsesReply)

    @router.post("/v1/responses/input_tokens")
    async def count_input_tokens(request: Request) -> dict:
        body = await answering.body(request)
        return await asyncio.to_thread(count_response_tokens, answering.service, body)

    @router.post("/v1/messages")
    async def messages(request: Request) -> Response:
        return await answering.answer(request, partial(prepare_message, answering.service), MessagesReply)

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> dict:
        body = await answering.body(request)
        return await asyncio.to_thread(count_message_tokens, answering.service, body)

    @router.post("/tokenize")
    @router.post("/v1/tokenize")
    async def tokenize(request: Request) -> dict:
        body = parse_body(await answering.body(request))
        return await asyncio.to_thread(answering.service.tokenize, body)

    @router.post("/detokenize")
    @router.post("/v1/detokenize")
    async def detokenize(request: Request) -> dict:
        body = parse_body(await answering.body(request))
        return await asyncio.to_thread(answering.service.detokenize, body)

    return router


# ------------------------------------------------------------------------------------------------ life


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
