"""How the server behaves under load: starts one, talks to it as one client and then as many, and stops it.

python scripts/benchmark_serve.py --clients 32 --seconds 60 --requests 10000
python scripts/benchmark_serve.py --clients 8 --seconds 10 -- --weight out/dpo_192.pth    # options of the server

Each client streams one chat after another, of equal length. The last line is one JSON object: `ratio` is the throughput
of all clients over that of one alone, `slowest_to_median` that of the times of the answers; `rss_growth_mb` is how much
the memory of the server grows over `requests` short chats, after the first tenth of them.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from _path import ROOT
from _report import append_markdown

import cli
from cli import ArgumentParser

QUESTIONS = ["Who are you?", "What is the capital of France?", "Tell me a short story about a cat.", "7 + 15 = ?"]
USAGE = re.compile(rb'"completion_tokens":\s*([0-9]+)')


@dataclass
class Tally:
    """What a group of clients saw."""

    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds, of each whole answer
    first: list[float] = field(default_factory=list)  # seconds to the first byte after the header


@contextmanager
def running_server(options: list[str]) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server of its own, and its port."""
    command = [sys.executable, str(ROOT / "serve_openai_api.py"), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
        try:
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
                if found := re.fullmatch(r"serving on http://.*:([0-9]+)\n", line):
                    break
            else:
                raise SystemExit("error: the server did not start; its own message is above")
            yield process, int(found[1])
        finally:
            process.terminate()


def rss_mb(process: subprocess.Popen) -> float | None:
    """Memory of a process; None where there is no /proc."""
    status = Path(f"/proc/{process.pid}/status")
    return (
        int(re.search(r"VmRSS:\s*([0-9]+)", status.read_text(encoding="utf-8"))[1]) / 1024 if status.exists() else None
    )


async def stream_chat(port: int, model: str, question: str, max_tokens: int, tally: Tally) -> None:
    """One streamed chat over a connection of its own, on a bare socket: a client library would take the machine's time
    from the server."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        status = await reader.readline()
        await reader.readuntil(b"\r\n\r\n")
        answer = await reader.read(1)
        tally.first.append(time.perf_counter() - begin)
        answer += await reader.read(-1)
        if b" 200 " not in status or b"data: [DONE]" not in answer or b'{"error"' in answer:
            tally.errors.append((status + answer[-200:]).decode(errors="replace"))
        else:
            tally.tokens += int(USAGE.findall(answer)[-1])
            tally.times.append(time.perf_counter() - begin)
    finally:
        writer.close()


async def press(port: int, model: str, clients: int, max_tokens: int, seconds: float) -> tuple[Tally, float]:
    """All clients at once, each starting answers for so long; the tally and the seconds until the last one ended."""
    tally, begin = Tally(), time.perf_counter()

    async def client(n: int) -> None:
        while time.perf_counter() < begin + seconds:
            n += 1
            try:
                await stream_chat(port, model, QUESTIONS[n % len(QUESTIONS)], max_tokens, tally)
            except (OSError, asyncio.IncompleteReadError) as error:
                tally.errors.append(repr(error))

    await asyncio.gather(*(client(n) for n in range(clients)))
    return tally, time.perf_counter() - begin


async def many(port: int, model: str, clients: int, requests: int, process: subprocess.Popen) -> tuple[Tally, list]:
    """So many short chats; memory after each tenth of them."""
    tally, memory, left = Tally(), [], iter(range(requests))

    async def client() -> None:
        for n in left:
            await stream_chat(port, model, f"{n} + 1 = ?", 2, tally)
            if (n + 1) % max(1, requests // 10) == 0:
                memory.append(rss_mb(process))

    await asyncio.gather(*(client() for _ in range(clients)))
    return tally, memory


def throughput(port: int, args: argparse.Namespace) -> dict:
    """One client alone, then all at once."""
    one, seconds = asyncio.run(press(port, "model", 1, args.max_tokens, args.seconds / 4))
    alone = one.tokens / seconds
    tally, seconds = asyncio.run(press(port, "model", args.clients, args.max_tokens, args.seconds))
    together, median = tally.tokens / seconds, statistics.median(tally.times)
    errors = one.errors + tally.errors
    print("\n".join(errors[:3]), file=sys.stderr)
    return {
        "errors": len(errors),
        "answers": len(tally.times),
        "tokens_per_second": round(together, 1),
        "one_client_tokens_per_second": round(alone, 1),
        "ratio": round(together / alone, 2),
        "median_seconds": round(median, 3),
        "slowest_to_median": round(max(tally.times) / median, 2),
        "median_first_byte_seconds": round(statistics.median(tally.first), 3),
    }


def growth(port: int, process: subprocess.Popen, args: argparse.Namespace) -> dict:
    """Many short chats, and what they leave behind in the server's memory."""
    begin = time.perf_counter()
    tally, memory = asyncio.run(many(port, "model", args.clients, args.requests, process))
    print("\n".join(tally.errors[:3]), file=sys.stderr)
    result = {"requests": args.requests, "request_errors": len(tally.errors)}
    result["requests_per_second"] = round(args.requests / (time.perf_counter() - begin), 1)
    if memory[0] is not None:
        result |= {"rss_mb": round(memory[-1]), "rss_growth_mb": round(memory[-1] - memory[0], 1)}
    return result


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="of all clients; one alone gets a quarter of it")
    parser.add_argument("--max_tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--requests", type=int, default=0, help="short chats, for the growth of memory")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the figures to this file as a table")
    parser.add_argument("server", nargs="*", help="after --: options of serve_openai_api.py")
    args = parser.parse_args()
    result = {"clients": args.clients, "max_tokens": args.max_tokens}
    with running_server(["--model_name", "model", *args.server]) as (process, port):
        asyncio.run(press(port, "model", 1, args.max_tokens, 1))  # warming up
        result |= throughput(port, args) if args.seconds else {}
        result |= growth(port, process, args) if args.requests else {}
    print(json.dumps(result))
    if args.markdown:
        append_markdown(args.markdown, "serving", result)


if __name__ == "__main__":
    cli.run(main)
