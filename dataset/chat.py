"""Chat messages -> token ids and loss mask: ChatML, or the chat template that a tokenizer's folder brings.

Used by the datasets, the generation and the server: `ids, loss_mask = render_chat(load_tokenizer(), messages)`.
chat_template.jinja is the same ChatML for other engines; tests/test_chat.py holds the two together.
"""

import json
from typing import Any

from dataset.tokenizer import (
    BOS,
    END_THINK,
    END_TOOL_CALL,
    END_TOOL_RESPONSE,
    EOS,
    MARKERS,
    PAD,
    SPECIAL_MARKERS,
    THINK,
    TOKENIZER_DIR,
    TOOL_CALL,
    TOOL_RESPONSE,
    ChatTokenizer,
    load_tokenizer,
)

__all__ = ["BOS", "EOS", "MARKERS", "PAD", "SPECIAL_MARKERS", "TOKENIZER_DIR", "load_tokenizer", "render_chat"]

# Of the tokenizers that train_tokenizer.py makes.
MARKER_IDS = {marker: token_id for token_id, marker in enumerate(MARKERS)}
PAD_ID, BOS_ID, EOS_ID = MARKER_IDS[PAD], MARKER_IDS[BOS], MARKER_IDS[EOS]
THINK_ID, END_THINK_ID = MARKER_IDS[THINK], MARKER_IDS[END_THINK]
TOOL_CALL_ID, END_TOOL_CALL_ID = MARKER_IDS[TOOL_CALL], MARKER_IDS[END_TOOL_CALL]

ROLES = ("system", "user", "assistant", "tool")

# The markers are described, not shown: in transformers a marker inside this text would become a control token.
TOOLS_BEFORE = "You can call these functions, one JSON schema per line:\n<tools>\n"
TOOLS_AFTER = (
    '\n</tools>\nTo call one, write {"name": its name, "arguments": a JSON object} between tool call markers; '
    "the result comes in the next turn."
)


class _Writer:
    """Collects markers and text; neighbouring text with the same mask is encoded as one piece, as transformers does."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer, self.ids, self.mask = tokenizer, [], []
        self.text, self.text_mask = "", 0

    def flush(self) -> None:
        ids = self.tokenizer.encode(self.text, add_special_tokens=False).ids if self.text else []
        self.ids += ids
        self.mask += [self.text_mask] * len(ids)
        self.text = ""

    def marker(self, marker: str, mask: int) -> None:
        token = self.tokenizer.marker_ids.get(marker)
        if token is None:  # a tokenizer that knows no thinking or no calls: its models spell the markers out
            self.write(marker, mask)
            return
        self.flush()
        self.ids.append(token)
        self.mask.append(mask)

    def write(self, text: str, mask: int) -> None:
        if mask != self.text_mask:
            self.flush()
            self.text_mask = mask
        self.text += text


def render_chat(
    tokenizer: ChatTokenizer,
    messages: list[dict],
    tools: list[dict] | str | None = None,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    thinking_off: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its loss mask (1 = train on this token), both of the same length.

    By the tokenizer's own chat template if it brings one, else in ChatML. Trained on: an assistant turn's thinking,
    content, tool calls and its <|im_end|>; nothing else. Markers are written as ids, data as text, so literal markers
    in a message stay text. `tools` (OpenAI schemas, a list or a JSON string)
    goes before the system message's own "tools". With `thinking_off` a last answer without reasoning is written as one
    with thinking switched off: after the empty thinking block that `enable_thinking=False` puts into the prompt.
    Raises ValueError for what cannot be rendered (see checks.validate_messages).
    """
    has_system = bool(messages) and messages[0]["role"] == "system"
    schemas = parse_tools(tools) or (parse_tools(messages[0].get("tools")) if has_system else [])
    if tokenizer.has_own_template:
        return _by_template(tokenizer, messages, schemas, add_generation_prompt, enable_thinking)
    if BOS not in tokenizer.marker_ids or EOS not in tokenizer.marker_ids:
        raise ValueError(f"{tokenizer.source} has neither a chat template nor {BOS} and {EOS}: it cannot hold a chat")
    out = _Writer(tokenizer)
    system = _content(messages[0]) if has_system else ""
    if schemas:
        lines = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
        system += ("\n\n" if system else "") + TOOLS_BEFORE + lines + TOOLS_AFTER
    if system:
        _plain_turn(out, "system", system)
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            _tool_result(out, messages, i)
        elif message["role"] == "assistant":
            _assistant_turn(out, message, thinking_off and i == len(messages) - 1)
        elif not (has_system and i == 0):
            _plain_turn(out, message["role"], _content(message))
    if add_generation_prompt:
        out.marker(BOS, 0)
        out.write("assistant\n", 0)
        if enable_thinking:
            out.marker(THINK, 0)
            out.write("\n", 0)
        elif enable_thinking is False:
            _empty_thinking(out)
    out.flush()
    return out.ids, out.mask


def _by_template(
    tokenizer: ChatTokenizer,
    messages: list[dict],
    schemas: list[dict],
    add_generation_prompt: bool,
    enable_thinking: bool | None,
) -> tuple[list[int], list[int]]:
    from dataset.template import render_template  # Jinja, which ours do without

    if tokenizer.turn_end_id is None and not add_generation_prompt:
        raise ValueError(f"{tokenizer.source}: no marker ends an answer in its chat template, so it cannot be learnt")
    theirs = [_in_openai_form(message) for message in messages]
    return render_template(tokenizer, theirs, schemas, add_generation_prompt, enable_thinking, tokenizer.turn_end_id)


def _in_openai_form(message: dict) -> dict:
    """A message as other models' templates expect it: no null fields, calls as {"function": ...}, tools apart."""
    theirs = {"role": message["role"], "content": _content(message)}
    if message["role"] == "assistant":
        theirs["content"] = _without_blank_lines(theirs["content"])
        if reasoning := message.get("reasoning_content"):
            theirs["reasoning_content"] = reasoning
        if calls := parse_tool_calls(message.get("tool_calls")):
            theirs["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return theirs


def _plain_turn(out: _Writer, role: str, content: str) -> None:
    out.marker(BOS, 0)
    out.write(f"{role}\n{content}", 0)
    out.marker(EOS, 0)
    out.write("\n", 0)


def _tool_result(out: _Writer, messages: list[dict], i: int) -> None:
    """Results of one round of calls share one user turn, so the roles keep alternating."""
    if i == 0 or messages[i - 1]["role"] != "tool":
        out.marker(BOS, 0)
        out.write("user", 0)
    out.write("\n", 0)
    out.marker(TOOL_RESPONSE, 0)
    out.write(f"\n{_content(messages[i])}\n", 0)
    out.marker(END_TOOL_RESPONSE, 0)
    if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
        out.marker(EOS, 0)
        out.write("\n", 0)


def _empty_thinking(out: _Writer) -> None:
    out.marker(THINK, 0)
    out.write("\n\n", 0)
    out.marker(END_THINK, 0)
    out.write("\n\n", 0)


def _assistant_turn(out: _Writer, message: dict, thinking_off: bool) -> None:
    out.marker(BOS, 0)
    out.write("assistant\n", 0)
    content = _without_blank_lines(_content(message))
    reasoning = _without_blank_lines(message.get("reasoning_content") or "").rstrip("\n")
    if reasoning:
        out.marker(THINK, 1)
        out.write(f"\n{reasoning}\n", 1)
        out.marker(END_THINK, 1)
        out.write("\n\n", 1)
    elif thinking_off:
        _empty_thinking(out)
    out.write(content, 1)
    for i, call in enumerate(parse_tool_calls(message.get("tool_calls"))):
        out.write("\n" if content or i else "", 1)
        out.marker(TOOL_CALL, 1)
        out.write(f"\n{json.dumps(call, ensure_ascii=False)}\n", 1)
        out.marker(END_TOOL_CALL, 1)
    out.marker(EOS, 1)
    out.write("\n", 0)


def _content(message: dict) -> str:
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"content is {json_type(content)}, not a string")
    return content or ""


def _without_blank_lines(text: str) -> str:
    """Without blank lines at the start: they would melt into one token with the newline of the "assistant" header,
    half of it prompt and half of it answer. Indentation of the first line stays."""
    rest = text.lstrip()
    indent = text[: len(text) - len(rest)]
    return indent.replace("\r", "\n").split("\n")[-1] + rest


def parse_tools(tools: Any) -> list[dict]:
    """The schemas in "tools", a list or a JSON string; [] for None or empty. ValueError says what is wrong."""
    tools = from_json(tools, "tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ValueError(f"tools is {json_type(tools)}, not a list of function schemas")
    for n, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise ValueError(f"tools: entry {n} is {json_type(tool)}, not an object")
    return tools


def parse_tool_calls(tool_calls: Any) -> list[dict]:
    """The calls in "tool_calls" as [{"name": str, "arguments": dict}]; [] for None or empty. ValueError says what is
    wrong.

    Accepts a list, a JSON string or one object; entries {"name", "arguments"} or OpenAI's {"function": {...}}, whose
    arguments are a JSON string.
    """
    tool_calls = from_json(tool_calls, "tool_calls")
    if tool_calls is None:
        return []
    entries = [tool_calls] if isinstance(tool_calls, dict) else tool_calls
    if not isinstance(entries, list):
        raise ValueError(f"tool_calls is {json_type(entries)}, not a list of calls")
    calls = []
    for n, entry in enumerate(entries, 1):
        call = (entry.get("function") or entry) if isinstance(entry, dict) else entry
        if not isinstance(call, dict):
            raise ValueError(f"tool_calls: call {n} is {json_type(call)}, not an object")
        if not isinstance(call.get("name"), str) or not call["name"]:
            raise ValueError(f'tool_calls: call {n} has no "name"')
        arguments = from_json(call.get("arguments"), f"tool_calls: arguments of call {n}")
        if arguments is not None and not isinstance(arguments, dict):
            raise ValueError(f"tool_calls: arguments of call {n} are {json_type(arguments)}, not an object")
        calls.append({"name": call["name"], "arguments": arguments or {}})
    return calls


def from_json(value: Any, field: str) -> Any:
    """`value`, decoded if it is a JSON string; None for a blank one. ValueError names the field."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}: not valid JSON ({error})") from None


def json_type(value: Any) -> str:
    """What JSON calls a value, with its article: "a string", "an object", "null"."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
