"""Serve a model to OpenAI's clients, and a chat page to browsers.

python serve_openai_api.py                              # the SFT weights in out/, on http://127.0.0.1:8000
python serve_openai_api.py --model_mode 3 --thinking 1  # the reasoning weights
python serve_openai_api.py --host 0.0.0.0 --api_key SECRET        # for others too
curl http://127.0.0.1:8000/v1/models

POST /v1/chat/completions and /v1/completions, GET /v1/models, /health and /metrics (Prometheus); the page is at /. The
adapters in out_dir/lora are models of their own, NAME:ADAPTER. Ctrl-C or SIGTERM: what runs is finished, what comes is
refused; a second one ends at once.
"""

import argparse
import asyncio
import hmac
import ipaddress
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

import cli
from cli import ArgumentParser, flag
from model.checkpoint import CheckpointError
from model.device import DTYPES, find_device
from model.inference.chatbot import (
    STOP_IDS,
    Chatbot,
    check_model_arguments,
    load_adapters,
    load_chatbot,
    load_options,
    model_arguments,
)
from model.inference.engine import Engine, SamplingParams
from model.inference.tools import SCHEMAS, run_tool
from server.errors import ApiError
from server.replies import ChatReply, CompletionReply, Reply
from server.runner import Job, Overloaded, Runner, Update
from server.schemas import read_json
from server.service import Service, Settings
from server.web import ClientGone, Connection, EventStream, Metrics, read_limited, sse, until_gone

ROOT = Path(__file__).resolve().parent
PAGE = ROOT / "server" / "static" / "chat.html"


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(usage="python serve_openai_api.py [options]   (--help lists them)", description=__doc__)
    model_arguments(parser, ROOT / "out")
    add = parser.add_argument_group("who may use it").add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 = other machines too (default: this one alone)")
    add("--port", type=int, default=8000, help="0 = any that is free (default: 8000)")
    add("--api_key", default=os.environ.get("MINIMIND_API_KEY"), metavar="KEY",
        help="what clients must send (default: MINIMIND_API_KEY of the environment, or none)")  # fmt: skip
    add("--cors_origin", action="append", default=[], metavar="URL",
        help="web pages of this origin may use it; * = all; may be repeated (default: none but its own)")  # fmt: skip
    add("--model_name", metavar="NAME", help="what clients call the model (default: the name of its file)")

    add = parser.add_argument_group("what a request gets that does not say otherwise").add_argument
    add("--temperature", type=float, default=0.7, help="default: 0.7")
    add("--top_p", type=float, default=0.9, help="default: 0.9")
    add("--max_new_tokens", type=int, help="tokens of an answer (default: what the context has room for)")
    add("--thinking", type=flag, metavar="{0,1}", help="1 = answers begin with thinking, 0 = without it "
        "(default: as the model likes)")  # fmt: skip

    add = parser.add_argument_group("limits").add_argument
    add("--max_seq_len", type=int, help="tokens of prompt and answer (default: as it was trained)")
    add("--max_prompt_tokens", type=int, metavar="N", help="default: what leaves room for an answer")
    add("--slots", type=int, default=32, help="answers generated at the same time (default: 32)")
    add("--max_queue", type=int, default=64, help="answers that may wait for a slot; more get 429 (default: 64)")
    add("--timeout", type=float, default=300, help="seconds for a request, waiting included (default: 300)")
    add("--idle_timeout", type=float, default=30, help="seconds until a client is dropped that neither asks nor reads "
        "what it is answered (default: 30)")  # fmt: skip
    add("--max_body_mb", type=float, default=4, help="size of a request (default: 4)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=list(DTYPES), help="default: bf16 where the hardware computes in it, else fp32")
    args = parser.parse_args()

    check_model_arguments(parser, args)
    least = {"slots": 1, "max_queue": 0, "timeout": 0, "idle_timeout": 0, "max_body_mb": 0, "max_prompt_tokens": 1}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < float("inf"):
            parser.error(f"--{name} {value}: must be at least {low}")
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port}: must be between 0 and 65535")
    if args.api_key is not None and not re.fullmatch(r"[!-~]+", args.api_key):
        parser.error("--api_key: must be ASCII characters without spaces")
    try:
        new = 1 if args.max_new_tokens is None else args.max_new_tokens
        SamplingParams(temperature=args.temperature, top_p=args.top_p, max_new_tokens=new)
    except ValueError as error:
        parser.error(f"--{error}")
    args.lora_name = None  # every adapter is a model of its own
    return args


# ------------------------------------------------------------------------------------------------ app


def build_app(service: Service, runner: Runner, args: argparse.Namespace) -> FastAPI:
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
    if args.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=args.cors_origin, allow_methods=["*"], allow_headers=["*"])

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

    @app.get("/")
    async def page() -> Response:
        if not PAGE.exists():
            raise ApiError(404, "there is no chat page: server/static/chat.html is missing")
        return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "draining" if app.state.draining else "ok"
        state = {"status": status, "running": runner.engine.running, "waiting": runner.waiting}
        return JSONResponse(state, 503 if app.state.draining else 200)

    async def allowed(request: Request) -> None:
        if app.state.draining:
            raise ApiError(503, "the server is shutting down", headers={"Connection": "close", "Retry-After": "10"})
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # Compared as bytes: a header may hold characters that compare_digest does not take in a str.
        given = key.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
        if args.api_key and not hmac.compare_digest(given, args.api_key.encode()):
            text = "wrong API key" if given else "an API key is needed: send it as Authorization: Bearer KEY"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    router = APIRouter(dependencies=[Depends(allowed)])

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
        body = await read_limited(request, 1 << 16, args.timeout)
        return Response(run_tool(name, read_json(body)), media_type="application/json")

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, service.prepare_chat, ChatReply)

    @router.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await answer(request, service.prepare_completion, CompletionReply)

    async def answer(http: Request, prepare: Callable, reply_type: type[Reply]) -> Response:
        begin = time.monotonic()
        if not runner.room(1):  # before there is work with it
            raise overloaded()
        body = await read_limited(http, int(args.max_body_mb * (1 << 20)), args.timeout)
        request, job = await asyncio.to_thread(prepare, body)
        try:
            runner.submit(job)
        except Overloaded:
            raise overloaded() from None
        app.state.active += 1
        reply = reply_type(request, job, service.tokenizer)

        def finish() -> None:
            app.state.active -= 1
            metrics.cancelled.inc(job.open > 0)
            metrics.prompt_tokens.inc(reply.usage()["prompt_tokens"])
            metrics.generated_tokens.inc(reply.usage()["completion_tokens"])
            runner.cancel(job)

        seconds = args.timeout - (time.monotonic() - begin)
        if request.stream:
            return EventStream(events(reply, job, begin), seconds, finish)
        try:
            updates = await until_gone(http.receive, all_updates(job, begin), seconds)
            # In a thread: that of many choices with log-probabilities takes a second.
            content = await asyncio.to_thread(lambda: json.dumps(reply.whole(updates), ensure_ascii=False))
            return Response(content, media_type="application/json")
        except TimeoutError:
            text = f"the answer was not complete after {args.timeout:g} seconds"
            raise ApiError(504, text, code="timeout") from None
        finally:
            finish()

    def overloaded() -> ApiError:
        text = f"{runner.waiting} answers are waiting already; try again later"
        seconds = 1 + runner.waiting // args.slots
        return ApiError(429, text, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})

    async def next_updates(job: Job, begin: float | None) -> list[Update]:
        updates = await job.updates()
        if begin is not None:
            metrics.first_token.observe(time.monotonic() - begin)
        if errors := [update.error for update in updates if update.error]:
            raise errors[0]
        return updates

    async def all_updates(job: Job, begin: float) -> list[Update]:
        updates = []
        while not job.done:
            updates += await next_updates(job, None if updates else begin)
        return updates

    async def events(reply: Reply, job: Job, begin: float | None) -> AsyncIterator[bytes]:
        """All that has come since the last time goes out in one piece."""
        yield b"".join(map(sse, reply.opening()))
        try:
            while not job.done:
                updates = await next_updates(job, begin)
                begin = None
                if data := b"".join(sse(chunk) for update in updates for chunk in reply.chunks(update)):
                    yield data
        except ApiError as error:
            yield sse(error.body())
            return
        if reply.with_usage:
            yield sse(reply.usage_chunk())
        yield b"data: [DONE]\n\n"

    app.include_router(router)
    return app


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


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allow_many_files() -> None:
    """Each connection is an open file, and many systems give a process 256 or 1024 of them until it asks for more."""
    if os.name == "posix":
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 10_000 if most == resource.RLIM_INFINITY else min(most, 10_000)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def main() -> None:
    args = arguments()
    bot = load_chatbot(args, find_device(args.device), DTYPES.get(args.dtype), **load_options(args))
    if not isinstance(bot, Chatbot):
        raise CheckpointError(f"{bot.name} has a tokenizer of another kind: only models with ours can be served")
    adapters = load_adapters(bot, Path(args.out_dir) / "lora")
    settings = Settings(
        model_name=args.model_name or Path(bot.name).stem,
        temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens, thinking=args.thinking,
    )  # fmt: skip
    service = Service(bot, adapters, settings)
    # Without a tokenizer the engine gives token ids: which of them are text depends on the markers among them.
    engine = Engine(bot.model, slots=args.slots, max_len=bot.max_len, compiled=bot.compiled)
    runner = Runner(engine, STOP_IDS, args.max_queue)
    app = build_app(service, runner, args)
    config = uvicorn.Config(
        app, args.host, args.port, log_level="warning", access_log=False, server_header=False,
        http=Connection, timeout_keep_alive=args.idle_timeout, timeout_graceful_shutdown=5, ws="none",
    )  # fmt: skip
    allow_many_files()
    print(f"{bot.title}\nmodels: {', '.join(service.models)}", file=sys.stderr)
    if not is_loopback(args.host) and not args.api_key:
        print(f"warning: --host {args.host} lets everybody in who can reach this machine: --api_key", file=sys.stderr)
    with config.bind_socket() as socket:
        Server(config, app).run([socket])


if __name__ == "__main__":
    cli.run(main)
