"""Request bodies of /v1/chat/completions and /v1/completions. reading.py makes them from bytes.

Types are strict, "1" is no number, but 1.0 is a count and null is as good as nothing.
"""

import json
import re
from collections import Counter
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from server.errors import ApiError
from server.fields import note, quoted
from server.messages import Message, Part, Tool, ToolChoice, fault, read_tool_choice

MAX_CHOICES = 16
MAX_SEQUENCES = 256  # prompts × choices of a request
MAX_STOPS, MAX_STOP = 64, 256  # stop strings, and characters of one: each token is compared with all of them


def _whole(value: Any) -> Any:
    """JSON of some languages has no integers: 1.0 is 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stops(value: Any) -> Any:
    """One or several; an empty one would stop everything, and means none."""
    value = [value] if isinstance(value, str) else value
    return [stop for stop in value if stop not in ("", None)] if isinstance(value, list) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(bias: Any) -> Any:
    """JSON has no numbers as keys: {"42": -100} means token 42. llama.cpp's form: [[42, -100], [43, false]]."""
    if isinstance(bias, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in bias):
        bias = {str(key): -100.0 if value is False else value for key, value in bias}
    if not isinstance(bias, dict):
        return bias
    if wrong := [key for key in bias if not re.fullmatch("[0-9]{1,9}", key)]:
        raise fault(f"{wrong[0][:40]!r} is not a token id")
    return {int(key): value for key, value in bias.items() if value is not None}


def _logprobs(value: Any) -> Any:
    """How many of the likeliest tokens; true, as in chats, means one."""
    return {True: 1, False: None}[value] if isinstance(value, bool) else _whole(value)


Int = Annotated[int, BeforeValidator(_whole)]


class StreamOptions(Part):
    include_usage: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # llama.cpp's, with json_object


class AnswerFormat(NamedTuple):
    """What the answer has to be, and the field that says so."""

    kind: str  # "json" (value: a schema), "choice" (texts), "regex", "grammar" (Lark or GBNF)
    value: Any
    param: str


FORMAT_FIELDS = {  # vLLM's, SGLang's, llama.cpp's and Ollama's
    "guided_json": "json", "guided_choice": "choice", "guided_regex": "regex", "guided_grammar": "grammar",
    "json_schema": "json", "regex": "regex", "grammar": "grammar", "ebnf": "grammar", "format": "json",
}  # fmt: skip
STRUCTURED = {"json": "json", "choice": "choice", "regex": "regex", "grammar": "grammar", "json_object": "json"}
ANY_OBJECT = {"type": "object"}


# ------------------------------------------------------------------------------------------------ bodies


class CommonRequest(Part):
    model: str | None = None  # None: the first that is served
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(max_length=MAX_STOP)]] | None, Field(max_length=MAX_STOPS), BeforeValidator(_stops)
    ] = None
    max_tokens: Int | None = Field(None, ge=-1)  # -1: as many as fit
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=1024), BeforeValidator(_biases)
    ] = None
    # Not OpenAI's, but of most servers of open models.
    top_k: Int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: Int | None = Field(None, ge=0)
    stop_token_ids: list[Int] | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool | None = None  # answers of max_tokens, for measurements
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # in log-probabilities
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_choice: list[str] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    ebnf: str | None = None
    format: str | dict[str, Any] | None = None

    def check(self) -> None:
        """What the types cannot say. Raises ApiError."""
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream true", param="stream_options")
        _ = self.answer_format

    @property
    def answer_format(self) -> AnswerFormat | None:
        """The one that the request asks for. Raises ApiError for several, and for one that is none."""
        given = [(STRUCTURED.get(key), value, f"structured_outputs.{key[:40]}")
                 for key, value in (self.structured_outputs or {}).items() if value not in (None, False)]  # fmt: skip
        given += [(kind, getattr(self, name), name) for name, kind in FORMAT_FIELDS.items() if getattr(self, name)]
        formats = [_answer_format(*each) for each in given]
        if self.response_format and self.response_format.type != "text":
            formats.append(_response_format(self.response_format))
        # The same under an old and a new name is one.
        if others := [each for each in formats if each[:2] != formats[0][:2]]:
            text = f"{formats[0].param} and {others[0].param}: an answer can have one format"
            raise ApiError(400, text, param=others[0].param)
        return formats[0] if formats else None


def _response_format(given: ResponseFormat) -> AnswerFormat:
    if given.type == "json_object":
        return AnswerFormat("json", ANY_OBJECT if given.schema_ is None else given.schema_, "response_format")
    inner = given.json_schema if given.json_schema is not None else {"schema": given.schema_}
    if inner.get("schema") is None:
        where = "response_format.json_schema"
        raise ApiError(400, "a response_format json_schema needs a schema", param=where)
    if not isinstance(inner["schema"], dict):
        where = "response_format.json_schema.schema"
        raise ApiError(400, f"{where}: must be an object", param=where)
    return AnswerFormat("json", inner["schema"], "response_format")


def _answer_format(kind: str | None, value: Any, param: str) -> AnswerFormat:
    if kind is None:
        raise ApiError(400, f"{param} is not supported", param=param, code="unsupported_parameter")
    if kind == "json" and (value is True or value in ("json", "json_object")):
        value = ANY_OBJECT
    elif kind == "json" and isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ApiError(400, f"{param}: the schema is not JSON", param=param) from None
    good = {
        "json": isinstance(value, dict),
        "choice": isinstance(value, list) and value and all(isinstance(text, str) for text in value),
        "regex": isinstance(value, str),
        "grammar": isinstance(value, str),
    }
    if not good[kind]:
        needed = {"json": "a schema", "choice": "a list of strings"}.get(kind, "a string")
        raise ApiError(400, f"{param}: must be {needed}", param=param)
    return AnswerFormat(kind, value, param)


class ChatRequest(CommonRequest):
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Annotated[Any, BeforeValidator(read_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=20)
    max_completion_tokens: Int | None = Field(None, ge=-1)
    reasoning_effort: str | None = None  # "none" switches thinking off; how much there is cannot be chosen
    enable_thinking: bool | None = None
    think: bool | str | None = None
    thinking: bool | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def thinks(self) -> bool | None:
        """Whether the answer begins with thinking; None: as the server is set. Raises ApiError if fields contradict."""
        given = {name: _switch(name, getattr(self, name)) for name in ("enable_thinking", "think", "thinking")}
        for name, value in (self.chat_template_kwargs or {}).items():
            where = f"chat_template_kwargs.{name[:40]}"
            if name in ("enable_thinking", "thinking"):
                given[where] = _switch(where, value)
            elif value is not None:
                note("template", name, f"ignored: {quoted(where)}, which the chat template does not know")
        given["reasoning_effort"] = False if self.reasoning_effort == "none" else None
        said = {value: name for name, value in given.items() if value is not None}
        if len(said) > 1:
            raise ApiError(400, f"{said[True]} and {said[False]} contradict each other", param=said[False])
        return next(iter(said), None)

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the text of the last message, an assistant's."""
        last = self.messages[-1].role == "assistant" and not self.messages[-1].tool_calls
        if self.continue_final_message is None:
            return last and self.add_generation_prompt is None
        return self.continue_final_message

    @property
    def choice_of_tool(self) -> ToolChoice:
        if not self.tools:
            return ToolChoice("none")
        return self.tool_choice or ToolChoice("auto")

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
        names = Counter(tool.function.name for tool in self.tools or ())
        if twice := [name for name, count in names.items() if count > 1]:
            raise ApiError(400, f"there are two functions {twice[0]}", param="tools")
        choice = self.tool_choice or ToolChoice("auto")
        if choice.mode == "required" and not names:
            raise ApiError(400, "tool_choice is only allowed with tools", param="tool_choice")
        if unknown := [name for name in choice.names if name not in names]:
            raise ApiError(400, f"tool_choice: there is no function {unknown[0][:80]!r} in tools", param="tool_choice")
        _ = self.thinks
        if self.continue_final_message and self.add_generation_prompt:
            text = "continue_final_message and add_generation_prompt cannot both be true"
            raise ApiError(400, text, param="continue_final_message")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            text = "continue_final_message: the last message is not the assistant's"
            raise ApiError(400, text, param="continue_final_message")

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that may be called."""
        names = self.choice_of_tool.names
        return [tool for tool in self.tools or () if not names or tool.function.name in names]

    def tool_schemas(self) -> list[dict]:
        """The tools as the prompt shows them: not those that must not be called, but all if one is to be called now."""
        choice = self.choice_of_tool
        if choice.mode == "none":
            return []
        shown = self.tools if choice.named else self.callable_tools
        return [tool.model_dump(exclude_none=True) for tool in shown or ()]


def _switch(name: str, value: Any) -> bool | None:
    """On, off, or nothing said: true, {"type": "enabled"} (Anthropic, DeepSeek), "high" (Ollama's efforts)."""
    if isinstance(value, dict):
        kind = value.get("type")
        known = {"enabled": True, "adaptive": None, "disabled": False}
        value = known[kind] if isinstance(kind, str) and kind in known else value
    elif isinstance(value, str):
        value = {"low": True, "medium": True, "high": True, "none": False}.get(value, value)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name}: must be true or false", param=name)
    return value


class CompletionRequest(CommonRequest):
    prompt: Annotated[list[str] | list[Int] | list[list[Int]], BeforeValidator(_as_list)]
    logprobs: Annotated[int | None, Field(ge=0, le=20), BeforeValidator(_logprobs)] = None
    echo: bool | None = None
    best_of: Int | None = Field(None, ge=1, le=MAX_CHOICES)

    @property
    def token_limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def sequences(self) -> int:
        """Answers that are generated for each prompt, of which the n likeliest are given."""
        return max(self.best_of or 1, self.n or 1)

    def check(self) -> None:
        super().check()
        most = MAX_SEQUENCES // self.sequences
        if not self.prompt or len(self.prompts) > most:
            raise ApiError(400, f"prompt: there must be 1 to {most} prompts", param="prompt")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ApiError(400, f"best_of {self.best_of} is less than n", param="best_of")
        if self.stream and self.sequences > (self.n or 1):
            raise ApiError(
                400, "best_of: which answers are best is known only at the end, not in a stream", param="best_of"
            )

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt
