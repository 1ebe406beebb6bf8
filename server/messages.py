"""Messages and tools of a chat request, and the conversation that render_chat() takes.

messages = conversation(request.messages)    # ApiError 400, which names the message
"""

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dataset.chat import parse_tool_calls
from server.errors import ApiError

TEXT_PARTS = ("text", "input_text", "output_text")


def fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("value", "{message}", {"message": message})


def kind_of_part(part: Any) -> str:
    """What a part of a content is, in the word that its sender understands."""
    kind = str(part.get("type", ""))[:40] if isinstance(part, dict) else ""
    known = ("image", "audio", "video", "file", "document")
    return next((f"an {word} part" if word[0] in "ai" else f"a {word} part" for word in known if word in kind), "")


def text_of_parts(content: Any) -> Any:
    """A list of text parts as the one text that it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for n, part in enumerate(content):
        text = part if isinstance(part, str) else None
        if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
            text = part.get("text")
        elif isinstance(part, dict) and part.get("type") == "refusal":
            text = part.get("refusal")
        if not isinstance(text, str):
            what = kind_of_part(part) or 'not {"type": "text", "text": a string}'
            raise fault(f"part {n} is {what}: this model reads nothing but text")
        texts.append(text)
    return "".join(texts)


class Part(BaseModel):
    """An object inside a body. Clients send more than is needed: the rest is ignored; null is as good as nothing."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class FunctionCall(Part):
    name: str
    # Some servers, and so some clients, have objects where OpenAI has JSON in a string.
    arguments: Annotated[str, BeforeValidator(lambda v: json.dumps(v) if isinstance(v, dict) else v)] = ""


class ToolCall(Part):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(text_of_parts)] = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_null_content(cls, value: Any) -> Any:
        """A content that is null is an empty one; one that is missing is a fault."""
        if isinstance(value, dict):
            value = value | ({"content": ""} if value.get("content", "") is None else {})
            value.setdefault("reasoning_content", value.get("reasoning"))  # OpenRouter's name, and vLLM's
        return value


class Function(Part):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Part):
    type: Literal["function"] = "function"
    function: Function


class ToolChoice(NamedTuple):
    """Whether tools may be called ("none", "auto", "required"), and which of them alone. `named`: one, by its name."""

    mode: str
    names: tuple[str, ...] = ()
    named: bool = False


MODES = {"none": "none", "auto": "auto", "required": "required", "any": "required"}


def read_tool_choice(value: Any) -> ToolChoice:
    """OpenAI's forms of both its interfaces, and Anthropic's."""
    kind = value.get("type") if isinstance(value, dict) else value
    if isinstance(kind, str) and kind in MODES:
        return ToolChoice(MODES[kind])
    if kind in ("function", "tool") and isinstance(name := _name(value), str):
        return ToolChoice("required", (name,), named=True)
    if kind == "allowed_tools":
        value = value if isinstance(value, dict) else {}
        allowed = value["allowed_tools"] if isinstance(value.get("allowed_tools"), dict) else value
        mode, tools = allowed.get("mode", "auto"), allowed.get("tools")
        names = tuple(map(_name, tools)) if isinstance(tools, list) else ()
        if isinstance(mode, str) and mode in MODES and names and all(isinstance(name, str) for name in names):
            return ToolChoice(MODES[mode], names)
    named = '{"type": "function", "function": {"name": ...}}'
    raise fault(f'must be "none", "auto", "required", {named} or {{"type": "allowed_tools", ...}}')


def _name(value: Any) -> Any:
    inner = value.get("function") if isinstance(value, dict) else None
    where = inner if isinstance(inner, dict) else value
    return where.get("name") if isinstance(where, dict) else None


# ------------------------------------------------------------------------------------------------ the conversation


def conversation(messages: list[Message]) -> list[dict]:
    """For render_chat: tool results without ids stand in the order of their calls. Raises ApiError."""
    plain, calls = [], {}  # ids of the calls that wait for a result, and the results: {id: message or None}

    def end_round() -> None:
        if missing := [i for i, result in calls.items() if result is None]:
            text = f"message {len(plain)}: the call {missing[0]!r} has no tool message with its result"
            raise ApiError(400, text, param="messages")
        plain.extend(calls.values())
        calls.clear()

    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if message.content is None and message.role != "assistant":
            raise ApiError(400, f"{where}: content is missing", param=f"{where}.content")
        if message.role == "tool":
            if message.tool_call_id not in calls:
                text = "a tool message must answer a call of the assistant message before it"
                raise ApiError(400, f"{where}: {text}", param=f"{where}.tool_call_id")
            if calls[message.tool_call_id] is not None:
                raise ApiError(400, f"{where}: a second result of one call", param=f"{where}.tool_call_id")
            calls[message.tool_call_id] = {"role": "tool", "content": message.content}
            continue
        end_round()
        role = "system" if message.role == "developer" else message.role
        turn = {"role": role, "content": message.content or ""}
        if message.role == "assistant":
            turn["reasoning_content"] = message.reasoning_content
            turn["tool_calls"] = _calls(message, where)
            calls = dict.fromkeys(call.id for call in message.tool_calls or ())
            if len(calls) < len(message.tool_calls or ()):
                raise ApiError(400, f"{where}: two calls with one id", param=f"{where}.tool_calls")
        plain.append(turn)
    end_round()
    return plain


def _calls(message: Message, where: str) -> list[dict]:
    calls = [call.function.model_dump() for call in message.tool_calls or ()]
    for call in calls:
        call["name"] = call["name"] or "unknown"  # cut off before its first letter
        call["arguments"] = _readable(call["arguments"])
    try:
        return parse_tool_calls(calls)
    except ValueError as error:
        raise ApiError(400, f"{where}: {error}", param=f"{where}.tool_calls") from None


def _readable(arguments: str) -> str:
    """The JSON of a call's arguments. What is no object, as of a call that the limit of tokens cut off, is kept as the
    text of one: a client sends it back with the error, and asks for another try."""
    try:
        readable = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        readable = False
    return arguments if readable else json.dumps({"invalid_arguments": arguments}, ensure_ascii=False)
