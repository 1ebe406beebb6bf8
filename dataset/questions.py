"""Questions with known answers, and when an answer counts as right: of the scoreboard, and of reinforcement learning.

One JSON object a line: {"skill": "sorting", "conversations": [... the last one the user's or a tool's], and one of
"answers": ["3, 7, 9"]             one of these, as a whole
"must_contain": ["cat", "lamp"]    all of these, anywhere
"must_contain_one": ["Thu", "周四"]    at least one of these
"gt": ["42", "cat"]                all of these, numbers as numbers and not as parts of others
"declines": true                   that it does not know, or cannot do it
"call": {"name": "calculator", "arguments": {"expression": "3 * 7"}}    this tool call and no other
"no_call": true                    any words, and no tool call
"exact": true makes upper and lower case of answers matter. The tools stand in the system message, as when training.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dataset.checks import validate_messages
from dataset.jsonl import DataError, parse_line, read_jsonl, read_lines
from dataset.mapping import as_ours

DECLINES = ("don't know", "do not know", "can't", "cannot", "不知道", "不会", "不懂")  # one of these is in each refusal
KINDS = ("answers", "must_contain", "must_contain_one", "gt", "declines", "call", "no_call")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


class Answer(Protocol):
    """What is_right() looks at: an AssistantMessage."""

    content: str
    tool_calls: list[dict]
    faults: list[str]


@dataclass
class Question:
    line: int
    skill: str
    messages: list[dict]
    kind: str  # of KINDS
    right: Any  # what stands under it
    exact: bool

    def is_right(self, answer: Answer) -> bool:
        """Outer blanks, one final full stop and, unless `exact`, upper and lower case make no difference.
        A call may have words around it; where words are asked for, a call is wrong."""
        if answer.faults:
            return False
        if self.kind == "call":
            return len(answer.tool_calls) == 1 and _same_json(answer.tool_calls[0], self.right)
        said = self._fold(answer.content)
        if answer.tool_calls or not said.strip():
            return False
        if self.kind == "no_call":
            return True
        if self.kind == "declines":
            return declines(said)
        if self.kind == "answers":
            return _bare(said) in [_bare(self._fold(right)) for right in self.right]
        if self.kind == "gt":
            return all(_says(said, self._fold(part)) for part in self.right)
        found = [self._fold(part) in said for part in self.right]
        return all(found) if self.kind == "must_contain" else any(found)

    def _fold(self, text: str) -> str:
        return text if self.exact else text.lower()

    @property
    def knowable(self) -> bool:
        return self.kind not in ("declines", "no_call")

    @property
    def expected(self) -> str:
        if self.kind in ("declines", "no_call"):
            return {"declines": "that it does not know", "no_call": "no call"}[self.kind]
        if self.kind == "call":
            return json.dumps(self.right, ensure_ascii=False)
        return {"answers": self.right[0], "must_contain_one": " or ".join(self.right)}.get(
            self.kind, " + ".join(self.right)
        )


def declines(text: str) -> bool:
    """Whether it says that it does not know or cannot."""
    text = text.lower().replace("’", "'")
    return any(words in text for words in DECLINES)


def _same_json(a: Any, b: Any) -> bool:
    """3 is 3.0, but true is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_json, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _says(text: str, part: str) -> bool:
    """Whether the text has this part; a number as one of its numbers: 42 is 42.0 and stands not in 142."""
    if NUMBER.fullmatch(part.strip()):
        return _number(part.strip()) in map(_number, NUMBER.findall(text))
    return part in text


def _number(digits: str) -> float:
    return float(digits.replace(",", ""))


def _bare(text: str) -> str:
    text = text.strip()
    return text[:-1].rstrip() if text.endswith((".", "。")) else text


def read_heldout(path: str | Path) -> list[Question]:
    """All questions; DataError names the first line that is not one."""
    questions = []
    for number, row, fault in read_jsonl(path):
        try:
            row, _ = as_ours("sft", row or {})
            error = fault.text if fault else _error(row)
        except ValueError as doubt:
            error = str(doubt)
        if error:
            raise DataError(f"{path}, line {number}: {error}")
        kind = next(kind for kind in KINDS if row.get(kind))
        questions.append(Question(number, row["skill"], row["conversations"], kind, row[kind], row.get("exact", False)))
    if not questions:
        raise DataError(f"{path}: the file is empty; `python -m dataset.starter` writes the starter corpus")
    return questions


class Questions(list[Question]):
    """Questions to train on. sha256: of the file they come from."""

    sha256: str


def read_questions(path: str | Path, quiet: bool = False) -> Questions:
    """The questions of a file that can be checked; the others are counted in one line. An assistant's turn at the end,
    which MiniMind's files have as a placeholder, is left out; "gt" may hold numbers. DataError if none is left."""
    questions, left_out = Questions(), []
    digest = hashlib.sha256()
    for number, line in read_lines(path):
        digest.update(line)
        row, fault = parse_line(number, line)
        try:
            row = _without_placeholder(as_ours("sft", row or {})[0])
            error = fault.text if fault else _error(row)
        except ValueError as doubt:
            error = str(doubt)
        if error:
            left_out.append(f"line {number}: {error}")
            continue
        kind = next(kind for kind in KINDS if row.get(kind))
        questions.append(Question(number, row["skill"], row["conversations"], kind, row[kind], row.get("exact", False)))
    if not questions:
        first = left_out[0] if left_out else "the file is empty"
        raise DataError(f"{path}: no row has an answer to check against ({first}); see dataset/questions.py")
    if left_out and not quiet:
        print(
            f"{path}: {len(left_out)} of {len(questions) + len(left_out)} rows left out, their answers cannot be "
            f"checked ({left_out[0]})",
            file=sys.stderr,
        )
    questions.sha256 = digest.hexdigest()
    return questions


def _without_placeholder(row: dict) -> dict:
    messages, row = row.get("conversations"), {"skill": "question", **row}
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        row["conversations"] = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    if isinstance(row.get("gt"), list):
        row["gt"] = [str(part) if isinstance(part, int | float) else part for part in row["gt"]]
    return row


def _error(row: dict) -> str | None:
    """What keeps the row from being a question."""
    if not isinstance(row.get("skill"), str) or not row["skill"]:
        return 'no "skill" (a string)'
    messages = row.get("conversations")
    if not isinstance(messages, list) or not messages:
        return 'no "conversations" (a list of messages)'
    call = row.get("call")
    if call is not None and not _is_call(call):
        return 'call: must be {"name": a string, "arguments": an object}'
    # With an answer after them they must be a conversation that could be trained on.
    answer = {"role": "assistant", "content": "?", "tool_calls": [call] if call is not None else None}
    errors = [fault.text for fault in validate_messages([*messages, answer]) if fault.level == "error"]
    if errors:
        own = f"message {len(messages) + 1}: tool_calls: "
        return errors[0].replace(own, "call: ") if own in errors[0] else f"conversations: {errors[0]}"
    if messages[-1]["role"] not in ("user", "tool"):
        return "conversations: the last message must be the user's question or a tool's result"
    if not isinstance(row.get("exact", False), bool):
        return "exact: must be true or false"
    given = [kind for kind in KINDS if row.get(kind)]
    if len(given) != 1:
        return 'needs one of "answers", "must_contain", "must_contain_one", "gt" (lists of strings), "call", ' + (
            '"declines" and "no_call" (true)'
        )
    right = row[given[0]]
    if given[0] in ("declines", "no_call"):
        return None if right is True else f"{given[0]}: must be true"
    if not call and (not isinstance(right, list) or not all(isinstance(text, str) and text.strip() for text in right)):
        return f"{given[0]}: must be a list of strings, none of them blank"
    return None


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict)
