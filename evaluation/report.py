"""What an evaluation prints and writes: the table, JSON with every answer, Markdown; and two models compared.

print(as_text(results)); as_json(results, facts); compare(first, second)
"""

import json
import sys
import time
from pathlib import Path

from dataset.choices import LETTERS
from dataset.jsonl import DataError
from evaluation.multiple_choice import CLOZE_LABEL, Result, Row
from evaluation.statistics import paired_difference, wilson

COLUMNS = ("task", "form", "n", "chance", "accuracy", "95 % interval", "verdict", "macro", "chosen", "shots")
COLUMNS += ("bits/byte", "95 % interval", "in training data")


def table(results: list[Result]) -> list[list[str]]:
    """The cells of the table, a list for each row, in the order of COLUMNS. Percent; bits per byte stand in the first
    row of a task."""
    cells = []
    for result in results:
        for row in result.rows:
            first = row is result.rows[0]
            cells.append([result.task.name, CLOZE_LABEL.get(row.form, row.form), *_accuracy(row), str(result.shots)])
            cells[-1] += [*_bits(result), _overlap(result)] if first else ["", "", ""]
    return cells


def _accuracy(row: Row) -> list[str]:
    low, high = row.interval
    if not row.chance:
        verdict = ""
    elif row.is_chance:
        verdict = "≈ chance"
    else:
        verdict = "above" if low > row.chance else "below"
    macro = percent(row.macro) if len(set(row.subjects)) > 1 else ""
    chosen = " ".join(f"{LETTERS[place]}{count}" for place, count in enumerate(row.histogram))
    chance = percent(row.chance) if row.chance else "–"
    return [str(row.n), chance, percent(row.accuracy), f"{percent(low)}–{percent(high)}", verdict, macro, chosen]


def _bits(result: Result) -> list[str]:
    if not result.bits:
        return ["", ""]
    value, (low, high) = result.bits_per_byte
    return [f"{value:.3f}", f"{low:.3f}–{high:.3f}"]


def _overlap(result: Result) -> str:
    if result.overlap is None:
        return "not looked for"
    found = sum(result.overlap)
    return f"{found} of {result.overlap_checked}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _columns(cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows without the columns that are empty in all rows."""
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    return [COLUMNS[i] for i in used], [[row[i] for i in used] for row in cells]


def as_text(results: list[Result]) -> str:
    header, rows = _columns(table(results))
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in [header, *rows])
    ]
    return "\n".join([*lines, *notes(results)])


def as_markdown(results: list[Result], title: str, facts: dict) -> str:
    header, rows = _columns(table(results))
    marks = ["---" if i < 2 else "---:" for i in range(len(header))]
    lines = ["| " + " | ".join(row) + " |" for row in [header, marks, *rows]]
    told = [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join([f"## {title}", "", *lines, "", *notes(results), "; ".join(told), ""])


def notes(results: list[Result]) -> list[str]:
    lines = [f"note: {result.task.name}: {note}" for result in results for note in result.notes]
    for result in results:
        if result.overlap and 0 < sum(result.overlap) < len(result.overlap):
            row, seen = result.main, result.overlap
            clean = [right for right, known in zip(row.right, seen, strict=True) if not known]
            low, high = wilson(sum(clean), len(clean))
            figures = f"{percent(sum(clean) / len(clean))} ({percent(low)}–{percent(high)}), n = {len(clean)}"
            which = f"{result.task.name}, {CLOZE_LABEL.get(row.form, row.form)}"
            lines.append(f"note: {which}: without the questions that stand in the training data {figures}")
    return lines


# ------------------------------------------------------------------------------------------------ JSON


def as_json(results: list[Result], facts: dict) -> dict:
    """{"tasks": {name: figures}, "answers": {name: one entry for each question}, and the facts}."""
    return {
        **facts,
        "tasks": {result.task.name: _figures(result) for result in results},
        "answers": {result.task.name: result.answers for result in results},
    }


def _figures(result: Result) -> dict:
    main = result.main
    figures = {"n": main.n, "form": main.form, "accuracy": main.accuracy, "interval": list(main.interval)}
    figures |= {"chance": main.chance, "is_chance": main.is_chance, "macro": main.macro, "shots": result.shots}
    if result.bits:
        value, interval = result.bits_per_byte
        figures |= {"bits_per_byte": value, "bits_per_byte_interval": list(interval)}
    if result.overlap is not None:
        figures |= {"in_training_data": sum(result.overlap), "checked": result.overlap_checked}
    figures["forms"] = {
        row.form: {
            "accuracy": row.accuracy,
            "interval": list(row.interval),
            "macro": row.macro,
            "chosen": row.histogram,
        }
        for row in result.rows
    }
    return figures | {"notes": result.notes}


def compare(first: dict, second: dict) -> list[str]:
    """Lines that say by how much the second of two as_json() differs from the first, over the questions they share.

    DataError if they have no task in common, or another number of questions."""
    shared = [name for name in second["answers"] if name in first["answers"]]
    if not shared:
        raise DataError("the two evaluations have no task in common: evaluate both with the same --tasks")
    lines = []
    for name in shared:
        before, after = first["answers"][name], second["answers"][name]
        if len(before) != len(after):
            raise DataError(f"{name}: {len(before)} against {len(after)} questions: give both the same --limit")
        for what, unit, values in _comparable(before, after):
            mean, (low, high) = paired_difference(*values)
            scale = 100 if unit == "points" else 1
            sure = "" if low > 0 or high < 0 else ", no difference to be seen"
            figures = f"{scale * mean:+.3f} {unit} ({scale * low:+.3f} to {scale * high:+.3f})"
            lines.append(f"{name}, {what}: {figures}{sure}")
    return lines


def _comparable(before: list[dict], after: list[dict]):
    """(what, unit, the values of both) of all that two lists of answers hold."""
    for form in CLOZE_LABEL:
        if form in before[0] and form in after[0]:
            right = [[float(a[form]["chosen"] == a["right"]) for a in answers] for answers in (before, after)]
            yield CLOZE_LABEL[form], "points", right
    if "scores" in before[0] and "scores" in after[0]:
        yield "pairs", "points", [[a["right"] for a in answers] for answers in (before, after)]
    if "of" in before[0] and "of" in after[0]:
        yield "exact match", "points", [[a["right"] / a["of"] for a in answers] for answers in (before, after)]
    if "bits" in before[0] and "bits" in after[0]:
        rates = [[a["bits"] / a["bytes"] for a in answers] for answers in (before, after)]
        yield "bits per byte, mean over questions", "bits", rates


def read_result(path: str | Path) -> dict:
    """What as_json() was written to. DataError if it is something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content["tasks"], dict) and isinstance(content["answers"], dict):
            return content
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{path}: not a file that scripts/evaluate.py wrote")


# ------------------------------------------------------------------------------------------------ progress


class Bar:
    """A bar on a terminal, a line every ten seconds in a log."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.begin, self.said = what, total, time.perf_counter(), time.perf_counter()
        self.tty = sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if not self.tty and now - self.said < 10:
            return
        self.said = now
        left = (now - self.begin) / max(done, 1) * (self.total - done)
        share = done / max(self.total, 1)
        line = f"{self.what} [{'#' * int(20 * share):<20}] {done}/{self.total}, {left:.0f} s left"
        print(f"\r\033[K{line}" if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
