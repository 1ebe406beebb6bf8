"""Which benchmark questions stand in training data: n-grams of 13 words (in Chinese, characters) that both have.

found = overlap(["question and answer", ...], ["pretrain.jsonl", "sft.jsonl"]); found.share; found.per_question
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.jsonl import DataError, parse_line
from dataset.ngrams import ngrams, units_of
from dataset.tables import Source

N = 13  # Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C
SHORTEST = 8  # units: a question of 8 to 12 is looked for as a whole, a shorter one says too little
BOILERPLATE = 10  # an n-gram of more questions than that is how the benchmark asks, not what
BLOOM_BITS = 24


class Overlap(NamedTuple):
    """How much of a benchmark stands in some data."""

    share: float  # of the questions that are long enough
    checked: int  # how many these are
    per_question: list[bool]  # in the order given; False too for the ones that are too short


class QuestionGrams:
    """The n-grams of questions, to look for in texts."""

    def __init__(self, questions: Sequence[str], n: int = N):
        units = units_of(questions)
        counts = units.counts()
        self.questions, self.long_enough = len(questions), counts >= SHORTEST
        self.by_length: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for length in range(SHORTEST, n + 1):
            hashes, first = ngrams(units, length)
            owners = units.text[first]
            wanted = counts[owners] >= n if length == n else counts[owners] == length
            if wanted.any():
                self.by_length[length] = _table(hashes[wanted], owners[wanted])

    def hits(self, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        """(text, question) for each text that shares an n-gram with a question; several times for several."""
        units = units_of(texts)
        for length, (table, owners, bloom) in self.by_length.items():
            hashes, first = ngrams(units, length)
            maybe = np.flatnonzero(bloom[hashes >> np.uint64(64 - BLOOM_BITS)])
            hashes, first = hashes[maybe], first[maybe]
            low, high = np.searchsorted(table, hashes, "left"), np.searchsorted(table, hashes, "right")
            for at in np.flatnonzero(high > low):
                for question in owners[low[at] : high[at]]:
                    yield int(units.text[first[at]]), int(question)


def _table(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sorted n-grams, the question of each, which upper bits occur at all), without boilerplate."""
    pairs = np.unique(np.rec.fromarrays([hashes, owners], names="hash,owner"))
    _, place, counts = np.unique(pairs.hash, return_inverse=True, return_counts=True)
    pairs = pairs[counts[place] <= BOILERPLATE]
    bloom = np.zeros(1 << BLOOM_BITS, bool)
    bloom[pairs.hash >> np.uint64(64 - BLOOM_BITS)] = True
    return pairs.hash.copy(), pairs.owner.copy(), bloom


def overlap(questions: Sequence[str], files: Iterable[str | Path], tokenizer: Any = None) -> Overlap:
    """How many of the questions (a question with its right answer, as one text each) stand in data files of any of our
    formats: share an n-gram of 13 words, or Chinese characters, with a row. Memory does not grow with the files. With
    the tokenizer, folders of the token cache can be given too, one or all of them.

    DataError names a file that cannot be read."""
    grams = QuestionGrams(questions)
    found: set[int] = set()
    for path in files:
        folder = tokenizer is not None and Path(path).is_dir()
        for texts in _batches(texts_of_cache(Path(path), tokenizer) if folder else texts_of_file(path)):
            found.update(question for _, question in grams.hits(texts))
    checked = int(grams.long_enough.sum())
    return Overlap(len(found) / max(checked, 1), checked, [n in found for n in range(len(questions))])


def texts_of_file(path: str | Path) -> Iterator[str]:
    """The text of each row, whatever its keys are; lines that are no rows are left out."""
    for number, line in Source(Path(path)).lines():
        row, _ = parse_line(number, line)
        if row is not None:
            yield "\n".join(strings_of(row))


def texts_of_cache(folder: Path, tokenizer: Any) -> Iterator[str]:
    """What the rows of tokens say that were made with this tokenizer, a few hundred rows in each text.

    DataError for a folder without such rows: those of another tokenizer would say nothing, and be clean of anything."""
    import pyarrow as pa

    files = [*folder.glob("rows*.arrow"), *folder.glob("*/rows*.arrow")]
    files = [file for file in sorted(files) if _maker_of(file.parent) == tokenizer.chat_hash]
    if not files:
        raise DataError(f"{folder}: no rows of tokens made with the tokenizer of this model; give the data files")
    for file in files:
        with pa.memory_map(str(file)) as source:
            for batch in pa.ipc.open_stream(source):
                ids = batch.column("input_ids").flatten().to_numpy(zero_copy_only=False)
                yield tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def _maker_of(folder: Path) -> str | None:
    """The hash of the tokenizer that made the rows in it; of shards that are not complete it stands in the first."""
    for name in ("summary.json", "shard-00000.json"):
        try:
            figures = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return figures.get("figures", figures).get("tokenizer")
    return None


def strings_of(value: Any) -> Iterator[str]:
    """All strings in a JSON value; of a string that is JSON itself (MiniMind's tools and tool_calls) what it says."""
    if isinstance(value, str):
        if value[:2] in ("[{", '{"'):
            try:
                value = json.loads(value)
            except ValueError:
                pass
        if isinstance(value, str):
            yield value
            return
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from strings_of(part)


def _batches(texts: Iterable[str], most: int = 1 << 20) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
