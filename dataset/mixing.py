"""Rows of several sources in one endless order that depends on the seed and on the data alone, never on how many
processes take them, nor on how far the cache has got.

rows = Mixture([Part("a.jsonl", ...), ...], [2.0, 1.0], "pretrain", seq_len)
keys = rows.keys(seed=0, start=1000); rows.reader().__getitems__([next(keys)])

A round has a fixed number of rows of each source, shuffled. The source itself is gone through epoch after epoch: all
its rows shuffled, or, where it is large, those of a window of neighbouring shards, so that memory does not grow with it
and the training begins with the first shard. Windows are one shard, one, two, four, then eight shards' worth of tokens.
"""

from __future__ import annotations  # datasets is imported where it is used

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset.shards import Builder, ShardedFile

ROUND = 4096  # rows of a round of weighted sources: weights count to one part in so many
WINDOW = 8  # shards in the largest window
OPEN = WINDOW + 2  # shards of a large source that are held open

Key = tuple[str, int]  # an Arrow file, a row in it


@dataclass
class Part:
    """A source as it is packed: whole files, or shards that may be still in the making."""

    name: str
    paths: list[Path] = field(default_factory=list)  # of whole files' rows
    sizes: list[int] = field(default_factory=list)  # rows in each of them
    files: list[ShardedFile] = field(default_factory=list)
    builder: Builder | None = None
    hashes: list[str] = field(default_factory=list)  # SHA-256 of each file

    @property
    def large(self) -> bool:
        return bool(self.files)

    def __len__(self) -> int:
        """Rows; of a large source only once it is complete: waits for that."""
        for file in self.files:
            self.builder.wait(file, None)
        return sum(self.sizes) + sum(file.summary()["rows"] for file in self.files)

    def guess(self) -> int:
        """Rows, for a large source by the first shard: the same whether the others are there or not."""
        if not self.large:
            return len(self)
        self.builder.wait(self.files[0], 0)
        first = self.files[0].record(0)
        return int(sum(file.text_size for file in self.files) / first["text_bytes"] * first["rows"])

    def shards(self) -> Iterator[tuple[Path, int]]:
        """(path, rows) of each shard in the order of the files; waits for those that are in the making."""
        yield from zip(self.paths, self.sizes, strict=True)
        for file in self.files:
            shard = 0
            while self.builder.wait(file, shard):
                yield file.rows_path(shard), file.record(shard)["rows"]
                shard += 1

    def windows(self, generator: np.random.Generator | None) -> Iterator[list[tuple[Path, int]]]:
        """The shards in the groups whose rows are shuffled together; with a generator, in a random order."""
        shards = self.shards()
        if not self.large:
            yield list(shards)
            return
        if generator is not None:
            shards = list(shards)
            shards = [shards[n] for n in generator.permutation(len(shards))]
        window, most = [], 1
        for n, shard in enumerate(shards):
            window.append(shard)
            if len(window) >= most:
                yield window
                window, most = [], most if n == 0 else min(2 * most, WINDOW)
        if window:
            yield window

    def order(self, seed: Sequence[int], start: int, shuffle: bool) -> Iterator[Key]:
        """Epoch after epoch from row `start` of the endless order on."""
        epoch = 0
        if not self.large:
            epoch, start = divmod(start, len(self))
        while True:
            reorder = np.random.default_rng([*seed, epoch, 0]) if epoch and shuffle else None
            for number, window in enumerate(self.windows(reorder)):
                ends = np.cumsum([rows for _, rows in window])
                size = int(ends[-1])
                if start >= size:
                    start -= size
                    continue
                rng = np.random.default_rng([*seed, epoch, 1, number])
                rows = rng.permutation(size) if shuffle else np.arange(size)
                for row in rows[start:].tolist():
                    shard = bisect.bisect_right(ends, row)
                    yield str(window[shard][0]), row - int(ends[shard - 1]) if shard else row
                start = 0
            epoch += 1


class Mixture:
    """Sources, each by its share of the rows; without weights each by its size, so that an epoch has every row once.

    An epoch is as many rows as all sources have together, of which each gives its share."""

    def __init__(self, parts: list[Part], weights: list[float] | None, kind: str, seq_len: int, sha256: str):
        self.parts, self.weights, self.kind, self.seq_len, self.sha256 = parts, weights, kind, seq_len, sha256

    def __len__(self) -> int:
        """Rows of all sources; waits until large ones are packed."""
        return sum(len(part) for part in self.parts)

    def guess(self) -> int:
        """Rows of all sources, of large ones by their first shard."""
        return sum(part.guess() for part in self.parts)

    def counts(self) -> np.ndarray:
        """(sources,) int64: rows of each in a round."""
        if len(self.parts) == 1:
            return np.array([ROUND])
        if self.weights is None:
            return np.array([len(part) for part in self.parts])
        shares = ROUND * np.array(self.weights) / sum(self.weights)
        counts = np.maximum(shares.astype(np.int64), 1)
        while counts.sum() != ROUND:  # the largest remainders round up; a source that got its one row is paid for
            short = counts.sum() < ROUND
            at = int(np.argmax(shares - counts) if short else np.argmax(np.where(counts > 1, counts - shares, -1)))
            counts[at] += 1 if short else -1
        return counts

    def describe(self, samples: int | None = None) -> str:
        """Each source's share of the rows, and how often it is gone through in an epoch or in so many rows."""
        counts, sizes = self.counts(), [part.guess() for part in self.parts]
        taken = sum(sizes) if samples is None else samples
        lines = []
        for part, count, size in zip(self.parts, counts, sizes, strict=True):
            share, about = count / counts.sum(), "about " * part.large
            passes = f"{taken * share / size:.2f} times" + " in an epoch" * (samples is None)
            lines.append(f"  {part.name}: {share:.1%} of the rows; its {about}{size:,} rows are seen {passes}")
        return "\n".join(lines)

    def record(self) -> list[dict]:
        """Of each source: its name, its share of the rows, the SHA-256 of its files."""
        shares = self.counts() / self.counts().sum()
        return [
            {"name": part.name, "share": round(float(share), 6), "sha256": part.hashes}
            for part, share in zip(self.parts, shares, strict=True)
        ]

    def keys(self, seed: int, start: int, shuffle: bool = True) -> Iterator[Key]:
        """The endless order from row `start` on."""
        counts = self.counts()
        sources = np.repeat(np.arange(len(counts)), counts)
        number, skip = divmod(start, len(sources))

        def shuffled(number: int) -> np.ndarray:
            return np.random.default_rng([seed, 2, number]).permutation(sources) if shuffle else sources

        done = number * counts + np.bincount(shuffled(number)[:skip], minlength=len(counts))
        orders = [part.order([seed, 3, n], int(done[n]), shuffle) for n, part in enumerate(self.parts)]
        while True:
            for source in shuffled(number)[skip:].tolist():
                yield next(orders[source])
            number, skip = number + 1, 0

    def reader(self, open_rows: Callable) -> Reader:
        """open_rows: of the path of an Arrow file, what gives its rows by __getitems__()."""
        large = sum(part.large for part in self.parts)
        return Reader(open_rows, large * OPEN + sum(len(part.paths) for part in self.parts))

    def figures(self) -> dict:
        """What summary() gives of a packed dataset, as far as it is known before all is packed."""
        return {"kind": self.kind, "seq_len": self.seq_len, "sha256": self.sha256}


class Reader:
    """Rows by key, from Arrow files that are opened when they are asked for; what a DataLoader needs of a dataset."""

    def __init__(self, open_rows: Callable, most: int):
        self.open_rows, self.most = open_rows, most
        self.opened: OrderedDict = OrderedDict()

    def _rows_of(self, path: str):
        if path not in self.opened:
            self.opened[path] = self.open_rows(path)
            if len(self.opened) > self.most:
                self.opened.popitem(last=False)  # its memory map goes with it
        self.opened.move_to_end(path)
        return self.opened[path]

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, np.ndarray]]:
        places: dict[str, list[int]] = {}
        for at, (path, _) in enumerate(keys):
            places.setdefault(path, []).append(at)
        rows: list[dict] = [{}] * len(keys)
        for path, found in places.items():
            for at, row in zip(found, self._rows_of(path).__getitems__([keys[at][1] for at in found]), strict=True):
                rows[at] = row
        return rows
