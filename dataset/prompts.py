"""Prompts: conversations that wait for an answer.

prompts, description = read_prompts("prompts.jsonl")

One JSON object a line: {"prompt": "text"}, or {"conversations": [...]}, whose last answer, if it has one, is left out.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from dataset.checks import validate_messages
from dataset.jsonl import DataError, read_jsonl
from dataset.packing import add_reason, reasons


def key_of(messages: list[dict]) -> bytes:
    """Equal for equal messages."""
    return hashlib.blake2b(json.dumps(messages, sort_keys=True).encode(), digest_size=16).digest()


def read_prompts(path: str | Path, limit: int | None = None) -> tuple[dict[bytes, tuple[int, list[dict]]], str]:
    """The first `limit` different prompts, {key: (line, messages)}, and what was skipped, in one line of words.

    DataError if there is no prompt at all.
    """
    prompts: dict[bytes, tuple[int, list[dict]]] = {}
    skipped: dict = {}
    number = duplicates = 0
    for number, row, fault in read_jsonl(path):
        messages, error = ([], fault.text) if fault else _to_prompt(row)
        if error:
            add_reason(skipped, number, error)
        elif (key := key_of(messages)) in prompts:
            duplicates += 1
        else:
            prompts[key] = number, messages
            if len(prompts) == limit:
                break
    if not prompts:
        raise DataError(f"{path}: none of its {number} lines is a prompt: {reasons(skipped) or 'the file is empty'}")
    faulty = sum(reason["count"] for reason in skipped.values())
    text = (
        f"{Path(path).name}: {number:,} lines, {len(prompts):,} prompts, {duplicates:,} duplicates, {faulty:,} faulty"
    )
    return prompts, text + (f" [{reasons(skipped)}]" if skipped else "")


def _to_prompt(row: dict) -> tuple[list[dict], str | None]:
    """(the messages to answer, what is wrong with them or None)."""
    messages: Any = row.get("conversations")
    if "conversations" not in row:
        if "prompt" not in row:
            return [], 'no "prompt" and no "conversations" key'
        messages = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list):
        return [], validate_messages(messages)[0].text
    while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    # With an answer after them they must be a conversation that could be trained on.
    faults = validate_messages([*messages, {"role": "assistant", "content": "?"}])
    if error := next((fault.text for fault in faults if fault.level == "error"), None):
        return [], error
    if "user" not in [message["role"] for message in messages]:
        return [], "no user message: nothing to answer"
    if messages[-1]["role"] == "system":
        return [], f"message {len(messages)}: the last one is not the user's or a tool's"
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        return [], f"message {len(messages)}: content is blank"
    return messages, None
