"""Anthropic's /v1/messages: its requests as chats, and what its clients expect back.

request, job = prepare_message(service, body)       # ApiError 400
MessagesReply(request, job, tokenizer, model)       # as ChatReply, in content blocks and named events
"""

import json
from typing import Any

from model.inference.answers import CALL, CONTENT, REASONING
from server.blocks import Block, Blocks
from server.errors import ApiError
from server.messages import kind_of_part
from server.reading import check_request, parse_body
from server.replies import Reply
from server.runner import Job, Update
from server.schemas import ChatRequest
from server.service import Service
from server.web import sse

UNUSED = ("system", "n", "stream_options", "output_config", "output_format")


def prepare_message(service: Service, body: bytes) -> tuple[ChatRequest, Job]:
    asked = parse_body(body)
    if asked.get("max_tokens") is None:
        raise ApiError(400, "max_tokens is missing", param="max_tokens")
    return service.prepare_conversation(check_request(as_chat(asked), ChatRequest))


def count_message_tokens(service: Service, body: bytes) -> dict:
    request = check_request(as_chat(parse_body(body)), ChatRequest)
    thinking = service.settings.thinking if request.thinks is None else request.thinks
    return {"input_tokens": len(service.chat_prompt(request, thinking))}


def as_chat(asked: dict) -> dict:
    """The body of a chat that asks the same. Raises ApiError."""
    chat = {name: value for name, value in asked.items() if name not in UNUSED}
    messages = asked.get("messages")
    if not isinstance(messages, list):
        raise ApiError(400, "messages: must be a list", param="messages")
    system = _text(asked.get("system"), "system")
    chat["messages"] = [{"role": "system", "content": system}] if system else []
    for n, message in enumerate(messages):
        chat["messages"] += _messages(message, f"messages[{n}]")
    tools = asked.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ApiError(400, "tools: must be a list of objects", param="tools")
    if hosted := [tool["type"] for tool in tools if tool.get("type") not in (None, "custom")]:
        raise ApiError(400, f"tools of type {ascii(hosted[0])[:80]} are not supported", param="tools")
    chat["tools"] = [
        {"function": {"name": tool.get("name"), "description": tool.get("description"),
                      "parameters": tool.get("input_schema")}} for tool in tools
    ]  # fmt: skip
    config = asked.get("output_config") if isinstance(asked.get("output_config"), dict) else {}
    wanted = asked.get("output_format") or config.get("format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        chat["response_format"] = {"type": "json_schema", "json_schema": wanted}
    choice = asked.get("tool_choice")
    if isinstance(choice, dict) and choice.get("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    return chat


def _text(content: Any, where: str) -> str:
    """A string, or text blocks as one."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for block in content if isinstance(content, list) else [content]:
        text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None
        if not isinstance(text, str):
            what = kind_of_part(block) or "not a text block"
            raise ApiError(400, f"{where}: {what}: this model reads nothing but text", param=where)
        texts.append(text)
    return "".join(texts)


def _messages(message: Any, where: str) -> list[dict]:
    """A turn; the results in a user's turn become messages of their own, before its text."""
    if not isinstance(message, dict):
        raise ApiError(400, f"{where}: must be an object", param=where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content} if content is not None else {"role": role}]
    texts, thoughts, calls, results = [], [], [], []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "function": function})
        elif kind == "tool_result":
            text = _text(block.get("content"), f"{where}.content")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind != "redacted_thinking":
            texts.append(_text([block], f"{where}.content"))
    if role != "assistant":
        return results + ([{"role": role, "content": "".join(texts)}] if texts or not results else [])
    turn = {"role": role, "content": "".join(texts), "reasoning_content": "\n".join(thoughts) or None}
    return [turn | ({"tool_calls": calls} if calls else {})]


# ------------------------------------------------------------------------------------------------ answers


class MessagesReply(Reply):
    prefix, end = "msg_", b""

    def __init__(self, request: ChatRequest, job: Job, *args):
        super().__init__(request, job, *args)
        self.blocks, self.reason = Blocks(), None

    def frame(self, chunk: dict) -> bytes:
        return sse(chunk, chunk["type"])

    def failure(self, error: ApiError) -> bytes:
        return self.frame(error.anthropic())

    def opening(self) -> list[dict]:
        return [{"type": "message_start", "message": self._message([])}]

    def chunks(self, update: Update) -> list[dict]:
        steps = [step for delta in update.deltas for step in self.blocks.push(delta)]
        if update.finish_reason:
            self.reason = update.finish_reason
            steps += self.blocks.close()
        return [event for step in steps for event in self._events(*step)]

    def closing(self) -> list[dict]:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        return [{"type": "message_delta", "delta": delta, "usage": self._usage()}, {"type": "message_stop"}]

    def whole(self, updates: list[Update]) -> dict:
        for update in updates:
            self.chunks(update)
        return self._message([self._block(block, block.text) for block in self.blocks.all])

    def _message(self, content: list[dict]) -> dict:
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence(), "usage": self._usage(),
        }  # fmt: skip

    def _stop_reason(self) -> str | None:
        if self.reason == "stop":
            answer = self.job.choices[0].answer
            return "tool_use" if answer.calls else "stop_sequence" if answer.stopped else "end_turn"
        return "max_tokens" if self.reason else None

    def _stop_sequence(self) -> str | None:
        return self.job.choices[0].answer.stop_string if self._stop_reason() == "stop_sequence" else None

    def _usage(self) -> dict:
        usage = self.usage()
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}

    def _block(self, block: Block, text: str) -> dict:
        if block.kind == CALL:
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _arguments(text)}
        if block.kind == REASONING:
            return {"type": "thinking", "thinking": text, "signature": ""}
        return {"type": "text", "text": text}

    def _events(self, step: str, block: Block, text: str) -> list[dict]:
        number = {"index": block.number}
        if step == "open":
            return [{"type": "content_block_start", "content_block": self._block(block, "")} | number]
        if step == "close":
            return [{"type": "content_block_stop"} | number]
        kind, key = {
            REASONING: ("thinking_delta", "thinking"), CONTENT: ("text_delta", "text"),
            CALL: ("input_json_delta", "partial_json"),
        }[block.kind]  # fmt: skip
        return [{"type": "content_block_delta", "delta": {"type": kind, key: text}} | number]


def _arguments(text: str) -> dict:
    """The arguments of a call as an object: none of one that was cut off."""
    try:
        return json.loads(text)
    except ValueError:
        return {}
