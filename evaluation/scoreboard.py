"""Held-out questions with known answers, and when an answer counts as right. eval_model.py --score uses it.

One JSON object a line: {"skill": "sorting", "conversations": [... the last one the user's or a tool's], and one of
"answers": ["3, 7, 9"]             one of these, as a whole
"must_contain": ["cat", "lamp"]    all of these, anywhere
"must_contain_one": ["Thu", "周四"]    at least one of these
"declines": true                   that it does not know, or cannot do it
"call": {"name": "calculator", "arguments": {"expression": "3 * 7"}}    this tool call and no other
"no_call": true                    any words, and no tool call
"exact": true makes upper and lower case of answers matter. The tools stand in the system message, as when training.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.checks import validate_messages
from dataset.jsonl import DataError, read_jsonl
from dataset.mapping import as_ours
from model.inference.answers import AssistantMessage
from model.inference.chatbot import Chatbot

DECLINES = ("don't know", "do not know", "can't", "cannot", "不知道", "不会", "不懂")  # one of these is in each refusal
KINDS = ("answers", "must_contain", "must_contain_one", "declines", "call", "no_call")


@dataclass
class Question:
    line: int
    skill: str
    messages: list[dict]
    kind: str  # of KINDS
    right: Any  # what stands under it
    exact: bool

    def is_right(self, answer: AssistantMessage) -> bool:
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
        return {"answers": self.right[0], "must_contain": " + ".join(self.right)}.get(
            self.kind, " or ".join(self.right)
        )


def declines(text: str) -> bool:
    """Whether it says that it does not know or cannot."""
    text = text.lower().replace("’", "'")
    return any(words in text for words in DECLINES)


def answer_questions(
    bot: Chatbot, questions: list[Question], file: str | Path, show: Callable[[int], None] = lambda done: None
) -> list[AssistantMessage]:
    """The greedy answers to all questions, which `file` holds; show(done) is called after each. DataError for a
    question that leaves no room for an answer."""
    for question in questions:
        if bot.overflow(question.messages):
            text = f"the question leaves no room for an answer in a context of {bot.max_len}"
            raise DataError(f"{file}, line {question.line}: {text}; raise --max_seq_len")
    answers = [AssistantMessage()] * len(questions)
    for done, (i, message) in enumerate(bot.answer_all([question.messages for question in questions]), 1):
        answers[i] = message
        show(done)
    return answers


def count_right(questions: list[Question], answers: list[AssistantMessage]) -> dict:
    """{"n", "correct", "percent"} over all questions, the same by skill under "skills", and how often it declined
    what it could know: "false_declines" of "knowable"."""

    def count(right: list[bool]) -> dict:
        return {"n": len(right), "correct": sum(right), "percent": round(100 * sum(right) / len(right), 2)}

    right = [question.is_right(answer) for question, answer in zip(questions, answers, strict=True)]
    by_skill: dict[str, list[bool]] = {}
    for question, ok in zip(questions, right, strict=True):
        by_skill.setdefault(question.skill, []).append(ok)
    known = [declines(answer.content) for question, answer in zip(questions, answers, strict=True) if question.knowable]
    skills = {skill: count(oks) for skill, oks in by_skill.items()}
    return count(right) | {"skills": skills, "false_declines": sum(known), "knowable": len(known)}


def print_scoreboard(questions: list[Question], answers: list[AssistantMessage], show_wrong: int = 0) -> None:
    """The table by skill, and the first wrong answers."""
    totals = count_right(questions, answers)
    print(f"{'skill':<20}{'n':>6}{'correct':>9}{'percent':>9}")
    for skill, c in [*totals["skills"].items(), ("overall", totals)]:
        print(f"{skill:<20}{c['n']:>6}{c['correct']:>9}{c['percent']:>9.1f}")
    if totals["knowable"] < totals["n"]:
        print(f"declined, though it could know: {totals['false_declines']} of {totals['knowable']}")
    wrong = [i for i, question in enumerate(questions) if not question.is_right(answers[i])]
    for i in wrong[:show_wrong]:
        print(f"\nline {questions[i].line}, {questions[i].skill}: {questions[i].messages[-1]['content']}")
        print(f"  expected: {questions[i].expected}\n  answered: {answers[i].text}")


def _same_json(a: Any, b: Any) -> bool:
    """3 is 3.0, but true is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_json, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


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
        return (
            'needs one of "answers", "must_contain", "must_contain_one" (lists of strings), "call" (a tool call), '
            + ('"declines" and "no_call" (true)')
        )
    right = row[given[0]]
    if given[0] in ("declines", "no_call"):
        return None if right is True else f"{given[0]}: must be true"
    if not call and (not isinstance(right, list) or not all(isinstance(text, str) and text.strip() for text in right)):
        return f"{given[0]}: must be a list of strings, none of them blank"
    return None


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict)
