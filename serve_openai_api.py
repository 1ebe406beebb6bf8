"""Serve a model to OpenAI's clients, and a chat page to browsers.

python serve_openai_api.py                              # the SFT weights in out/, on http://127.0.0.1:8000
python serve_openai_api.py --model_mode 3 --thinking 1  # the reasoning weights
python serve_openai_api.py --model PATH                 # any .pth file or Hugging Face folder
python serve_openai_api.py --host 0.0.0.0 --api_key SECRET        # for others too
curl http://127.0.0.1:8000/v1/models

POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages (Anthropic's), their counts of tokens, /tokenize
and /detokenize; GET /v1/models, /health and /metrics (Prometheus); the page is at /. Fields that are not known are
ignored, with a line in the log; those that would change the answer and cannot be honoured are refused by name
(server/fields.py). The adapters in out_dir/lora are models of their own, NAME:ADAPTER. Ctrl-C or SIGTERM: what runs is
finished, what comes is refused; a second one ends at once.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import uvicorn

from cli import ArgumentParser, find_device, flag
from model.checkpoint import CheckpointError
from model.device import DTYPES
from model.inference.chatbot import AnswerSettings, Chatbot, load_chatbot
from model.inference.engine import Engine, SamplingParams
from server.answering import Limits
from server.app import Server, build_app
from server.runner import Runner
from server.service import Service, Settings
from server.web import Connection

ROOT = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(usage="python serve_openai_api.py [options]   (--help lists them)", description=__doc__)
    cli.add_model_flags(parser, ROOT / "out")
    cli.add_inference_flags(parser)
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
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what does not fit together."""
    cli.check_model_flags(parser, args)
    least = {
        "max_seq_len": 16,
        "slots": 1,
        "max_queue": 0,
        "timeout": 0,
        "idle_timeout": 0,
        "max_body_mb": 0,
        "max_prompt_tokens": 1,
    }
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


def allow_many_files() -> None:
    """Each connection is an open file, and many systems give a process 256 or 1024 of them until it asks for more."""
    if os.name == "posix":
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 10_000 if most == resource.RLIM_INFINITY else min(most, 10_000)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def load(args: argparse.Namespace) -> Chatbot:
    """The chatbot that the flags describe."""
    options = {"quantized": args.quantize, "compiled": args.compile, "extrapolate": args.inference_rope_scaling}
    options |= {"tokenizer": args.tokenizer, "adapters": Path(args.out_dir) / "lora"}
    settings = AnswerSettings(max_seq_len=args.max_seq_len, thinking=args.thinking)
    device, dtype = find_device(args.device), DTYPES.get(args.dtype)
    bot = load_chatbot(cli.model_path(args), device, dtype, settings, **options)
    if not isinstance(bot, Chatbot):
        raise CheckpointError(f"{bot.name}: only models that are a Llama, Qwen3 or MiniMind can be served")
    return bot


def main() -> None:
    args = arguments()
    bot = load(args)
    settings = Settings(
        model_name=args.model_name or Path(bot.name).stem,
        temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens, thinking=args.thinking,
    )  # fmt: skip
    service = Service(bot, bot.adapters, settings)
    # Without a tokenizer the engine gives token ids: which of them are text depends on the markers among them.
    engine = Engine(bot.model, slots=args.slots, max_len=bot.max_len, compiled=bot.step)
    limits = Limits(args.api_key, tuple(args.cors_origin), args.timeout, int(args.max_body_mb * (1 << 20)))
    app = build_app(service, Runner(engine, tuple(bot.stop_ids), args.max_queue), limits)
    config = uvicorn.Config(
        app, args.host, args.port, log_level="warning", access_log=False, server_header=False,
        http=Connection, timeout_keep_alive=args.idle_timeout, timeout_graceful_shutdown=5, ws="none",
    )  # fmt: skip
    allow_many_files()
    print(f"{bot.title}\nmodels: {', '.join(service.models)}", file=sys.stderr)
    if not cli.is_loopback(args.host) and not args.api_key:
        print(f"warning: --host {args.host} lets everybody in who can reach this machine: --api_key", file=sys.stderr)
    with config.bind_socket() as socket:
        Server(config, app).run([socket])


if __name__ == "__main__":
    cli.run(main)
