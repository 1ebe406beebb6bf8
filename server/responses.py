"""OpenAI's /v1/responses, stateless: its requests as chats, and what its clients expect back.

request, job = prepare_response(service, body)      # ApiError 400
ResponsesReply(request, job, tokenizer, model)      # as ChatReply, in items and named events
"""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from model.inference.answers import CALL, CONTENT, REASONING
from server.blocks import Block, Blocks
from server.errors import ApiError
from server.fields import note, quoted
from server.messages import kind_of_part
from server.reading import check_request, parse_body
from server.replies import Reply
from server.runner import Job, Update
from server.schemas import ChatRequest
from server.service import Service
from server.web import sse

STATEFUL = {  # what would need answers of before, or work without a client
    "previous_response_id": "send the conversation in input", "conversation": "send the conversation in input",
    "prompt": "send instructions and input", "background": "wait for the answer, or stream it",
}  # fmt: skip
NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
UNUSED = ("input", "instructions", "max_output_tokens", "text", "reasoning", "include", "truncation", "max_tool_calls",
          "stream_options", "top_logprobs", "tools", "tool_choice", "n", "context_management", *STATEFUL)  # fmt: skip


class ResponseRequest(ChatRequest):
    asked: dict[str, Any] = Field(default_factory=dict)  # as it came


def prepare_response(service: Service, body: bytes) -> tuple[ResponseRequest, Job]:
    with _own_names():
        return service.prepare_conversation(_read(body))


def count_response_tokens(service: Service, body: bytes) -> dict:
    with _own_names():
        request = _read(body)
        thinking = service.settings.thinking if request.thinks is None else request.thinks
        tokens = len(service.chat_prompt(request, thinking))
    return {"object": "response.input_tokens", "input_tokens": tokens}


def _read(body: bytes) -> ResponseRequest:
    asked = parse_body(body)
    request = check_request(as_chat(asked), ResponseRequest)
    request.asked = asked
    return request


@contextmanager
def _own_names() -> Iterator[None]:
    """Faults of a chat under the names that its fields have here."""
    try:
        yield
    except ApiError as error:
        name = re.match(r"\w*", error.param or "")[0]
        if name not in NAMES:
            raise
        given, text = NAMES[name], error.message.replace(name, NAMES[name], 1)
        param = given + error.param[len(name) :]
        raise ApiError(error.status, text, param=param, code=error.code) from None


def as_chat(asked: dict) -> dict:
    """The body of a chat that asks the same. Raises ApiError."""
    for name, remedy in STATEFUL.items():
        if asked.get(name):
            text = f"{name} is not supported, as nothing is stored: {remedy}"
            raise ApiError(400, text, param=name, code="unsupported_parameter")
    if asked.get("top_logprobs"):
        note("field", "top_logprobs", "ignored: top_logprobs of /v1/responses; /v1/chat/completions has them")
    chat = {name: value for name, value in asked.items() if name not in UNUSED}
    chat["messages"] = _messages(asked.get("instructions"), asked.get("input"))
    chat["max_completion_tokens"] = asked.get("max_output_tokens")
    reasoning, text = _object(asked, "reasoning"), _object(asked, "text")
    chat.setdefault("reasoning_effort", reasoning.get("effort"))
    chat["response_format"] = _format(text.get("format"))
    chat["tools"] = [_tool(tool, n) for n, tool in enumerate(_list(asked, "tools"))]
    chat["tool_choice"] = asked.get("tool_choice")
    return chat


def _object(asked: dict, name: str) -> dict:
    value = asked.get(name)
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, f"{name}: must be an object", param=name, code="invalid_value")
    return value or {}


def _list(asked: dict, name: str) -> list:
    value = asked.get(name)
    if value is not None and not isinstance(value, list):
        raise ApiError(400, f"{name}: must be a list", param=name, code="invalid_value")
    return value or []


def _format(given: Any) -> Any:
    """{"type": "json_schema", "name", "schema"}, which chats have one level deeper."""
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": given}


def _tool(tool: Any, n: int) -> dict:
    where, kind = f"tools[{n}]", tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        text = f"{where}: tools of type {quoted(str(kind))} are not supported, only functions"
        raise ApiError(400, text, param=f"{where}.type", code="unsupported_parameter")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _messages(instructions: Any, given: Any) -> list[dict]:
    """Items of input as messages: thinking, text and calls that follow each other are one turn of the assistant."""
    messages = [{"role": "system", "content": instructions}] if instructions else []
    if given is None:
        raise ApiError(400, "input is missing", param="input", code="missing_required_parameter")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(400, "input: must be a string or a list of items", param="input", code="invalid_value")
    for n, item in enumerate(given):
        where = f"input[{n}]"
        if not isinstance(item, dict):
            raise ApiError(400, f"{where}: must be an object", param=where, code="invalid_value")
        kind = item.get("type") or "message"
        turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        if kind == "message" and item.get("role") == "assistant":
            if turn is None or turn.get("content"):
                messages.append(turn := {"role": "assistant"})
            turn["content"] = item.get("content")
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
            messages.append({"role": "assistant", "reasoning_content": "\n".join(filter(None, texts)), "content": None})
        elif kind == "function_call":
            if turn is None:
                messages.append(turn := {"role": "assistant", "content": None})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            what = kind_of_part(item) or f"an item of type {quoted(str(kind))}"
            raise ApiError(400, f"{where}: {what} is not supported", param=f"{where}.type", code="invalid_value")
    return messages


# ------------------------------------------------------------------------------------------------ answers


class ResponsesReply(Reply):
    """Each output item is a block of the answer; each event has a name and a number."""

    prefix, end = "resp_", b""

    def __init__(self, request: ResponseRequest, job: Job, *args):
        super().__init__(request, job, *args)
        self.blocks, self.ids, self.reason, self.events = Blocks(), {}, None, 0

    def frame(self, chunk: dict) -> bytes:
        numbered = chunk | {"sequence_number": self.events}
        self.events += 1
        return sse(numbered, chunk["type"])

    def failure(self, error: ApiError) -> bytes:
        code = error.code or ("server_error" if error.status >= 500 else "invalid_request_error")
        return self.frame({"type": "error", "code": code, "message": error.text, "param": error.param})

    def opening(self) -> list[dict]:
        names = ("response.created", "response.in_progress")
        return [{"type": name, "response": self._response("in_progress")} for name in names]

    def chunks(self, update: Update) -> list[dict]:
        steps = [step for delta in update.deltas for step in self.blocks.push(delta)]
        if update.finish_reason:
            self.reason = update.finish_reason
            steps += self.blocks.close()
        return [event for step in steps for event in self._events(*step)]

    def closing(self) -> list[dict]:
        final = self._final()
        return [{"type": f"response.{final['status']}", "response": final}]

    def whole(self, updates: list[Update]) -> dict:
        for update in updates:
            self.chunks(update)
        return self._final()

    def _final(self) -> dict:
        return self._response("incomplete" if self.reason == "length" else "completed")

    def _response(self, status: str) -> dict:
        asked, done = self.request.asked, status != "in_progress"
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        told = {name: asked.get(name) for name in (
            "instructions", "max_output_tokens", "temperature", "top_p", "user", "max_tool_calls", "safety_identifier",
            "prompt_cache_key")}  # fmt: skip
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "background": False,
            "completed_at": int(time.time()) if status == "completed" else None, "error": None,
            "incomplete_details": cut, "model": self.model,
            "output": [self._item(block, True) for block in self.blocks.all] if done else [],
            "parallel_tool_calls": self.request.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None} | (asked.get("reasoning") or {}), "store": False,
            "text": {"format": {"type": "text"}} | (asked.get("text") or {}), "truncation": "disabled",
            "tool_choice": asked.get("tool_choice") or "auto", "tools": asked.get("tools") or [],
            "metadata": asked.get("metadata") or {}, "service_tier": "default", "top_logprobs": 0,
            "usage": self._usage() if done else None,
        } | told  # fmt: skip

    def _usage(self) -> dict:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens}, "total_tokens": usage["total_tokens"],
        }  # fmt: skip

    def _item(self, block: Block, done: bool) -> dict:
        prefix = {REASONING: "rs", CONTENT: "msg", CALL: "fc"}[block.kind]
        name = self.ids.setdefault(block.number, f"{prefix}_{uuid.uuid4().hex[:24]}")
        cut = self.reason == "length" and block is self.blocks.all[-1]
        item = {"id": name, "status": "in_progress" if not done else "incomplete" if cut else "completed"}
        if block.kind == REASONING:
            return item | {"type": "reasoning", "summary": [], "content": [self._part(block, True)] if done else []}
        if block.kind == CONTENT:
            content = [self._part(block, True)] if done else []
            return item | {"type": "message", "role": "assistant", "content": content}
        text = block.text if done else ""
        return item | {"type": "function_call", "call_id": block.call_id, "name": block.name, "arguments": text}

    def _part(self, block: Block, done: bool) -> dict:
        text = block.text if done else ""
        if block.kind == REASONING:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _events(self, step: str, block: Block, text: str) -> list[dict]:
        """In OpenAI's order: the item, its part, pieces, and all three closed from the inside to the outside."""
        number = {"output_index": block.number}
        inside = number | {"item_id": self._item(block, False)["id"]}
        part = inside | {"content_index": 0}
        kind = {REASONING: "reasoning_text", CONTENT: "output_text", CALL: "function_call_arguments"}[block.kind]
        where = inside if block.kind == CALL else part
        more = {"logprobs": []} if block.kind == CONTENT else {}
        if step == "open":
            item = [{"type": "response.output_item.added", "item": self._item(block, False)} | number]
            opened = {"type": "response.content_part.added", "part": self._part(block, False)}
            return item + ([] if block.kind == CALL else [opened | part])
        if step == "add":
            return [{"type": f"response.{kind}.delta", "delta": text} | where | more]
        whole = {"arguments": block.text, "name": block.name} if block.kind == CALL else {"text": block.text} | more
        closed = {"type": "response.content_part.done", "part": self._part(block, True)}
        return [
            {"type": f"response.{kind}.done"} | whole | where,
            *([] if block.kind == CALL else [closed | part]),
            {"type": "response.output_item.done", "item": self._item(block, True)} | number,
        ]
