"""Multiple choice in three forms side by side, and minimal pairs: what is scored, and what a row of the table says.

    letters       the options stand in the prompt, the answer is a letter
    cloze         the options do not: which text is the likeliest answer, by log-likelihood per byte
    cloze, PMI    the same, by how much likelier the question makes it (log p(text | question) - log p(text))

Bits per byte of the right answer, in the cloze prompt, need no other option to be compared with: they move long before
an accuracy does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from dataset.choices import ChoiceQuestion
from evaluation.asking import Examinee, Prompt
from evaluation.statistics import Interval, ratio, share_of_best, wilson
from evaluation.tasks import Task
from model.inference.likelihood import Item

FORMS = ("letters", "cloze", "pmi")
CLOZE_LABEL = {"letters": "letters", "cloze": "cloze, bytes", "pmi": "cloze, PMI", "pairs": "pairs"}


@dataclass
class Row:
    """One line of the table: one form of one task. `right` holds 1 or 0 for each question, or a part for a tie."""

    form: str
    right: list[float]
    chance: float
    subjects: list[str]
    chosen: list[int] = field(default_factory=list)  # which place each answer has

    @property
    def n(self) -> int:
        return len(self.right)

    @property
    def accuracy(self) -> float:
        return sum(self.right) / self.n

    @property
    def interval(self) -> Interval:
        return wilson(sum(self.right), self.n)

    @property
    def is_chance(self) -> bool:
        return self.interval[0] <= self.chance <= self.interval[1]

    @property
    def macro(self) -> float:
        """Mean over the subjects, each counted the same."""
        by_subject: dict[str, list[float]] = {}
        for subject, right in zip(self.subjects, self.right, strict=True):
            by_subject.setdefault(subject, []).append(right)
        return sum(sum(rights) / len(rights) for rights in by_subject.values()) / len(by_subject)

    @property
    def histogram(self) -> list[int]:
        return [self.chosen.count(place) for place in range(max(self.chosen) + 1)] if self.chosen else []


@dataclass
class Result:
    """What a task found out. bits, n_bytes: of the right answer of each question."""

    task: Task
    rows: list[Row]
    bits: list[float]
    n_bytes: list[int]
    answers: list[dict]  # of each question, for the JSON file
    shots: int = 0
    notes: list[str] = field(default_factory=list)
    overlap: list[bool] | None = None  # which questions stand in the training data
    overlap_checked: int = 0

    @property
    def main(self) -> Row:
        return next((row for row in self.rows if row.form == self.task.main), self.rows[0])

    @property
    def bits_per_byte(self) -> tuple[float, Interval]:
        return ratio(self.bits, self.n_bytes)


def worked_examples(task: Task, question: ChoiceQuestion, shots: int, form: str) -> list[tuple[str, str]]:
    examples = [q for q in task.shots.get(question.subject, []) if q != question][:shots]
    if form == "letters":
        return [(q.by_letters, q.letters[q.answer]) for q in examples]
    return [(q.as_text, q.choices[q.answer]) for q in examples]


def choice_item(examinee: Examinee, task: Task, question: ChoiceQuestion, form: str, shots: int) -> Item:
    """The question in one form; "nothing" is the cloze prompt without the question."""
    if form == "nothing":
        return examinee.item(Prompt(question.cue), list(question.choices))
    examples = worked_examples(task, question, shots, form)
    if form == "letters":
        return examinee.item(Prompt(question.by_letters, examples, task.description), list(question.letters))
    return examinee.item(Prompt(question.as_text, examples), list(question.choices))


def run_choice(
    examinee: Examinee, task: Task, shots: int = 0, forms: tuple[str, ...] = FORMS, show: Callable = lambda done: None
) -> Result:
    """All questions of a task in the forms asked for. show(done) counts items: see count_items()."""
    logprobs: dict[str, list[list[float]]] = {}
    done = 0
    for form in needed(forms):
        by_subject: dict[str, list[int]] = {}
        for i, question in enumerate(task.questions):  # worked examples are shared within a subject
            by_subject.setdefault(question.subject if shots and form != "nothing" else "", []).append(i)
        logprobs[form] = [[]] * len(task.questions)
        for numbers in by_subject.values():
            items = [choice_item(examinee, task, task.questions[i], form, shots) for i in numbers]
            for i, scores in zip(numbers, examinee.score(items, lambda n, done=done: show(done + n)), strict=True):
                logprobs[form][i] = [score.logprob for score in scores]
            done += len(numbers)
    return _choice_result(task, logprobs, forms, shots)


def needed(forms: tuple[str, ...]) -> list[str]:
    """What has to be computed for these forms; bits per byte come with the cloze."""
    asked = ["letters"] if "letters" in forms else []
    asked += ["cloze"] if {"cloze", "pmi"} & set(forms) else []
    return asked + (["nothing"] if "pmi" in forms else [])


def _choice_result(task: Task, logprobs: dict, forms: tuple[str, ...], shots: int) -> Result:
    questions = task.questions
    chance = sum(1 / len(q.choices) for q in questions) / len(questions)
    rows = [Row(form, [], chance, [q.subject for q in questions]) for form in FORMS if form in forms]
    result = Result(task, rows, [], [], [], shots)
    for i, question in enumerate(questions):
        n_bytes = [len(choice.encode()) for choice in question.choices]
        answer: dict = {"right": question.answer}
        values = {}
        if "letters" in logprobs:
            values["letters"] = logprobs["letters"][i]
        if "cloze" in logprobs:
            values["cloze"] = [lp / size for lp, size in zip(logprobs["cloze"][i], n_bytes, strict=True)]
            result.bits.append(-logprobs["cloze"][i][question.answer] / math.log(2))
            result.n_bytes.append(n_bytes[question.answer])
            answer |= {"bits": round(result.bits[-1], 4), "bytes": result.n_bytes[-1]}
        if "nothing" in logprobs:
            pairs = zip(logprobs["cloze"][i], logprobs["nothing"][i], strict=True)
            values["pmi"] = [given - alone for given, alone in pairs]
        for row in rows:
            scores = values[row.form]
            row.right.append(share_of_best(scores, question.answer))
            row.chosen.append(scores.index(max(scores)))
            answer[row.form] = {"chosen": row.chosen[-1], "scores": [round(score, 4) for score in scores]}
        result.answers.append(answer)
    return result


def run_pairs(examinee: Examinee, task: Task, show: Callable = lambda done: None) -> Result:
    """Minimal pairs: whether the right sentence is the likelier one as a whole; equal likelihoods count a half."""
    items = [examinee.sentences([pair.good, pair.bad]) for pair in task.questions]
    row = Row("pairs", [], 0.5, [pair.subject for pair in task.questions])
    result = Result(task, [row], [], [], [])
    for pair, (good, bad) in zip(task.questions, examinee.score(items, show), strict=True):
        row.right.append(share_of_best([good.logprob, bad.logprob], 0))
        result.bits.append(-good.logprob / math.log(2))
        result.n_bytes.append(len(pair.good.encode()))
        result.answers.append({"right": row.right[-1], "scores": [round(good.logprob, 4), round(bad.logprob, 4)]})
    return result
