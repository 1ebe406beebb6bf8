"""Chat messages -> token ids and loss mask, in ChatML.

Used by the datasets, the generation and the server: `ids, loss_mask = render_chat(load_tokenizer(), messages)`.
chat_template.jinja is the same rendering for other engines; tests/test_chat.py holds the two together.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

TOKENIZER_DIR = Path(__file__).resolve().parent.parent / "model" / "tokenizer"

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, END_TOOL_RESPONSE = "<tool_response>", "</tool_response>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(7))
# A marker's place in this tuple is its token id, 0 to 15.
MARKERS = (PAD, BOS, EOS, THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE, *RESERVED)
MARKER_IDS = {marker: token_id for token_id, marker in enumerate(MARKERS)}
# The ones a decoder may hide; the think and tool markers are part of an answer and stay visible (as in Qwen3).
SPECIAL_MARKERS = frozenset((PAD, BOS, EOS, *RESERVED))
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


def load_tokenizer(folder: str | Path = TOKENIZER_DIR) -> Tokenizer:
    """The tokenizer of `folder`, in which text can never become a marker.

    The markers stay in the vocabulary (`token_to_id`, `decode` know them) but are no longer searched for in text, so
    `encode("<|im_end|>")` gives ordinary pieces. transformers does turn such text into control tokens: whoever renders
    untrusted text with it must clean the text first.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        spec["added_tokens"] = []
        return Tokenizer.from_str(json.dumps(spec))
    except FileNotFoundError:
        raise FileNotFoundError(f"no tokenizer at {path}; make one with train_tokenizer.py") from None
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
        raise ValueError(f"{path} is not a tokenizer: {error}; make one with train_tokenizer.py") from None


class _Writer:
    """Collects markers and text; neighbouring text with the same mask is encoded as one piece, as transformers does."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.mask = tokenizer, [], []
        self.text, self.text_mask = "", 0

    def flush(self) -> None:
        ids = self.tokenizer.encode(self.text, add_special_tokens=False).ids if self.text else []
        self.ids += ids
        self.mask += [self.text_mask] * len(ids)
        self.text = ""

    def marker(self, marker: str, mask: int) -> None:
        self.flush()
        self.ids.append(MARKER_IDS[marker])
        self.mask.append(mask)

    def write(self, text: str, mask: int) -> None:
        if mask != self.text_mask:
            self.flush()
            self.text_mask = mask
        self.text += text


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict],
    tools: list[dict] | str | None = None,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    thinking_off: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its loss mask (1 = train on this token), both of the same length.

    Trained on: an assistant turn's thinking, content, tool calls and its <|im_end|>; nothing else. Markers are written
    as ids, data as text, so literal markers in a message stay text. `tools` (OpenAI schemas, a list or a JSON string)
    goes before the system message's own "tools". With `thinking_off` a last answer without reasoning is written as one
    with thinking switched off: after the empty thinking block that `enable_thinking=False` puts into the prompt.
    Raises ValueError for what cannot be rendered (see checks.validate_messages).
    """
    out = _Writer(tokenizer)
    has_system = bool(messages) and messages[0]["role"] == "system"
    system = _content(messages[0]) if has_system else ""
    schemas = parse_tools(tools) or (parse_tools(messages[0].get("tools")) if has_system else [])
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
