"""Questions with given choices, and how they are put: by letters, or as a text whose likelihood is measured.

{"subject": "animals", "question": "...", "choices": ["...", "..."], "answer": 1}      a JSONL file of them, a line each

"answer" is the number of the right choice, counted from 0, or its letter.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from dataset.jsonl import DataError, read_jsonl

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHINESE = re.compile("[\u3400-\u9fff]")


@dataclass(frozen=True)
class ChoiceQuestion:
    """`plain`: the choices go on from the question as one text; nobody asks for an answer."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    plain: bool = False

    @property
    def is_chinese(self) -> bool:
        return bool(CHINESE.search(self.question + self.choices[0]))

    @property
    def cue(self) -> str:
        """What asks for the answer, at the end of a prompt."""
        return "" if self.plain else "答案：" if self.is_chinese else "Answer:"

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.choices)]

    @property
    def by_letters(self) -> str:
        """The prompt that is answered with a letter, as lm-evaluation-harness writes it for CMMLU, C-Eval and MMLU."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(self.letters, self.choices, strict=True)]
        return "\n".join([self.question.strip(), *lines, self.cue or "Answer:"])

    @property
    def as_text(self) -> str:
        """The prompt that is answered with the text of a choice."""
        if self.plain:
            return self.question
        return f"{'问题：' if self.is_chinese else 'Question: '}{self.question.strip()}\n{self.cue}"


def read_choices(path: str | Path) -> list[ChoiceQuestion]:
    """All questions of a JSONL file; DataError names the first line that is not one."""
    questions = []
    for number, row, fault in read_jsonl(path):
        try:
            if fault:
                raise ValueError(fault.text)
            questions.append(question_of(row["question"], row["choices"], row["answer"], row.get("subject", "")))
        except KeyError as error:
            raise DataError(f"{path}, line {number}: no {error.args[0]!r}; a question has {KEYS}") from None
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise DataError(f"{path}: there is no question in it")
    return questions


KEYS = '"question", "choices" (a list) and "answer" (a number from 0, or a letter)'


def question_of(question, choices, answer, subject="", plain: bool = False) -> ChoiceQuestion:
    """A checked question; ValueError says what keeps it from being one."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError("question: must be a text that is not blank")
    if not isinstance(subject, str):
        raise ValueError("subject: must be a text")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices: must be a list of 2 to {len(LETTERS)} texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("choices: must all be texts that are not blank")
    if isinstance(answer, str) and len(answer.strip()) == 1:
        answer = LETTERS.find(answer.strip().upper())
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"answer: must be a number from 0 to {len(choices) - 1}, or a letter")
    return ChoiceQuestion(question, tuple(choice.strip() for choice in choices), answer, subject, plain)
