"""Lines of data files -> clean rows and the reasons of the others: what scripts/clean_data.py does with each chunk.

cleaner = Cleaner(settings); done = cleaner.clean([(1, b'{"text": ...}\n'), ...])
"""

import itertools
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dataset import dedup, filters, mapping
from dataset.checks import Fault, conversation_faults, preference_faults, text_fault
from dataset.cleaning import EVERYWHERE, PLAIN_TEXT
from dataset.jsonl import parse_line
from dataset.ngrams import units_of
from dataset.overlap import QuestionGrams
from dataset.repair import ROW_REPAIRS, TEXT_REPAIRS, repair_messages, repair_row, repair_text

LITERAL = "literal markers, kept as text"
FAULTS = {
    "row": "no row of this kind: what training would skip",
    "conversation": "turns in an order that makes no sense",
}
OVERLAP = {"overlap": "shares 13 words (Chinese: characters) with a question of --questions (Brown et al. 2020)"}
COPIES = {
    "exact": "the same as an earlier row",
    "normalised": "the same but for blanks, case and width",
    "near": f"Jaccard similarity of runs of 3 words (Chinese: 5 characters) of at least {dedup.NEAR}",
}
LANGUAGES = (*filters.LANGUAGES, "other")
CONTENTS = ("content", "reasoning_content")
DOUBTFUL = ("not answered by a tool message", "content is blank", ": role: ")


class Removed(NamedTuple):
    number: int
    rule: str
    why: str
    line: bytes


@dataclass
class Cleaned:
    """What came of some lines. The rows that stay are lines of JSON, one after the other in `data`."""

    data: bytes
    sizes: np.ndarray  # (R,) uint32, bytes of each row
    numbers: np.ndarray  # (R,) uint32, its line
    keys: dedup.Keys
    removed: list[Removed]
    repaired: Counter  # what was done to how many rows
    languages: np.ndarray  # (R,) uint8, places in LANGUAGES


@dataclass
class Plan:
    """What is to be done with rows; the same in all processes."""

    filters: filters.Settings
    repairs: Collection[str]
    off: Collection[str] = ()
    questions: Sequence[str] = ()
    check: bool = True  # False: rows of earlier output, of which nothing but the keys is wanted


class Cleaner:
    """A Plan at work."""

    def __init__(self, plan: Plan):
        self.plan, self.kind = plan, plan.filters.kind
        self.grams = QuestionGrams(plan.questions) if plan.questions else None

    def clean(self, lines: Sequence[tuple[int, bytes]]) -> Cleaned:
        """All that can be known of rows without the other ones."""
        removed, rows, repaired = [], [], Counter()
        for number, line in lines:
            row, names, fault = self._read(number, line)
            if fault:
                removed.append(Removed(number, *fault, line))
            else:
                repaired.update(names)
                rows.append((number, line, row))
        texts = [text_of(row, self.kind) for _, _, row in rows]
        units = units_of(texts)
        languages = filters.languages_of(texts, units)
        out = self._failures(rows, texts, units, languages) if self.plan.check else {}
        removed += [Removed(rows[n][0], *fault, rows[n][1]) for n, fault in out.items()]
        kept = [n for n in range(len(rows)) if n not in out]
        encoded = [dumps(rows[n][2]) for n in kept]
        data = [(row + "\n").encode("utf-8") for row in encoded]
        keys = dedup.row_keys(encoded, [texts[n] for n in kept], units_of([texts[n] for n in kept]) if out else units)
        return Cleaned(
            b"".join(data),
            np.array([len(row) for row in data], np.uint32),
            np.array([rows[n][0] for n in kept], np.uint32),
            keys,
            sorted(removed),
            repaired,
            np.array([LANGUAGES.index(languages[n]) for n in kept], np.uint8),
        )

    def _failures(self, rows: list, texts: list[str], units: Any, languages: list[str]) -> dict[int, tuple[str, str]]:
        messages = [0 if self.kind == "pretrain" else len(messages_of(row, self.kind)) for _, _, row in rows]
        out = {
            n: (rule, why) for n, rule, why in filters.failures(texts, units, languages, self.plan.filters, messages)
        }
        if self.grams and "overlap" not in self.plan.off:
            for n, question in self.grams.hits(texts):
                out.setdefault(n, ("overlap", f"question {question + 1}"))
        return out

    def _read(self, number: int, line: bytes) -> tuple[dict, list[str], tuple[str, str] | None]:
        """(the row mended, what was done to it, (rule, why) if it has to go)."""
        repairs, names = self.plan.repairs, []
        row, fault = parse_line(number, line)
        if fault and not fault.text.startswith("not an object"):
            return {}, names, ("row", fault.text)
        value = row if row is not None else json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        if "keys" in repairs:
            value, changed = repair_row(self.kind, value)
            names += ["keys"] * changed
        if not isinstance(value, dict):
            return {}, names, ("row", fault.text if fault else "not an object")
        try:
            row, form = mapping.as_ours(self.kind, value)
        except mapping.Doubt as doubt:
            return {}, names, ("row", str(doubt))
        names += [f"read as {form}"] if form else []
        row, done = self._mended(row)
        fault = _fault(row, self.kind, self.plan.off)
        return row, names + done, fault

    def _mended(self, row: dict) -> tuple[dict, list[str]]:
        if self.kind == "pretrain":
            if not isinstance(text := row.get("text"), str):
                return row, []
            text, done = repair_text(text, self.plan.repairs)
            return {**row, "text": text}, done + [LITERAL] * has_markers(text)
        names: set[str] = set()
        row = dict(row)
        for part in parts_of(self.kind):
            if isinstance(row.get(part), list) and all(isinstance(message, dict) for message in row[part]):
                row[part], done = repair_messages(self._mended_texts(row[part], names), self.plan.repairs)
                names.update(done)
        return {key: row[key] for key in row if key not in ("messages", "tools", *mapping.SYSTEMS)}, sorted(names)

    def _mended_texts(self, messages: list[dict], names: set[str]) -> list[dict]:
        result = []
        for message in messages:
            message = dict(message)
            for key in CONTENTS:
                if isinstance(text := message.get(key), str):
                    message[key], done = repair_text(text, self.plan.repairs, chat=True)
                    names.update(done + [LITERAL] * has_markers(text))
            result.append(message)
        return result


def has_markers(text: str) -> bool:
    """Whether the text says what could be taken for a marker."""
    chat = any(part in text for part in ("<|", "|>", "<t", "</t"))
    if chat and PLAIN_TEXT["literal chat markers"].search(text):
        return True
    return ("<" in text or "[" in text) and bool(EVERYWHERE["markers of other models"].search(text))


def _fault(row: dict, kind: str, off: Collection[str]) -> tuple[str, str] | None:
    """(rule, why) of a row that training would skip, or that says something in an order that makes no sense."""
    if kind == "pretrain":
        return ("row", fault.text) if (fault := text_fault(row)) else None
    found: list[Fault] = (preference_faults if kind == "preference" else conversation_faults)(row)
    if errors := [fault for fault in found if fault.level == "error"]:
        return "row", errors[0].text
    if "conversation" in off:
        return None
    last = len(row[parts_of(kind)[0]])
    for words, fault in itertools.product(DOUBTFUL, found):
        if words in fault.text:
            if f"message {last}: tool_calls" in fault.text:
                continue  # a conversation may end in a call
            return "conversation", fault.text
    return None


def parts_of(kind: str) -> tuple[str, ...]:
    """The keys of a row's lists of messages."""
    return ("chosen", "rejected") if kind == "preference" else ("conversations",)


def messages_of(row: dict, kind: str) -> list[dict]:
    """The messages of a row; a preference pair's prompt counts once."""
    first, *others = (row[part] for part in parts_of(kind))
    return [*first, *(message for part in others for message in part[-1:])]


def text_of(row: dict, kind: str) -> str:
    """What is read of a row: what languages, repetition and duplicates are told by."""
    if kind == "pretrain":
        return row["text"]
    parts = [message.get(key) or "" for message in messages_of(row, kind) for key in (*CONTENTS, "tool_calls")]
    return "\n".join(part if isinstance(part, str) else dumps(part) for part in parts if part)


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def all_rules() -> dict[str, str]:
    """name -> what it does, of everything that --off takes."""
    names = TEXT_REPAIRS | ROW_REPAIRS | FAULTS | {name: rule.what for name, rule in filters.RULES.items()}
    return names | OVERLAP | COPIES
