"""Which benchmarks there are, and how their files are read as they are published.

task = read_task("cmmlu", "data/"); task.questions, task.shots     # data/cmmlu/test/*.csv, data/cmmlu/dev/*.csv
"""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dataset.choices import ChoiceQuestion, question_of, read_choices
from dataset.jsonl import DataError, read_jsonl
from evaluation.scoreboard import Question, read_heldout

QUESTIONS = Path(__file__).resolve().parent / "questions"  # those that come with the repository
ZH_DESCRIPTION = "以下是单项选择题，请直接给出正确答案的选项。"
EN_DESCRIPTION = "The following are multiple choice questions (with answers)."


class MinimalPair(NamedTuple):
    """Two sentences, of which one is right."""

    subject: str
    good: str
    bad: str


class Problem(NamedTuple):
    """A question whose worked answer ends in "#### NUMBER"."""

    question: str
    answer: str
    subject: str = ""


@dataclass
class Task:
    """The questions of one benchmark, all of one kind.

    shots: worked examples by subject, "" for all. main: the form whose accuracy stands for the task."""

    name: str
    kind: str  # "choice", "pairs", "problems" or "heldout"
    questions: list[ChoiceQuestion] | list[MinimalPair] | list[Problem] | list[Question]
    main: str = "letters"
    description: str = ""
    shots: dict[str, list] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """What would have to stand in the training data: each question with its right answer."""
        if self.kind == "choice":
            return [f"{q.question}\n{q.choices[q.answer]}" for q in self.questions]
        if self.kind == "pairs":
            return [pair.good for pair in self.questions]
        if self.kind == "problems":
            return [f"{problem.question}\n{problem.answer}" for problem in self.questions]
        return [question.messages[-1]["content"] for question in self.questions]


# ------------------------------------------------------------------------------------------------ one table a subject


def _subject_tables(name: str, folder: Path, split: str, description: str) -> Task:
    """CMMLU, C-Eval, MMLU: split/SUBJECT.csv, and dev/SUBJECT.csv with the worked examples."""
    tables = sorted((folder / split).glob("*.csv"))
    if not tables:
        raise DataError(f"{folder / split}: no .csv file; {name} is published as {split}/SUBJECT.csv: give its folder")
    task = Task(name, "choice", [], description=description)
    for table in tables:
        subject = re.sub(rf"_{split}$", "", table.stem)
        task.questions += _read_table(table, subject)
        examples = [folder / "dev" / f"{subject}{end}.csv" for end in ("", "_dev")]
        task.shots[subject] = [q for path in examples if path.exists() for q in _read_table(path, subject)]
    return task


def _read_table(path: Path, subject: str) -> list[ChoiceQuestion]:
    """A CSV with a header line that names question, A, B, C, D, answer; or without one, in this order."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; convert it, such as iconv -f GB18030 -t UTF-8 FILE > NEW.csv") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    wanted = ["question", "a", "b", "c", "d", "answer"]
    names = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    has_header = "question" in names or "answer" in names
    if has_header and (absent := [name for name in wanted if name not in names]):
        raise DataError(f"{path}, line 1: no column {', '.join(absent)}; the columns are {', '.join(names)}")
    places = [names.index(name) for name in wanted] if has_header else range(6)
    questions = []
    for line, row in rows[1:] if has_header else rows:
        if len(row) <= max(places):
            raise DataError(f"{path}, line {line}: {len(row)} columns, not {max(places) + 1}: is a quote missing?")
        question, *choices, answer = (row[i] for i in places)
        try:
            questions.append(question_of(question, [choice or "-" for choice in choices], answer, subject))
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
    return questions


# ------------------------------------------------------------------------------------------------ JSONL


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    for number, row, fault in read_jsonl(path):
        if fault:
            raise DataError(f"{path}, line {number}: {fault.text}")
        yield number, row


def _first(folder: Path, name: str, *patterns: str) -> Path:
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise DataError(f"{folder}: no {' or '.join(patterns)}, the file of {name}; give the folder that it lies in")


def _each(path: Path, make: Callable[[dict, int], object]) -> list:
    """make(row, number from 0) of every row; a key that is missing is named with its line."""
    made = []
    for number, row in _rows(path):
        try:
            made.append(make(row, len(made)))
        except KeyError as error:
            raise DataError(f"{path}, line {number}: no {error.args[0]!r}") from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return made


def _arc(name: str, folder: Path) -> Task:
    """AI2's {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}, or the hub's, with lists apart."""

    def make(row: dict, _: int) -> ChoiceQuestion:
        inner = row["question"]
        if isinstance(inner, dict):
            stem, texts, labels = inner["stem"], *zip(*((c["text"], c["label"]) for c in inner["choices"]), strict=True)
        else:
            stem, texts, labels = inner, row["choices"]["text"], row["choices"]["label"]
        return question_of(stem, list(texts), list(labels).index(row["answerKey"]))

    path = _first(folder, name, "ARC-Easy-Test.jsonl", "*[Ee]asy*[Tt]est*.jsonl", "test.jsonl", "*.jsonl")
    return Task(name, "choice", _each(path, make), main="cloze")


def _hellaswag(name: str, folder: Path) -> Task:
    """The text without WikiHow's brackets, as lm-evaluation-harness cleans it."""

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    def make(row: dict, _: int) -> ChoiceQuestion:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return question_of(clean(context), [clean(text) for text in row["endings"]], int(row["label"]), plain=True)

    path = _first(folder, name, "hellaswag_val.jsonl", "*val*.jsonl", "*.jsonl")
    return Task(name, "choice", _each(path, make), main="cloze")


def _piqa(name: str, folder: Path) -> Task:
    path = _first(folder, name, "valid.jsonl", "*val*.jsonl", "*.jsonl")
    beside = path.with_name(f"{path.stem}-labels.lst")
    labels = beside.read_text(encoding="utf-8").split() if beside.exists() else None

    def make(row: dict, n: int) -> ChoiceQuestion:
        label = row["label"] if labels is None else labels[n]
        return question_of(row["goal"], [row["sol1"], row["sol2"]], int(label))

    return Task(name, "choice", _each(path, make), main="cloze")


def _pairs(name: str, folder: Path) -> Task:
    """BLiMP, ZhoBLiMP: a JSONL file for each paradigm."""
    files = sorted(folder.rglob("*.jsonl"))
    if not files:
        raise DataError(f"{folder}: no .jsonl file of sentence pairs, as {name} is published; give its folder")
    task = Task(name, "pairs", [], main="pairs")
    for path in files:
        task.questions += _each(
            path, lambda row, _, path=path: MinimalPair(path.stem, row["sentence_good"], row["sentence_bad"])
        )
    return task


def _gsm8k(name: str, folder: Path) -> Task:
    path = _first(folder, name, "test.jsonl", "gsm8k*.jsonl", "*.jsonl")
    task = Task(name, "problems", _each(path, lambda row, _: Problem(row["question"], row["answer"])), main="exact")
    examples = path.with_name("train.jsonl")
    if examples.exists() and examples != path:
        task.shots[""] = _each(examples, lambda row, _: Problem(row["question"], row["answer"]))
    return task


PUBLISHED: dict[str, Callable[[str, Path], Task]] = {
    "cmmlu": lambda name, folder: _subject_tables(name, folder, "test", ZH_DESCRIPTION),
    "ceval": lambda name, folder: _subject_tables(name, folder, "val", ZH_DESCRIPTION),
    "mmlu": lambda name, folder: _subject_tables(name, folder, "test", EN_DESCRIPTION),
    "arc_easy": _arc,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "gsm8k": _gsm8k,
    "blimp": _pairs,
    "zhoblimp": _pairs,
}
OURS = {path.stem: path for path in sorted(QUESTIONS.glob("*.jsonl"))}


def read_task(name: str, data: str | Path | None) -> Task:
    """A benchmark by its name, from the folder `data`/NAME, or `data` itself if that is its folder; one of those that
    come with the repository; or a JSONL file of questions by its path. DataError says what is missing."""
    if name in OURS:
        return Task(name, "choice", read_choices(OURS[name]))
    if name in PUBLISHED:
        if data is None:
            raise DataError(f"{name}: its files are not part of the repository; give their folder with --data")
        folder = Path(data) / name
        folder = folder if folder.is_dir() else Path(data)
        if not folder.is_dir():
            raise DataError(f"--data {data}: no such folder")
        task = PUBLISHED[name](name, folder)
        if not task.questions:
            raise DataError(f"{folder}: there is no question of {name} in it")
        return task
    if name.endswith((".jsonl", ".json", ".gz")) or Path(name).exists():
        first = next((row for _, row, fault in read_jsonl(name) if not fault), {})
        if "conversations" in first:
            return Task(Path(name).stem, "heldout", read_heldout(name), main="exact")
        return Task(Path(name).stem, "choice", read_choices(name))
    known = ", ".join([*OURS, *PUBLISHED])
    raise DataError(f"--tasks {name}: there is no such task; there are {known}, or the path of a JSONL file")
