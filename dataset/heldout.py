"""Held-out questions with known answers, and when an answer counts as right. eval_model.py --score uses it.

One JSON object a line: {"skill": "sorting", "conversations": [... the last one the user's], "answers": ["3, 7, 9"]}, or
"must_contain": ["cat", "lamp"] in place of "answers". "exact": true makes upper and lower case matter.
"""

from dataclasses import dataclass
from pathlib import Path

from dataset.chat import ROLES
from dataset.jsonl import DataError, json_type, read_jsonl


@dataclass
class Question:
    line: int
    skill: str
    messages: list[dict]
    answers: list[str]  # one of these, as a whole
    must_contain: list[str]  # or all of these, anywhere
    exact: bool

    def is_right(self, answer: str) -> bool:
        """Outer blanks, one final full stop and, unless `exact`, upper and lower case make no difference."""
        if self.must_contain:
            return all(self._fold(part) in self._fold(answer) for part in self.must_contain)
        return _bare(self._fold(answer)) in [_bare(self._fold(right)) for right in self.answers]

    def _fold(self, text: str) -> str:
        return text if self.exact else text.lower()

    @property
    def expected(self) -> str:
        return " + ".join(self.must_contain) if self.must_contain else self.answers[0]


def scoreboard(questions: list[Question], answers: list[str], show_wrong: int = 0) -> dict:
    """Prints the table by skill and the first wrong answers; returns {"n", "correct", "percent"} over all questions,
    and the same by skill under "skills"."""

    def count(right: list[bool]) -> dict:
        return {"n": len(right), "correct": sum(right), "percent": round(100 * sum(right) / len(right), 2)}

    right = [question.is_right(answer) for question, answer in zip(questions, answers, strict=True)]
    by_skill: dict[str, list[bool]] = {}
    for question, ok in zip(questions, right, strict=True):
        by_skill.setdefault(question.skill, []).append(ok)
    totals = count(right) | {"skills": {skill: count(oks) for skill, oks in by_skill.items()}}

    print(f"{'skill':<20}{'n':>6}{'correct':>9}{'percent':>9}")
    for skill, c in [*totals["skills"].items(), ("overall", totals)]:
        print(f"{skill:<20}{c['n']:>6}{c['correct']:>9}{c['percent']:>9.1f}")
    wrong = [i for i, ok in enumerate(right) if not ok]
    for i in wrong[:show_wrong]:
        print(f"\nline {questions[i].line}, {questions[i].skill}: {questions[i].messages[-1]['content']}")
        print(f"  expected: {questions[i].expected}\n  answered: {answers[i]}")
    return totals


def _bare(text: str) -> str:
    text = text.strip()
    return text[:-1].rstrip() if text.endswith((".", "。")) else text


def read_heldout(path: str | Path) -> list[Question]:
    """All questions; DataError names the first line that is not one."""
    questions = []
    for number, row, fault in read_jsonl(path):
        error = fault.text if fault else _error(row)
        if error:
            raise DataError(f"{path}, line {number}: {error}")
        lists = [row.get("answers") or [], row.get("must_contain") or []]
        questions.append(Question(number, row["skill"], row["conversations"], *lists, row.get("exact", False)))
    if not questions:
        raise DataError(f"{path}: the file is empty; `python dataset/starter.py` writes the starter corpus")
    return questions


def _error(row: dict) -> str | None:
    """What keeps the row from being a question."""
    if not isinstance(row.get("skill"), str) or not row["skill"]:
        return 'no "skill" (a string)'
    messages = row.get("conversations")
    if not isinstance(messages, list) or not messages:
        return 'no "conversations" (a list of messages)'
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"conversations: message {n} is not an object with a role of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"conversations: message {n}: content is {json_type(message.get('content'))}, not a string"
    if messages[-1]["role"] != "user":
        return "conversations: the last message must be the user's question"
    if not isinstance(row.get("exact", False), bool):
        return "exact: must be true or false"
    given = [key for key in ("answers", "must_contain") if row.get(key)]
    if len(given) != 1:
        return 'needs either "answers" or "must_contain" (a list of strings)'
    right = row[given[0]]
    if not isinstance(right, list) or not all(isinstance(text, str) and text.strip() for text in right):
        return f"{given[0]}: must be a list of strings, none of them blank"
    return None
