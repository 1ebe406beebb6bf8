"""A model behind an OpenAI-compatible address: answers whole lists of conversations, several at a time.

teacher = Endpoint("http://127.0.0.1:8000/v1", "name", {"temperature": 0, "max_tokens": 512}, key=None)
for number, answer, finish_reason in teacher.answer_each(prompts, seeds, 4): ...
"""

import json
import queue
import sys
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from cli import UsageError, is_loopback
from dataset.chat import END_THINK, THINK, TOOL_CALL, parse_tool_calls, parse_tools
from model.inference.answers import AssistantMessage

RETRIES = 7  # of a request that fails for a reason that may pass; with the openai package's pauses, half a minute
MOST_REFUSED = 10  # prompts in a row: then it is not the prompts


class EndpointError(ConnectionError):
    """An endpoint gives no answers; the message says why and what to do."""


class Endpoint:
    """A model behind an OpenAI-compatible address: the same answer_each() as Chatbot's, over HTTP."""

    def __init__(self, url: str, model: str, options: dict, key: str | None, timeout: float = 300):
        """`options` go into each request. Raises EndpointError for what is not a URL or cannot be a key."""
        try:
            import openai
        except ImportError:
            raise UsageError("--teacher URL needs the openai package: pip install openai") from None
        self.url, self.model, self.options = url.rstrip("/").removesuffix("/chat/completions"), model, options
        self.key = (key or "").strip()
        check_address(self.url, self.key)
        self.openai, self.client = (
            openai,
            openai.OpenAI(base_url=self.url, api_key=self.key or "none", max_retries=RETRIES, timeout=timeout),
        )
        # Without a key none is sent; the package wants to be given one nevertheless.
        self.extra = {} if self.key else {"extra_headers": {"Authorization": openai.Omit()}}

    def overflow(self, prompt: list[dict]) -> int:
        """As Chatbot's, but unknown here: 0. The server refuses a prompt that is too long."""
        return 0

    def answer_each(
        self, prompts: list[list[dict]], seeds: list[int | None], concurrency: int
    ) -> Iterator[tuple[int, AssistantMessage, str]]:
        """(number, answer, finish reason) of all prompts, as they come; for the reason "refused" the answer's content
        is the server's message."""
        self.reach()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, AssistantMessage, str] | Exception] = queue.SimpleQueue()
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
                raise EndpointError(f"{self.url} refused {refused} prompts in a row, the last with {result[1].content}")
            yield result

    def reach(self) -> None:
        """Whether somebody is there, whatever the answer: without it, a wrong address would be tried for long."""
        try:
            self.client.with_options(max_retries=0, timeout=10).models.with_raw_response.list(**self.extra)
        except self.openai.APITimeoutError:
            pass
        except self.openai.APIConnectionError as error:
            raise EndpointError(f"{self.url} cannot be reached: {error.__cause__}; is the server running?") from None
        except self.openai.OpenAIError:
            pass

    def answer(self, prompt: list[dict], seed: int | None) -> tuple[AssistantMessage, str]:
        """The answer to one conversation and its finish reason. Raises EndpointError."""
        body = {"model": self.model, "messages": to_openai(prompt)} | self.options | self.extra
        if tools := parse_tools(prompt[0].get("tools")) if prompt[0]["role"] == "system" else []:
            body["tools"] = tools
        if seed is not None:
            body["seed"] = seed
        try:
            reply = self.client.chat.completions.with_raw_response.create(**body).content
        except self.openai.APIStatusError as error:
            if error.status_code in (400, 413, 422):
                return AssistantMessage(f"HTTP {error.status_code}: {said(error)}"), "refused"
            raise self._failure(error) from None
        except self.openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise EndpointError(f"{self.url}: the connection failed ({cause}); run again to go on") from None
        try:
            choice = json.loads(reply)["choices"][0]
            return from_openai(choice["message"]), choice.get("finish_reason") or "stop"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text = f"the reply is not a chat completion but {reply[:80]!r}; check the address"
            raise EndpointError(f"{self.url}: {text}") from None

    def _failure(self, error) -> EndpointError:
        if error.status_code in (401, 403):  # without the server's message, which may show the key
            wrong = "does not accept the key in" if self.key else "wants a key: set the environment variable"
            return EndpointError(f"{self.url} {wrong} OPENAI_API_KEY (HTTP {error.status_code})")
        failure = f"HTTP {error.status_code}: {said(error)}"
        if error.status_code in (408, 409, 429) or error.status_code >= 500:
            return EndpointError(f"{self.url} failed {RETRIES + 1} times, the last with {failure}; run again to go on")
        return EndpointError(f"{self.url}: {failure}; check the address and --model {self.model}")


def check_address(url: str, key: str) -> None:
    """Raises EndpointError for what is not a URL or cannot be a key; warns of a key that anybody could read."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError as error:
        raise EndpointError(f"{url} is not a URL: {error}") from None
    if not host or not url.isascii():
        raise EndpointError(f"{url} is not a URL such as http://127.0.0.1:8000/v1")
    if not (key.isascii() and key.isprintable()):
        raise EndpointError("the key in OPENAI_API_KEY has characters that no key has")
    if key and parts.scheme == "http" and not is_loopback(host):
        print(f"warning: the key goes to {host} unencrypted: use https:// if it can", file=sys.stderr)


def said(error) -> str:
    """The first line of what a server says about an error, in whatever form."""
    body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
    return " ".join(str(body or error.response.text).split())[:200] or "no message"


def to_openai(prompt: list[dict]) -> list[dict]:
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


def from_openai(message: dict) -> AssistantMessage:
    """What the server has taken apart. Its text is text: nobody can tell a marker from one that is spelled out, so an
    answer that looks as if the server had left its markers in gets a fault."""
    content = (message.get("content") or "").strip()
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    answer = AssistantMessage(content, reasoning.strip())
    if content.startswith((THINK, TOOL_CALL)) or END_THINK in content.partition(THINK)[0]:
        answer.faults.append("markers in the text: its server needs a parser of reasoning and tool calls")
    try:
        answer.tool_calls = parse_tool_calls(message.get("tool_calls"))
    except ValueError as error:
        answer.faults.append(f"malformed tool call: {error}")
    return answer
