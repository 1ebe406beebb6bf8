"""Request bodies of /v1/chat/completions and /v1/completions: from bytes to checked fields.

request = read_body(body, ChatRequest)   # ApiError 400, which names the field

Types are strict: "1" is no number and 1.0 no count. A field that OpenAI has and we have no use for is ignored; one
that nobody knows is refused, as it may be a misspelt one.
"""

import json
import re
from collections import Counter
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from dataset.chat import parse_tool_calls
from server.errors import ApiError

MAX_CHOICES = 16
MAX_STOPS, MAX_STOP = 4, 256  # stop strings, and characters of one: each token is compared with all of them
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("value", "{message}", {"message": message})


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text_of_parts(content: Any) -> Any:
    """A list of text parts as the one text that it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for n, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _fault(f'part {n} is not {{"type": "text", "text": a string}}: this model reads nothing but text')
        texts.append(part["text"])
    return "".join(texts)


def _token_ids(bias: Any) -> Any:
    """JSON has no numbers as keys: {"42": -100} means token 42."""
    if not isinstance(bias, dict):
        return bias
    if wrong := [key for key in bias if not re.fullmatch("[0-9]{1,9}", key)]:
        raise _fault(f"{wrong[0][:40]!r} is not a token id")
    return {int(key): value for key, value in bias.items()}


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Part(BaseModel):
    """An object inside a body, of which clients send back more than is needed: the rest is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------ messages and tools


class FunctionCall(Part):
    name: str = Field(min_length=1)
    arguments: str


class ToolCall(Part):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text_of_parts)] = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Part):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Part):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Part):
    include_usage: bool | None = None


class TemplateOptions(Body):
    enable_thinking: bool | None = None


# ------------------------------------------------------------------------------------------------ bodies


class CommonRequest(Body):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP)]] | None,
        Field(max_length=MAX_STOPS),
        BeforeValidator(_as_list),
    ] = None
    max_tokens: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=1024), BeforeValidator(_token_ids)
    ] = None
    # Not OpenAI's, but of most servers of open models.
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = None  # answers of max_tokens, for measurements
    # OpenAI's, and without a meaning here.
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def check(self) -> None:
        """What the types cannot say. Raises ApiError."""
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream true", param="stream_options")


class ChatRequest(CommonRequest):
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: TemplateOptions | None = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    modalities: Any = None
    verbosity: Any = None
    prediction: Any = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def thinking(self) -> bool | None:
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None

    @property
    def choice_of_tool(self) -> str:
        """ "none", "auto", "required" or "function:NAME"."""
        if isinstance(self.tool_choice, NamedTool):
            return f"function:{self.tool_choice.function.name}"
        return self.tool_choice or ("auto" if self.tools else "none")

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
        if self.response_format and self.response_format.type == "json_schema" and not self.response_format.json_schema:
            raise ApiError(400, "a response_format json_schema needs a schema", param="response_format.json_schema")
        names = Counter(tool.function.name for tool in self.tools or ())
        if twice := [name for name, count in names.items() if count > 1]:
            raise ApiError(400, f"there are two functions {twice[0]}", param="tools")
        if self.tool_choice not in (None, "none") and not names:
            raise ApiError(400, "tool_choice is only allowed with tools", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name
            raise ApiError(400, f"tool_choice: there is no function {name} in tools", param="tool_choice")

    def tool_schemas(self) -> list[dict]:
        """The tools as the prompt shows them; a model that must not call any does not see them."""
        if self.choice_of_tool == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    def conversation(self) -> list[dict]:
        """Messages for render_chat: tool results without ids stand in the order of their calls. Raises ApiError."""
        messages, calls = [], {}  # ids of the calls that wait for a result, and the results: {id: message or None}

        def end_round() -> None:
            if missing := [i for i, result in calls.items() if result is None]:
                text = f"message {len(messages)}: the call {missing[0]!r} has no tool message with its result"
                raise ApiError(400, text, param="messages")
            messages.extend(calls.values())
            calls.clear()

        for n, message in enumerate(self.messages):
            where = f"messages[{n}]"
            if message.content is None and not (message.role == "assistant" and message.tool_calls):
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
            plain = {"role": role, "content": message.content or ""}
            if message.role == "assistant":
                plain["reasoning_content"] = message.reasoning_content
                plain["tool_calls"] = self._calls(message, where)
                calls = dict.fromkeys(call.id for call in message.tool_calls or ())
                if len(calls) < len(message.tool_calls or ()):
                    raise ApiError(400, f"{where}: two calls with one id", param=f"{where}.tool_calls")
            messages.append(plain)
        end_round()
        return messages

    def _calls(self, message: Message, where: str) -> list[dict]:
        try:
            return parse_tool_calls([call.function.model_dump() for call in message.tool_calls or ()])
        except ValueError as error:
            raise ApiError(400, f"{where}: {error}", param=f"{where}.tool_calls") from None


class CompletionRequest(CommonRequest):
    prompt: Annotated[list[str] | list[int] | list[list[int]], BeforeValidator(_as_list)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: None = None
    best_of: int | None = None

    @property
    def token_limit(self) -> int:
        return self.max_tokens or 16  # OpenAI's default

    def check(self) -> None:
        super().check()
        if not self.prompt or len(self.prompts) > MAX_CHOICES:
            raise ApiError(400, f"prompt: there must be 1 to {MAX_CHOICES} prompts", param="prompt")
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, "best_of is not supported: ask for n choices", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not supported", param="echo")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


# ------------------------------------------------------------------------------------------------ reading

Request = TypeVar("Request", bound=CommonRequest)


def parse_body(body: bytes) -> dict:
    """The JSON object in a body, in which every text is Unicode. Raises ApiError."""
    try:
        content = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object")
    if ESCAPED_SURROGATE.search(body) and (where := _find_surrogate(content)):
        path = _path(where)
        raise ApiError(400, f"{path} has a lone surrogate, which is not a Unicode character", param=path)
    return content


def read_body(body: bytes, kind: type[Request]) -> Request:
    """The request in a body; ApiError 400 names what is wrong with it."""
    content = parse_body(body)
    try:
        request = kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"there is no parameter {path}", param=path, code="unknown_parameter") from None
        if first["type"] == "missing":
            raise ApiError(400, f"{path} is missing", param=path, code="missing_required_parameter") from None
        raise ApiError(400, f"{path}: {first['msg']}", param=path, code="invalid_value") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    request.check()
    return request


def _path(loc: tuple) -> str:
    """messages[0].content; without the names that pydantic gives to the members of a union."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[\w-]{1,64}", part) and part not in ("str", "int", "NamedTool"):
            path += f".{part}" if path else part
    return path


def _find_surrogate(value: Any, where: tuple = ()) -> tuple | None:
    """Where in a JSON value the first text with a lone surrogate is."""
    if isinstance(value, str):
        return where if LONE_SURROGATE.search(value) else None
    if isinstance(value, dict):
        if any(LONE_SURROGATE.search(key) for key in value):
            return where
        parts = value.items()
    else:
        parts = enumerate(value) if isinstance(value, list) else ()
    return next((found for key, part in parts if (found := _find_surrogate(part, (*where, key)))), None)
