"""Faults of rows, in words: why training skips one (an error), and what is doubtful in one that it keeps (a warning).

faults = conversation_faults({"conversations": [...]})     # or text_fault, preference_faults; validate_messages inside
"""

import itertools
import json
import re
from typing import Any, NamedTuple

from dataset.chat import MARKERS, ROLES, from_json, json_type, parse_tool_calls, parse_tools
from dataset.mapping import ROLES_AS


class Fault(NamedTuple):
    level: str  # "error": the row cannot be trained on; "warning": it is kept as it is
    text: str  # names the message (counted from 1) and the field, where there is one


# ------------------------------------------------------------------------------------------------ rows


def text_fault(row: dict) -> Fault | None:
    """Why a pretraining row cannot be used, or None."""
    if "text" not in row:
        return _missing_key("text", row)
    text = row["text"]
    if not isinstance(text, str):
        return Fault("error", f'"text" is not a string: it is {json_type(text)}')
    if not text.strip():
        return Fault("error", "text of blanks only" if text else "empty text")
    return None


def conversation_faults(row: dict) -> list[Fault]:
    """All faults of an SFT row; the row is used if none of them is an error."""
    if "conversations" not in row:
        return [_missing_key("conversations", row)]
    return validate_messages(row["conversations"])


def preference_faults(row: dict) -> list[Fault]:
    """All faults of a DPO row; the row is used if none of them is an error."""
    if missing := [_missing_key(key, row) for key in ("chosen", "rejected") if key not in row]:
        return missing
    chosen, rejected = row["chosen"], row["rejected"]
    faults = [Fault(level, f"chosen: {text}") for level, text in validate_messages(chosen)]
    faults += [Fault(level, f"rejected: {text}") for level, text in validate_messages(rejected)]
    if not any(fault.level == "error" for fault in faults):
        if chosen[:-1] != rejected[:-1]:
            faults.append(
                Fault(
                    "error", "different prompts: chosen and rejected differ before the last message; make these equal"
                )
            )
        elif chosen == rejected:
            faults.append(Fault("error", "nothing to prefer: chosen and rejected are the same"))
    return faults


def _missing_key(key: str, row: dict) -> Fault:
    if other := next((other for other in row if other.strip().lower() == key), None):
        return Fault("error", f'key in the wrong case: {quoted(other)} instead of "{key}"; rename it')
    keys = ", ".join(quoted(other) for other in itertools.islice(row, 5)) + ", ..." * (len(row) > 5)
    found = f"the keys are {keys}" if row else "the object is empty"
    return Fault("error", f'no "{key}" key: {found}; {_remedy(key, row)}')


def _remedy(key: str, row: dict) -> str:
    """What to do with a row that has no `key`, nor anything that stands for it."""
    if {"chosen", "rejected"} <= row.keys() and key not in ("chosen", "rejected"):
        return "preference pairs are for train_dpo.py"
    if key == "text" and (row.keys() & {"conversations", "messages"} or {"instruction", "output"} <= row.keys()):
        return "conversations are for train_full_sft.py"
    if key == "conversations" and isinstance(row.get("text"), str):
        return "plain text is for train_pretrain.py"
    wrapped = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if wrapped and not {"role", "from"} & row[wrapped[0]][0].keys():
        return f"the rows are a list in it: jq -c '.{json.dumps(wrapped[0])}[]' FILE > NEW.jsonl takes them out"
    if key == "chosen" and row.keys() & {"conversations", "messages"}:
        return f"conversations are for train_full_sft.py; {EXPECTED[key]}"
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if key == "conversations" and len(texts) == len(row) == 2:
        asked, answer = (json.dumps(name, ensure_ascii=False) for name in texts)
        command = f"jq -c '{{prompt: .{asked}, completion: .{answer}}}' FILE > NEW.jsonl"
        return f"if {asked} is asked and {answer} answers: {command}"
    if key == "text" and texts:
        longest = json.dumps(max(texts, key=lambda name: len(row[name])), ensure_ascii=False)
        return f"if {longest} is the text: jq -c '{{text: .{longest}}}' FILE > NEW.jsonl"
    return EXPECTED[key]


EXPECTED = {
    "text": 'expected is {"text": "..."}',
    "conversations": 'expected is "conversations" or "messages" (role and content, or from and value), or instruction, '
    "input and output, or prompt and completion, or question and answer; rename the keys",
    "chosen": 'expected are "chosen" and "rejected", lists of messages or, with a "prompt", texts; rename the keys',
}
EXPECTED["rejected"] = EXPECTED["chosen"]


def quoted(value: Any) -> str:
    """A value as JSON, in one line, shortened."""
    return printable(json.dumps(value, ensure_ascii=False, default=str), 60)


def printable(text: str, most: int) -> str:
    """The text in one line of at most so many characters, control characters as escapes."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:most])
    return shown + "..." * (len(text) > most)


def kind_of(fault: str) -> str:
    """A fault's text without its details (message number, quoted value, count): what faults are grouped by."""
    match = re.match(r"(chosen: |rejected: |)message \d+: (.*)", fault, re.DOTALL)
    if not match:
        return fault.split(":")[0].split(";")[0]
    text = re.sub(r'"(?:\\.|[^"\\])*"', '"..."', match[1] + match[2].split(";")[0])
    return re.sub(r"literal .*", "literal markers", re.sub(r"\d+", "N", re.sub(r" \(.*", "", text)))


# ------------------------------------------------------------------------------------------------ messages

MARKER_PATTERN = re.compile("|".join(re.escape(marker) for marker in MARKERS))
CONTROL_PATTERN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SURROGATE_PATTERN = re.compile(r"[\ud800-\udfff]")


def validate_messages(messages: Any, tools: list[dict] | str | None = None) -> list[Fault]:
    """Everything doubtful about a conversation, in words; [] if it is clean. Never raises.

    A conversation without an "error" can be rendered by render_chat and holds at least one answer to learn.
    """
    if not isinstance(messages, list):
        return [Fault("error", f"conversation is {json_type(messages)}, not a list of messages")]
    if not messages:
        return [Fault("error", "conversation is empty")]
    faults = _tools_faults(tools, "tools")
    for n, message in enumerate(messages, 1):
        where = f"message {n}"
        if not isinstance(message, dict):
            faults.append(Fault("error", f"{where}: is {json_type(message)}, not an object"))
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
        keys = ", ".join(map(quoted, itertools.islice(message, 5))) or "none"
        return [Fault("error", f"{where}: role is missing or null (the keys are {keys}); known are {', '.join(ROLES)}")]
    if not isinstance(role, str):
        return [Fault("error", f"{where}: role is {json_type(role)}, not a string")]
    if role not in ROLES:
        meant = ROLES_AS.get(role.strip().lower())
        hint = f', did you mean "{meant}"?' if meant else "; known are " + ", ".join(ROLES)
        return [Fault("error", f"{where}: unknown role {quoted(role)}{hint}")]
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
                hint = _parts_hint(value) if field == "content" else ""
                faults.append(Fault("error", f"{where}: {field} is {json_type(value)}, not a string{hint}"))
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


def _parts_hint(content: Any) -> str:
    """Of a content in OpenAI's list of parts: what it holds that is no single text."""
    kinds = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    if others := [kind for kind in kinds if kind != "text"]:
        return f"; it has a part of type {quoted(others[0])}, and only text can be trained on"
    return "; join its parts into one string" if kinds else ""


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
        raw = from_json(tool_calls, "tool_calls")
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
