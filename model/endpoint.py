"""A model behind an OpenAI-compatible endpoint: answers whole lists of conversations, several at a time.

teacher = Endpoint("http://127.0.0.1:8000/v1", "name", {"temperature": 0, "max_tokens": 512}, key=None)
for number, text, finish_reason in teacher.answer_each(prompts, seeds, 4): ...
"""

import http.client
import ipaddress
import json
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from dataset.chat import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL, parse_tool_calls, parse_tools

WAITS = (0.5, 2, 8, 32)  # seconds before each new attempt, unless the server says for how long
LONGEST_WAIT = 60  # seconds that a server may ask for
MOST_REFUSED = 10  # prompts in a row: then it is not the prompts


class EndpointError(ConnectionError):
    """An endpoint gives no answers; the message says why and what to do."""


class Endpoint:
    """The same answer_each() as Chatbot's, over HTTP."""

    def __init__(self, url: str, model: str, settings: dict, key: str | None, timeout: float = 300):
        """`settings` go into each request. Raises EndpointError for what is not a URL or cannot be a key."""
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.settings, self.key, self.timeout = model, settings, (key or "").strip(), timeout
        self.reached = False  # whether the server was ever heard
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port  # reading the port checks it
        except ValueError as error:
            raise EndpointError(f"{url} is not a URL: {error}") from None
        if not host or not self.url.isascii():
            raise EndpointError(f"{url} is not a URL such as http://127.0.0.1:8000/v1")
        if not (self.key.isascii() and self.key.isprintable()):
            raise EndpointError("the key in OPENAI_API_KEY has characters that no key has")
        if self.key and parts.scheme == "http" and not _is_loopback(host):
            print(f"warning: the key goes to {host} unencrypted: use https:// if it can", file=sys.stderr)

    def overflow(self, prompt: list[dict]) -> int:
        """As Chatbot's, but unknown here: 0. The server refuses a prompt that is too long."""
        return 0

    def answer_each(
        self, prompts: list[list[dict]], seeds: list[int | None], concurrency: int
    ) -> Iterator[tuple[int, str, str]]:
        """(number, answer, finish reason) of all prompts, as they come. The answer is what a decoder would give: with
        <think> and <tool_call> where they belong; for the reason "refused" it is the server's message."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, str, str] | Exception] = queue.SimpleQueue()
        for i in range(len(prompts)):
            waiting.put(i)

        def work() -> None:
            try:
                while True:
                    i = waiting.get_nowait()
                    done.put((i, *self.answer(prompts[i], seeds[i])))
            except queue.Empty:
                pass
            except Exception as error:  # is raised again in the main thread
                done.put(error)

        for _ in range(min(concurrency, len(prompts))):
            threading.Thread(target=work, daemon=True).start()  # daemon: Ctrl-C need not wait for the answers
        refused = 0
        for _ in prompts:
            result = done.get()
            if isinstance(result, Exception):
                raise result
            refused = refused + 1 if result[2] == "refused" else 0
            if refused == MOST_REFUSED:
                raise EndpointError(f"{self.url} refused {refused} prompts in a row, the last with {result[1]}")
            yield result

    def answer(self, prompt: list[dict], seed: int | None) -> tuple[str, str]:
        """The answer to one conversation and its finish reason. Raises EndpointError."""
        body = {"model": self.model, "messages": _messages(prompt)} | self.settings
        if tools := parse_tools(prompt[0].get("tools")) if prompt[0]["role"] == "system" else []:
            body["tools"] = tools
        if seed is not None:
            body["seed"] = seed
        status, reply = self._post(json.dumps(body).encode())
        if status != 200:
            return f"HTTP {status}: {_error_message(reply)}", "refused"
        try:
            choice = json.loads(reply)["choices"][0]
            return _text(choice["message"]), choice.get("finish_reason") or "stop"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise EndpointError(
                f"{self.url}: the reply is not a chat completion but {reply[:80]!r}; check the address"
            ) from None

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """(200 or the status of a prompt that the server refuses, its reply); tries again what may be temporary."""
        for pause in (*WAITS, None):
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            if self.key:  # unredirected: another server must not get it
                request.add_unredirected_header("Authorization", f"Bearer {self.key}")
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    self.reached = True
                    return 200, response.read()
            except urllib.error.HTTPError as error:
                self.reached = True
                if error.code in (400, 413, 422):
                    return error.code, _read(error)
                failure = f"HTTP {error.code}: {_error_message(_read(error))}"
                if error.code in (401, 403):  # without the server's message, which may show the key
                    wrong = "does not accept the key in" if self.key else "wants a key: set the environment variable"
                    raise EndpointError(f"{self.url} {wrong} OPENAI_API_KEY (HTTP {error.code})") from None
                if error.code != 429 and error.code < 500:
                    raise EndpointError(f"{self.url}: {failure}; check the address and --model {self.model}") from None
                seconds = error.headers.get("Retry-After", "")
                pause = min(int(seconds), LONGEST_WAIT) if seconds.isdecimal() and pause is not None else pause
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                failure = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
                if isinstance(error, urllib.error.URLError) and not self.reached:  # no connection at all
                    raise EndpointError(f"{self.url} cannot be reached: {failure}; is the server running?") from None
            if pause is not None:
                time.sleep(pause)
        raise EndpointError(f"{self.url} failed {len(WAITS) + 1} times, the last with {failure}; run again to go on")


def _read(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(1 << 16)
    except (OSError, http.client.HTTPException):
        return b""


def _error_message(reply: bytes) -> str:
    """The first line of what a server says about an error, in whatever form."""
    text = reply.decode("utf-8", "replace")
    try:
        content = json.loads(text)
        inner = content.get("error", content)
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:200] or "no message"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _messages(prompt: list[dict]) -> list[dict]:
    """Our messages in OpenAI's form: calls with ids, which their results name; no reasoning of earlier turns."""
    messages, ids = [], []
    for n, message in enumerate(prompt):
        out = {"role": message["role"], "content": message.get("content") or ""}
        if calls := parse_tool_calls(message.get("tool_calls")):
            ids = [f"call_{n}_{k}" for k in range(len(calls))]
            out["tool_calls"] = [
                {"id": i, "type": "function", "function": call | {"arguments": json.dumps(call["arguments"])}}
                for i, call in zip(ids, calls, strict=True)
            ]
        elif message["role"] == "tool":
            out["tool_call_id"] = ids.pop(0)  # validate_messages allows no more results than calls
        messages.append(out)
    return messages


def _text(message: dict) -> str:
    """An assistant message as a decoder would have given it."""
    text = message.get("content") or ""
    for call in parse_tool_calls(message.get("tool_calls")):
        text += f"\n{TOOL_CALL}\n{json.dumps(call, ensure_ascii=False)}\n{END_TOOL_CALL}"
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return f"{THINK}\n{reasoning}\n{END_THINK}\n\n{text}" if reasoning else text
