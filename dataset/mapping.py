"""Rows as other projects write them -> MiniMind's own, where there is one way to read them.

row, form = as_ours("sft", {"instruction": "...", "output": "..."})    # form: what it was read as; "": it is ours
"""

from typing import Any

from dataset.chat import ROLES, json_type

ROLES_AS = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt", "chatbot"), "assistant"),
    **dict.fromkeys(("function", "observation"), "tool"),
    "developer": "system",
    **{role: role for role in ROLES},
}
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "completion", "response", "answer")
SYSTEMS = ("system", "system_prompt")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# What belongs to a question or an answer, though nobody has said how: with one of these a row is not read by guess.
PARTS = ("context", "passage", "document", "background", "history", "choices", "options", "hint", "tools", "tool_calls")
PARTS += ("functions", "reasoning", "thinking", "thought", "cot", "rationale", "explanation", "solution", *MEDIA)
PARTS += ("messages", "conversations", "chosen", "rejected", "content")


SHAREGPT = "ShareGPT (from, value)"
SHARED = {"from", "value"}  # ShareGPT's keys
OTHER_ROLES = "other names of roles (such as human, gpt)"
TEXT_PARTS = "contents in lists of one part"


class Doubt(ValueError):
    """The row can be read in several ways; the message names them."""


def as_ours(kind: str, row: dict) -> tuple[dict, str]:
    """A row for the stage `kind` (pretrain, sft, reason, preference) -> (the row with our keys, what it was read as:
    "" if nothing had to be changed). A row that is nothing known comes back as it is; Doubt for one that may be two
    things."""
    if kind == "pretrain":
        return _text(row)
    return _pair(row) if kind == "preference" else _chat(row)


def _given(row: dict, names: tuple) -> list[str]:
    """The keys among `names` that the row has; null and empty ones are as good as none."""
    return [name for name in names if row.get(name) not in (None, "", [], {})]


def _blank(row: dict, names: tuple) -> list[str]:
    """The first key among `names` whose text is empty."""
    return [name for name in names if row.get(name) == ""][:1]


def _beside(row: dict, *used: str) -> str:
    """The keys that a reading leaves out, in words. Doubt if one of them looks like a part of the text."""
    if parts := [name for name in _given(row, PARTS) if name not in used]:
        raise Doubt(f'in doubt: is "{parts[0]}" a part of the text? Write "conversations", a list of messages, instead')
    others = [f'"{key}"' for key in row if key not in used and row[key] not in (None, "", [], {})]
    return f" without {', '.join(others[:4])}{', ...' * (len(others) > 4)}" if others else ""


# ------------------------------------------------------------------------------------------------ text


def _text(row: dict) -> tuple[dict, str]:
    if row.get("text") is None and isinstance(row.get("content"), str) and "role" not in row:
        if questions := _given(row, (*QUESTIONS, *ANSWERS)):
            raise Doubt(f'in doubt: is the text "content" alone, or "{questions[0]}" too? Write it as "text"')
        return {"text": row["content"]}, '"content" as text' + _beside(row, "content", "text")
    return row, ""


# ------------------------------------------------------------------------------------------------ conversations


def _chat(row: dict) -> tuple[dict, str]:
    if (messages := row.get("conversations")) is not None and _is_ours(row, messages):
        return row, ""
    if any(isinstance(row.get(key), list) for key in ("conversations", "messages")):
        messages, form = _messages_of(row)
        return {**row, "conversations": messages}, form
    if (answers := _given(row, ANSWERS) or _blank(row, ANSWERS)) and (found := _prompt(row)):
        return _question_and_answer(row, found, answers)
    return row, ""


def _is_ours(row: dict, messages: Any) -> bool:
    """Whether a row with "conversations" is one of ours as far as names go; most rows are, so this is quick."""
    if not isinstance(messages, list) or not row.keys().isdisjoint(OTHERS):
        return False
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return False
        content = message.get("content")
        if not isinstance(content, str) and (content is not None or not SHARED.isdisjoint(message)):
            return False
    return True


OTHERS = {"messages", "tools", *SYSTEMS, *MEDIA}


def _messages_of(row: dict) -> tuple[list, str]:
    """The messages under "conversations" or "messages", with the system prompt and tools that stand beside them."""
    given = [key for key in ("conversations", "messages") if isinstance(row.get(key), list)]
    given = [key for key in given if row[key]] or given
    if len(given) == 2 and row["conversations"] != row["messages"]:
        raise Doubt('in doubt: "conversations" and "messages" are both there and differ; keep one of them')
    messages, form = to_messages(row[given[0]])
    messages, extra = _with_extras(row, messages)
    key = '"messages"' if given[0] == "messages" and not form else ""
    return messages, ", ".join(filter(None, [key, form, extra]))


def _with_extras(row: dict, messages: list) -> tuple[list, str]:
    """The messages with what stands beside them in the row: a system prompt, tools."""
    if media := _given(row, MEDIA):
        raise Doubt(f'not text alone: the row has "{media[0]}", and only text can be trained on')
    names = [*_given(row, SYSTEMS), *_given(row, ("tools",))]
    for name in names:
        messages = (_with_tools if name == "tools" else _with_system)(messages, row[name], name)
    return messages, f"with {' and '.join(names)} beside the messages" if names else ""


def _has_system(messages: list) -> bool:
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"


def _with_system(messages: list, system: Any, key: str) -> list:
    has = _has_system(messages)
    if has and messages[0].get("content") != system:
        raise Doubt(f'in doubt: "{key}" and the system message differ; keep one of them')
    return messages if has else [{"role": "system", "content": system}, *messages]


def _with_tools(messages: list, tools: Any, key: str) -> list:
    has = _has_system(messages)
    if has and messages[0].get("tools") not in (None, "", [], tools):
        raise Doubt(f'in doubt: "{key}" and those of the system message differ; keep one of them')
    system = messages[0] if has else {"role": "system", "content": None}
    return [{**system, "tools": tools}, *messages[has:]]


def to_messages(messages: list) -> tuple[list, str]:
    """Messages with our names of keys and roles; entries that are none stay as they are, for checks.py to tell."""
    out, forms = [], set()
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            ours, form = message, ""
        elif message.get("role") in ROLES and (message.get("content") is not None or SHARED.isdisjoint(message)):
            ours, form = _one_part(message)
        else:
            ours, form = _message(message, n)
        out.append(ours)
        forms.add(form)
    names = [form for form in (SHAREGPT, OTHER_ROLES, TEXT_PARTS) if form in forms]
    return out, ", ".join(names)


def _message(message: dict, n: int) -> tuple[dict, str]:
    role_keys, text_keys = (
        [k for k in keys if message.get(k) is not None] for keys in (("role", "from"), ("content", "value"))
    )
    if len(role_keys) == 2 or len(text_keys) == 2:
        both = role_keys if len(role_keys) == 2 else text_keys
        raise Doubt(f'in doubt: message {n} has "{both[0]}" and "{both[1]}"; keep one of them')
    role, form = message.get(role_keys[0]) if role_keys else None, ""
    ours = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
    if role_keys == ["from"] or text_keys == ["value"]:
        form = SHAREGPT
    name = role.strip().lower() if isinstance(role, str) else role
    content = message.get(text_keys[0]) if text_keys else None
    if name == "function_call" and isinstance(content, str):
        return {**ours, "role": "assistant", "content": "", "tool_calls": content}, form or OTHER_ROLES
    if isinstance(name, str) and ROLES_AS.get(name, role) != role:
        role, form = ROLES_AS[name], form or OTHER_ROLES
    if not form:
        return message, ""
    head = {"role": role} if role_keys else {}
    return _one_part({**head, **({"content": content} if text_keys else {}), **ours})[0], form


def _one_part(message: dict) -> tuple[dict, str]:
    """A message whose content is a list of one part, its text (OpenAI's form), with that text as its content."""
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(part := content[0], dict):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return {**message, "content": part["text"]}, TEXT_PARTS
    return message, ""


# ------------------------------------------------------------------------------------------------ questions, answers


def _prompt(row: dict) -> tuple[list, str, list[str]] | None:
    """(messages of the question, what it is called, the keys it takes), or None if there is no question."""
    given = _given(row, QUESTIONS) or _blank(row, QUESTIONS)
    if not given:
        return None
    used = [*given[:1], *_given(row, SYSTEMS)]
    name, text = given[0], row[given[0]]
    if name == "instruction":
        second = "input" if "input" in given else "context" if _given(row, ("context",)) else None
        if second is not None:
            used.append(second)
            if isinstance(text, str) and isinstance(row[second], str):
                text = f"{text}\n{row[second]}"
        given = [key for key in given if key != "input"]
    if len(given) > 1:
        raise Doubt(f'in doubt: is the question "{given[0]}" or "{given[1]}"? Keep one of them')
    if isinstance(text, list) and name == "prompt":
        messages = to_messages(text)[0]
    elif isinstance(text, str):
        messages = [{"role": "user", "content": text}]
    else:
        raise Doubt(f'"{name}" is no text: it is {json_type(text)}')
    if name == "instruction" and _given(row, ("history",)):
        messages = [*_history(row["history"]), *messages]
        used.append("history")
    if systems := _given(row, SYSTEMS):
        messages = _with_system(messages, row[systems[0]], systems[0])
    return messages, name, used


def _history(history: Any) -> list[dict]:
    """Alpaca's earlier turns: pairs of a question and an answer."""
    pairs = history if isinstance(history, list) else [None]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise Doubt('"history" is no list of pairs: each must be [question, answer]')
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _question_and_answer(row: dict, found: tuple[list, str, list[str]], answers: list[str]) -> tuple[dict, str]:
    messages, question, used = found
    if len(answers) > 1:
        raise Doubt(f'in doubt: is the answer "{answers[0]}" or "{answers[1]}"? Keep one of them')
    answer, name = row[answers[0]], answers[0]
    if isinstance(answer, list) and name == "completion" and isinstance(row[question], list):
        messages = [*messages, *to_messages(answer)[0]]
    elif isinstance(answer, str):
        reasoning = {"reasoning_content": row["reasoning_content"]} if row.get("reasoning_content") else {}
        messages = [*messages, {"role": "assistant", "content": answer, **reasoning}]
    else:
        raise Doubt(f'"{name}" is no text: it is {json_type(answer)}')
    keys = [*used, name]
    beside = _beside(row, *keys, "input", "reasoning_content")
    form = (
        "Alpaca (instruction, input, output)" if (question, name) == ("instruction", "output") else f"{question}/{name}"
    )
    if extra := [key for key in used[1:] if key != "input"]:
        form += f" with {', '.join(extra)}"
    return {"conversations": messages}, form + beside


# ------------------------------------------------------------------------------------------------ preference pairs


def _pair(row: dict) -> tuple[dict, str]:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        return row, ""
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _pair_of_lists(row, chosen, rejected)
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | dict):
        return row, ""
    prompt, forms, used = _prompt_of_pair(row)
    if prompt is None:
        if isinstance(chosen, str) and "\n\nHuman:" in chosen:
            raise Doubt("a transcript, not messages: split chosen and rejected at Human: and Assistant: into messages")
        return row, ""
    answers = [
        answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        for answer in (chosen, rejected)
    ]
    (chosen, rejected), _ = to_messages(answers)
    form = f"{forms}/chosen/rejected" + _beside(row, *used, "chosen", "rejected", "input")
    return {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}, form


def _prompt_of_pair(row: dict) -> tuple[list | None, str, list[str]]:
    """(messages before the two answers, or None, what they are called, the keys they take)."""
    if any(isinstance(row.get(key), list) for key in ("conversations", "messages")):
        messages, _ = _messages_of(row)
        return messages, "conversations", ["conversations", "messages", *SYSTEMS, "tools"]
    if found := _prompt(row):
        return found
    return None, "", []


def _pair_of_lists(row: dict, chosen: list, rejected: list) -> tuple[dict, str]:
    """chosen and rejected are whole conversations, or the answers to the prompt beside them (TRL)."""
    (chosen, form), (rejected, other) = to_messages(chosen), to_messages(rejected)
    form = form or other
    first = [side[0].get("role") if side and isinstance(side[0], dict) else None for side in (chosen, rejected)]
    if _given(row, ("prompt",)) and first == ["assistant", "assistant"]:
        prompt, _, _ = _prompt({"prompt": row["prompt"]})
        chosen, rejected, form = [*prompt, *chosen], [*prompt, *rejected], "prompt/chosen/rejected, lists of messages"
    elif _given(row, ("prompt",)) and first[0] == "assistant":
        raise Doubt('in doubt: chosen begins with an answer and rejected does not; begin both with the same "prompt"')
    (chosen, extra), (rejected, _) = _with_extras(row, chosen), _with_extras(row, rejected)
    form = ", ".join(filter(None, [form, extra]))
    return ({**row, "chosen": chosen, "rejected": rejected}, form) if form else (row, "")
