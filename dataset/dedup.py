"""Duplicates among rows: the same, the same but for blanks, case and width, and nearly the same (MinHash-LSH).

keys = dedup.row_keys(texts, units)      # 8 bytes a row for each of exact, normalised and 20 bands
for copy in dedup.find(store, texts_of): ...

A row costs 176 bytes on disk. In memory is one column of keys at a time: 80 MB for 10 million rows.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.ngrams import CHINESE, POWERS, Units, mix, ngrams, units_of

NEAR = 0.7  # Jaccard similarity of two texts' shingles from which they are near duplicates
# Two texts of similarity s share a band with probability 1 - (1 - s**ROWS)**BANDS: .92 at .7, .998 at .8, 1e-5 at .1.
BANDS, ROWS = 20, 6
SHINGLE = {"words": 3, "characters": 5}  # of texts that are Chinese, by at least half, characters
FEWEST = 8  # shingles; with less, one word would decide
PAIRS_AT_ONCE = 4096

_random = np.random.default_rng(0)
_FACTORS = _random.integers(0, 1 << 32, BANDS * ROWS, np.uint32) | np.uint32(1)
_SHIFTS = _random.integers(0, 1 << 32, BANDS * ROWS, np.uint32)


class Keys(NamedTuple):
    """What duplicates of some rows are found by."""

    exact: np.ndarray  # (R,) uint64
    normalised: np.ndarray  # (R,) uint64
    bands: np.ndarray  # (R, BANDS) uint64; 0: too short to be searched


class Copy(NamedTuple):
    """A row that is there already."""

    row: int
    rule: str  # exact, normalised or near
    of: int  # the earlier row
    similarity: float


def row_keys(rows: Sequence[str], texts: Sequence[str], units: Units) -> Keys:
    """Keys of rows: `rows` are equal where all of a row is, `texts` are what is read, `units` those of the texts."""
    exact = np.array([hash_of(row) for row in rows], np.uint64)
    normal = np.array([hash_of(normalised(text)) for text in texts], np.uint64)
    return Keys(exact, normal, band_keys(units))


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def normalised(text: str) -> str:
    """A text without what blanks, case and width make different."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.lower().split())


def shingles(units: Units) -> tuple[np.ndarray, np.ndarray]:
    """(hashes (S,) uint32, the text (S,) that each is of, ascending): runs of 3 words, or 5 Chinese characters."""
    chinese = units.share(CHINESE) >= 0.5
    parts = []
    for of_chinese, n in ((False, SHINGLE["words"]), (True, SHINGLE["characters"])):
        hashes, first = ngrams(units, n)
        text = units.text[first]
        wanted = chinese[text] == of_chinese
        parts.append(((hashes[wanted] >> np.uint64(32)).astype(np.uint32), text[wanted]))
    (words, of_words), (characters, of_characters) = parts
    if not len(characters) or not len(words):
        return (words, of_words) if len(words) else (characters, of_characters)
    text = np.concatenate([of_words, of_characters])
    order = np.argsort(text, kind="stable")
    return np.concatenate([words, characters])[order], text[order]


def band_keys(units: Units) -> np.ndarray:
    """(texts, BANDS) uint64: MinHash signatures (Broder 1997), ROWS minima a key (Leskovec et al., chapter 3)."""
    hashes, text = shingles(units)
    keys = np.zeros((units.texts, BANDS), np.uint64)
    counts = np.bincount(text, minlength=units.texts)
    starts = np.flatnonzero(np.diff(text, prepend=-1))
    if not len(starts):
        return keys
    found = text[starts]
    for band in range(BANDS):
        key = np.full(len(starts), band, np.uint64)
        for row in range(ROWS):
            n = band * ROWS + row
            minima = np.minimum.reduceat(hashes * _FACTORS[n] + _SHIFTS[n], starts)  # (texts with shingles,)
            key += minima * POWERS[row]
        keys[found, band] = mix(key) | np.uint64(1)
    keys[counts < FEWEST] = 0
    return keys


class KeyStore:
    """Keys of rows in files of a folder, a column each: written row by row, read a column at a time."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(folder / name, "wb") for name in ("exact", "normalised", *map(str, range(BANDS)))}  # noqa: SIM115

    def add(self, keys: Keys) -> None:
        self.rows += len(keys.exact)
        for name, column in (("exact", keys.exact), ("normalised", keys.normalised), *enumerate(keys.bands.T)):
            self.files[str(name)].write(np.ascontiguousarray(column, "<u8").tobytes())

    def flush(self) -> None:
        for file in self.files.values():
            file.flush()

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def column(self, name: str | int) -> np.ndarray:
        """(rows,) uint64"""
        return np.fromfile(self.folder / str(name), "<u8")


class ListedKeys:
    """As KeyStore, in memory: for a file that is looked at."""

    def __init__(self):
        self.parts: list[Keys] = []

    def add(self, keys: Keys) -> None:
        self.parts.append(keys)

    @property
    def rows(self) -> int:
        return sum(len(keys.exact) for keys in self.parts)

    def column(self, name: str | int) -> np.ndarray:
        parts = [keys.bands[:, name] if isinstance(name, int) else getattr(keys, name) for keys in self.parts]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def find(
    store: KeyStore | ListedKeys,
    texts_of: Callable[[np.ndarray], Sequence[str]],
    rules: Sequence[str] = ("exact", "normalised", "near"),
    threshold: float = NEAR,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[Copy]:
    """The rows that repeat an earlier one, each once. texts_of(ascending row numbers) -> their texts, which near
    duplicates are compared by: what has a band in common is one only if the similarity is at least the threshold."""
    alive = np.ones(store.rows, bool)
    for rule in ("exact", "normalised"):
        if rule in rules:
            rows, first = _repeated(store.column(rule), alive)
            alive[rows] = False
            for row, of in zip(rows.tolist(), first.tolist(), strict=True):
                yield Copy(row, rule, of, 1.0)
    if "near" not in rules:
        return
    pairs = candidates(store, alive, progress)
    done = 0
    while len(pairs) > done:
        block = pairs[done : done + PAIRS_AT_ONCE]
        done += len(block)
        for (of, row), similarity in zip(block, similarities(block, texts_of), strict=True):
            if similarity >= threshold and alive[row]:
                alive[row] = False
                yield Copy(int(row), "near", int(of), float(similarity))
        progress(0.5 + done / len(pairs) / 2)


def _repeated(keys: np.ndarray, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose key an earlier one has, the first one that has it); rows that are not alive do not count."""
    order = np.argsort(keys, kind="stable")
    if not alive.all():
        order = order[alive[order]]
    keys = keys[order]
    again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    del keys
    # The first of a run of equal keys: the place before its first repetition.
    begins = np.flatnonzero(np.diff(again, prepend=-2) > 1)
    firsts = np.repeat(order[again[begins] - 1], np.diff(begins, append=len(again)))
    return order[again], firsts


def candidates(
    store: KeyStore | ListedKeys, alive: np.ndarray, progress: Callable[[float], None] = lambda share: None
) -> np.ndarray:
    """(P, 2) int64, rows that share a band: each with the first of those that do, and with the one before it. Sorted by
    the later row. So there are at most two a row and band, however many share one."""
    found = np.zeros(0, np.uint64)
    for band in range(BANDS):
        keys = store.column(band)
        searched = alive & (keys != 0)
        order = np.argsort(keys, kind="stable")
        order = order[searched[order]]
        keys = keys[order]
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        before, rows = order[again - 1], order[again]
        begins = np.flatnonzero(np.diff(again, prepend=-2) > 1)
        firsts = np.repeat(before[begins], np.diff(begins, append=len(again)))
        del keys, order, again
        new = [(rows << 32 | other).astype(np.uint64) for other in (firsts, before)]
        found = np.unique(np.concatenate([found, *new]))
        progress((band + 1) / BANDS / 2)
    return np.stack([found & np.uint64(0xFFFFFFFF), found >> np.uint64(32)], 1).astype(np.int64)


def similarities(pairs: np.ndarray, texts_of: Callable[[np.ndarray], Sequence[str]]) -> np.ndarray:
    """(P, 2) row numbers -> (P,) Jaccard similarity of the two texts' sets of shingles."""
    rows, places = np.unique(pairs, return_inverse=True)
    hashes, text = shingles(units_of(texts_of(rows)))
    ends = np.searchsorted(text, np.arange(len(rows) + 1))
    sets = [np.unique(hashes[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
    result = np.zeros(len(pairs))
    for n, (a, b) in enumerate(places.reshape(-1, 2)):
        common = len(np.intersect1d(sets[a], sets[b], assume_unique=True))
        result[n] = common / max(len(sets[a]) + len(sets[b]) - common, 1)
    return result
