"""Chat messages -> token ids and loss mask, in ChatML; and the faults of a conversation, in words.

Used by the datasets, the generation and the server: `ids, loss_mask = render_chat(load_tokenizer(), messages)`.
chat_template.jinja is the same rendering for other engines; tests/test_chat.py holds the two together.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

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
    Raises ValueError for what cannot be rendered (see validate_messages).
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
        raise ValueError(f"content is {_kind(content)}, not a string")
    return content or ""


def _without_blank_lines(text: str) -> str:
    """Without blank lines at the start: they would melt into one token with the newline of the "assistant" header,
    half of it prompt and half of it answer. Indentation of the first line stays."""
    rest = text.lstrip()
    indent = text[: len(text) - len(rest)]
    return indent.replace("\r", "\n").split("\n")[-1] + rest


def parse_tools(tools: Any) -> list[dict]:
    """The schemas in "tools", a list or a JSON string; [] for None or empty. ValueError says what is wrong."""
    tools = _from_json(tools, "tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ValueError(f"tools is {_kind(tools)}, not a list of function schemas")
    for n, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise ValueError(f"tools: entry {n} is {_kind(tool)}, not an object")
    return tools


def parse_tool_calls(tool_calls: Any) -> list[dict]:
    """The calls in "tool_calls" as [{"name": str, "arguments": dict}]; [] for None or empty. ValueError says what is
    wrong.

    Accepts a list, a JSON string or one object; entries {"name", "arguments"} or OpenAI's {"function": {...}}, whose
    arguments are a JSON string.
    """
    tool_calls = _from_json(tool_calls, "tool_calls")
    if tool_calls is None:
        return []
    entries = [tool_calls] if isinstance(tool_calls, dict) else tool_calls
    if not isinstance(entries, list):
        raise ValueError(f"tool_calls is {_kind(entries)}, not a list of calls")
    calls = []
    for n, entry in enumerate(entries, 1):
        call = (entry.get("function") or entry) if isinstance(entry, dict) else entry
        if not isinstance(call, dict):
            raise ValueError(f"tool_calls: call {n} is {_kind(call)}, not an object")
        if not isinstance(call.get("name"), str) or not call["name"]:
            raise ValueError(f'tool_calls: call {n} has no "name"')
        arguments = _from_json(call.get("arguments"), f"tool_calls: arguments of call {n}")
        if arguments is not None and not isinstance(arguments, dict):
            raise ValueError(f"tool_calls: arguments of call {n} are {_kind(arguments)}, not an object")
        calls.append({"name": call["name"], "arguments": arguments or {}})
    return calls


def _from_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}: not valid JSON ({error})") from None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


class Fault(NamedTuple):
    level: str  # "error": the conversation cannot be trained on; "warning": kept as it is
    text: str  # names the message (counted from 1) and the field


ROLE_HINTS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}
MARKER_PATTERN = re.compile("|".join(re.escape(marker) for marker in MARKERS))
CONTROL_PATTERN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SURROGATE_PATTERN = re.compile(r"[\ud800-\udfff]")


def validate_messages(messages: Any, tools: list[dict] | str | None = None) -> list[Fault]:
    """Everything doubtful about a conversation, in words; [] if it is clean. Never raises.

    A conversation without an "error" can be rendered by render_chat and holds at least one answer to learn.
    """
    if not isinstance(messages, list):
        return [Fault("error", f"conversation is {_kind(messages)}, not a list of messages")]
    if not messages:
        return [Fault("error", "conversation is empty")]
    faults = _tools_faults(tools, "tools")
    for n, message in enumerate(messages, 1):
        where = f"message {n}"
        if not isinstance(message, dict):
            faults.append(Fault("error", f"{where}: is {_kind(message)}, not an object"))
            continue
        faults += _role_faults(message, where)
        faults += _text_faults(message, where)
        if message.get("role") == "system":
            faults += _tools_faults(message.get("tools"), f"{where}: tools")
        elif message.get("role") == "assistant":
            faults += _answer_faults(message, where)
    if all(isinstance(message, dict) for message in messages):
        faults += _order_faults(messages)
        faults += _call_faults(messages, tools)
    return faults


def _role_faults(message: dict, where: str) -> list[Fault]:
    role = message.get("role")
    if role is None:
        hint = "; looks like ShareGPT: rename from/value to role/content" if "from" in message else ""
        return [Fault("error", f"{where}: role is missing or null{hint}")]
    if not isinstance(role, str):
        return [Fault("error", f"{where}: role is {_kind(role)}, not a string")]
    if role not in ROLES:
        meant = role.strip().lower()
        meant = ROLE_HINTS.get(meant, meant)
        hint = f', did you mean "{meant}"?' if meant in ROLES else "; known are " + ", ".join(ROLES)
        return [Fault("error", f"{where}: unknown role {json.dumps(role)}{hint}")]
    return []


def _text_faults(message: dict, where: str) -> list[Fault]:
    faults = []
    content = message.get("content")
    role = message.get("role")
    may_be_null = (role == "assistant" and message.get("tool_calls")) or (role == "system" and message.get("tools"))
    if content is None and not may_be_null:
        faults.append(Fault("error", f"{where}: content is missing or null"))
    elif isinstance(content, str) and not content.strip() and role == "user":
        faults.append(Fault("warning", f"{where}: content is blank"))
    for field in ("content", "reasoning_content", "tools", "tool_calls"):
        value = message.get(field)
        if not isinstance(value, str):
            if value is not None and field in ("content", "reasoning_content"):
                faults.append(Fault("error", f"{where}: {field} is {_kind(value)}, not a string"))
            value = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else ""
        else:
            value += _decoded(value) if field in ("tools", "tool_calls") else ""
        if SURROGATE_PATTERN.search(value):
            faults.append(Fault("error", f"{where}: {field} has a lone surrogate, which is not a Unicode character"))
        if field in ("content", "reasoning_content") and CONTROL_PATTERN.search(value):
            faults.append(Fault("warning", f"{where}: {field} has control characters"))
        if found := sorted(set(MARKER_PATTERN.findall(value))):
            faults.append(Fault("warning", f"{where}: {field} has literal {', '.join(found)}; kept as plain text"))
    return faults


def _decoded(text: str) -> str:
    """What a JSON string says once its escapes are decoded: a surrogate may hide in them."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return ""


def _tools_faults(tools: Any, where: str) -> list[Fault]:
    try:
        schemas = parse_tools(tools)
    except ValueError as error:
        return [Fault("error", f"{where}: {error}".replace("tools: tools", "tools"))]
    faults = []
    if isinstance(tools, list) and where != "tools":
        faults.append(Fault("warning", f"{where} is a list, not a JSON string; accepted"))
    for n, schema in enumerate(schemas, 1):
        if not isinstance(_function_name(schema), str):
            faults.append(Fault("warning", f'{where}: entry {n} has no function "name"'))
    return faults


def _function_name(schema: dict) -> Any:
    function = schema.get("function") or schema
    return function.get("name") if isinstance(function, dict) else None


def _answer_faults(message: dict, where: str) -> list[Fault]:
    """Faults of one assistant message by itself; its calls are compared with tools and results in _call_faults."""
    faults = []
    tool_calls = message.get("tool_calls")
    if isinstance(tool_calls, list):
        faults.append(Fault("warning", f"{where}: tool_calls is a list, not a JSON string; accepted"))
    try:
        calls = parse_tool_calls(tool_calls)
        raw = _from_json(tool_calls, "tool_calls")
    except ValueError as error:
        return faults + [Fault("error", f"{where}: {error}")]
    if tool_calls is not None and not calls:
        faults.append(Fault("warning", f"{where}: tool_calls is empty; ignored"))
    if isinstance(raw, dict):
        faults.append(Fault("warning", f"{where}: tool_calls is one object, not a list; accepted"))
    elif any(isinstance(entry.get("arguments"), str) for entry in raw or []):
        faults.append(Fault("warning", f"{where}: tool_calls: arguments are a JSON string, not an object; accepted"))
    content = message.get("content")
    if not calls and isinstance(content, str) and not content.strip():
        level = "warning" if message.get("reasoning_content") else "error"
        faults.append(Fault(level, f"{where}: the assistant says nothing (content is empty, no tool_calls)"))
    return faults


def _order_faults(messages: list[dict]) -> list[Fault]:
    faults = []
    roles = [message.get("role") for message in messages]
    turns = [(n, role) for n, role in enumerate(roles, 1) if role != "system"]
    for n, role in enumerate(roles, 1):
        if role == "system" and n > 1:
            again = "a second system message" if "system" in roles[: n - 1] else "the system message is not the first"
            faults.append(Fault("warning", f"message {n}: role: {again}"))
    if turns and turns[0][1] == "assistant":
        faults.append(Fault("warning", f"message {turns[0][0]}: role: the assistant speaks first"))
    for (_, before), (n, role) in zip(turns, turns[1:], strict=False):
        if role == before and role in ("user", "assistant"):
            faults.append(Fault("warning", f"message {n}: role: two {role} messages in a row"))
    if "assistant" not in roles:
        faults.append(Fault("error", "no assistant message: nothing to learn"))
    elif roles[-1] != "assistant":
        faults.append(Fault("warning", f"message {len(roles)}: role: the last message is not from the assistant"))
    return faults


def _call_faults(messages: list[dict], tools: Any) -> list[Fault]:
    """Calls against the listed functions, and calls against results."""
    faults, names = [], None
    try:
        own_tools = messages[0].get("tools") if messages[0].get("role") == "system" else None
        names = {_function_name(schema) for schema in parse_tools(tools) or parse_tools(own_tools)}
    except (ValueError, TypeError):
        pass  # reported by _tools_faults; without a list there is nothing to compare with
    waiting = 0  # calls of the last assistant message that have no result yet; None: its calls are unreadable
    for n, message in enumerate([*messages, {}], 1):
        role = message.get("role")
        if role == "tool":
            if waiting == 0:
                faults.append(Fault("error", f"message {n}: role: a tool message without a call before it"))
            waiting = max(0, waiting - 1) if waiting else waiting
            continue
        if waiting:
            text = f"tool_calls: {waiting} call(s) not answered by a tool message"
            faults.append(Fault("warning", f"message {n - 1}: {text}"))
        waiting = 0
        if role != "assistant":
            continue
        try:
            calls = parse_tool_calls(message.get("tool_calls"))
        except ValueError:
            waiting = None  # reported by _answer_faults
            continue
        waiting = len(calls)
        for call in calls if names is not None else []:
            if call["name"] not in names:
                text = f"tool_calls: calls {json.dumps(call['name'])}, which tools does not list"
                faults.append(Fault("error", f"message {n}: {text}"))
    return faults
