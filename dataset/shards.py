"""The tokens of a large file in shards, made by a process beside the training, which begins with the first of them.

A shard is whole or absent: its rows, and a record with what the next one begins with. A builder that was killed goes on
after the last whole shard. The rows of text are those of the file in one piece; of conversations those of a shard are
packed together.

sharded = ShardedFile("pretrain", path, folder, tokenizer, seq_len, identity)
builder = Builder([sharded], keep=set()); builder.wait(sharded, 0); sharded.rows_path(0)
"""

import atexit
import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dataset import cache, packing, workers
from dataset.files import DataError, DataFile
from dataset.packing import Sample
from dataset.tokenizer import ChatTokenizer

RESTARTS = 2  # of a builder that was killed, before it is given up


@dataclass(frozen=True)
class ShardedFile:
    """A data file and the folder of its shards."""

    kind: str
    path: Path
    folder: Path
    tokenizer: ChatTokenizer
    seq_len: int
    identity: dict
    text_size: int  # bytes, unpacked; an estimate for a compressed file
    shard_bytes: int  # of text in a shard

    def rows_path(self, shard: int) -> Path:
        return self.folder / f"rows-{shard:05}.arrow"

    def record(self, shard: int) -> dict | None:
        """What is known of a whole shard: rows and text_bytes of its own, and where the next one begins; None if it is
        absent."""
        return _read_json(self.folder / f"shard-{shard:05}.json") if self.rows_path(shard).exists() else None

    def summary(self) -> dict | None:
        """The figures of the whole file, as of a packed dataset, with `shards`; None while it is not complete."""
        return _read_json(self.folder / "summary.json")


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: dict) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(beside, path)


# ------------------------------------------------------------------------------------------------ the size


def expected_size(files: list[ShardedFile]) -> int:
    """Bytes of the whole cache of these files, by the beginning of the first ones."""
    text = packed = 0
    for file in files[:3]:
        chunk = next(packing.chunks_of(DataFile(file.path).lines()), [])
        pieces, _, _ = packing.encode(file.kind, file.tokenizer, file.seq_len, chunk)
        text += sum(len(line) for _, line in chunk)
        packed += sum(piece.ids.nbytes + (0 if piece.mask is None else len(piece.mask) // 8) for piece in pieces)
    return int(sum(file.text_size for file in files) * packed / max(text, 1))


def require_space(files: list[ShardedFile], cache_dir: Path, quiet: bool) -> None:
    """Says how large the cache will be; DataError if the disk has no room for what is missing of it."""
    missing = [file for file in files if file.summary() is None]
    if not missing:
        return
    size, free = expected_size(missing), shutil.disk_usage(cache_dir).free
    done = sum(entry.stat().st_size for file in missing for entry in file.folder.glob("rows-*.arrow"))
    text = sum(file.text_size for file in missing)
    say = f"the token cache of {text / 1e6:,.0f} MB of text will take about {size / 1e6:,.0f} MB in {cache_dir}"
    if size - done > free:
        raise DataError(f"{say}, where {free / 1e6:,.0f} MB are free; set MINIMIND_CACHE to a folder on another disk")
    if not quiet:
        kept = f"; {done / 1e6:,.0f} MB of it are there" if done else ""
        print(f"{say} ({free / 1e6:,.0f} MB are free{kept})", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ making shards


def build(file: ShardedFile, quiet: bool, num_proc: int | None = None, keep: Collection[Path] = ()) -> None:
    """Makes the shards that are missing, one after the other. keep: folders that must stay if the cache is over its
    limit. DataError if the file or the disk is at fault."""
    from filelock import FileLock

    file.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file.folder}.lock"):
        if file.summary() is not None:
            return
        try:
            _Maker(file, quiet, num_proc).make()
            cache.trim(file.folder.parent, {file.folder, *keep}, cache.largest_cache())
        except OSError as error:
            what = f"cannot write the token cache: {error.strerror or error}; make room (what is whole is kept)"
            raise DataError(f"{file.folder}: {what}, or set MINIMIND_CACHE to another folder") from None


class _Maker:
    """From the last whole shard of a file on."""

    def __init__(self, file: ShardedFile, quiet: bool, num_proc: int | None):
        self.file, self.quiet, self.started = file, quiet, time.perf_counter()
        self.num_proc = num_proc or min(os.cpu_count() or 1, 16)
        self.data, self.version = DataFile(file.path), _version(file.path)
        self.figures = packing.new_figures(file.kind, file.seq_len, self.data, file.identity)
        self.shard, self.at, self.before, self.carry = 0, (0, 0), 0.0, np.empty(0, np.int64)
        while (record := file.record(self.shard)) is not None:
            self.shard, self.at, self.before = self.shard + 1, tuple(record["next"]), record["figures"]["seconds"]
            self.figures = record["figures"] | {"forms": Counter(record["figures"]["forms"])}
            self.carry = np.array(record["carry"], np.int64)

    def make(self) -> None:
        file, samples, text = self.file, [], 0
        marks: deque = deque()  # of each chunk on its way: (where the next one begins, bytes of it)
        chunks = self._chunks(marks)
        for rows, skipped, forms in packing.encode_all(file.kind, file.tokenizer, file.seq_len, chunks, self.num_proc):
            packing.count(self.figures, rows, skipped, forms)
            self.at, size = marks.popleft()
            self.figures["lines"] = self.at[0]
            samples, text = samples + rows, text + size
            if text >= file.shard_bytes:
                self._write(samples, text, last=False)
                samples, text = [], 0
        self._write(samples, text, last=True)
        packing.complete_figures(file.path, self.figures, self._seconds())
        self.figures["shards"] = self.shard
        _write_json(file.folder / "summary.json", self.figures)
        if not self.quiet:
            place = f" and {self.shard} shards in {file.folder}"
            print(packing.describe(file.path, self.figures, place), file=sys.stderr, flush=True)

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def _chunks(self, marks: deque) -> Iterator[list[tuple[int, bytes]]]:
        """The lines after those of the whole shards, in the chunks in which they would be without an interruption."""
        size = self.file.path.stat().st_size
        progress = packing.FileProgress(f"tokenising {self.file.path.name}", size, self.quiet)

        def lines() -> Iterator[tuple[int, bytes]]:
            for number, line in self.data.lines(*self.at):
                progress.at(self.data.position)
                yield number, line

        for chunk in packing.chunks_of(lines(), min(packing.CHUNK, self.file.shard_bytes)):
            marks.append(((chunk[-1][0], self.data.position), sum(len(line) for _, line in chunk)))
            yield chunk
        progress.end()

    def _write(self, samples: list[Sample], text: int, last: bool) -> None:
        """Writes a shard beside its place and renames it, then its record."""
        file, before = self.file, self.figures["rows"]
        if _version(file.path) != self.version:
            shutil.rmtree(file.folder, ignore_errors=True)
            raise DataError(f"{file.path}: the file was changed while it was read; run again when it is whole")
        rows = self._rows(samples, last)
        first = next(rows, None)
        if first is None:
            return
        beside = file.folder / "rows.part"
        packing.write_arrow(beside, _chained(first, rows), self.figures)
        self.figures["seconds"] = self._seconds()
        os.replace(beside, file.rows_path(self.shard))
        record = {"rows": self.figures["rows"] - before, "text_bytes": text, "next": self.at}
        record |= {"carry": self.carry.tolist(), "figures": self.figures}
        _write_json(file.folder / f"shard-{self.shard:05}.json", record)
        self.shard += 1

    def _rows(self, samples: list[Sample], last: bool) -> Iterator[dict[str, np.ndarray]]:
        """Of text: the rows that these documents fill after what was carried over; the rest is carried on."""
        seq_len = self.file.seq_len
        if self.file.kind != "pretrain":
            yield from packing.pack_pieces(packing.windows_of(samples, seq_len, self.figures), seq_len)
            return
        ids = [sample.ids for sample in samples]
        dtype = ids[0].dtype if ids else self._dtype()
        stream = np.concatenate([self.carry.astype(dtype), *ids])
        cut = max(len(stream) - 1, 0) // seq_len * seq_len
        self.carry = stream[:0] if last else stream[cut:]
        yield from packing.pack_documents([stream if last else stream[: cut + 1]], seq_len)

    def _dtype(self) -> type:
        return np.uint16 if self.file.tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


def _chained(first: dict, rest: Iterator[dict]) -> Iterator[dict]:
    yield first
    yield from rest


def _version(path: Path) -> list[int]:
    stat = os.stat(path)
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


# ------------------------------------------------------------------------------------------------ the builder


def _build_all(files: list[ShardedFile], keep: set[Path], quiet: bool, failure: Path) -> None:
    """The work of the builder's process."""
    workers.end_with_parent()
    with contextlib.suppress(OSError, AttributeError):
        os.nice(5)  # the training comes first
    try:
        for file in files:
            build(file, quiet, keep=keep)
    except Exception as error:
        text = f"{error}" if isinstance(error, DataError) else f"{files[0].path}: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # on a full disk: the exit status tells it
            failure.write_text(text, encoding="utf-8")
        os.write(2, b"" if isinstance(error, DataError) else f"{text}\n".encode())
        sys.exit(1)


class Builder:
    """Makes the shards of these files in a process of its own, if no other process does so already. keep: other folders
    of the cache that the run reads."""

    def __init__(self, files: list[ShardedFile], keep: set[Path], quiet: bool = False):
        self.files, self.quiet, self.process, self.killed = files, quiet, None, 0
        self.keep = keep | {file.folder for file in files}
        atexit.register(self.stop)

    def __getstate__(self) -> dict:
        return {"files": self.files, "keep": self.keep, "quiet": self.quiet, "process": None, "killed": 0}

    def wait(self, file: ShardedFile, shard: int | None) -> bool:
        """Until the shard (None: the whole file) is there; False if the file has fewer. DataError if it cannot be."""
        while True:
            if shard is not None and file.record(shard) is not None:
                with contextlib.suppress(OSError):
                    os.utime(file.folder)  # in use: whoever makes room begins with others
                return True
            if (summary := file.summary()) is not None:
                return shard is None or shard < summary["shards"] and self._made_again(file)
            self._start_if_none(file)
            time.sleep(0.05)

    def _made_again(self, file: ShardedFile) -> bool:
        """A shard of a complete file has gone: whoever made room removed it."""
        (file.folder / "summary.json").unlink(missing_ok=True)
        raise DataError(f"{file.folder}: shards have been removed; run again to make them anew")

    def _start_if_none(self, file: ShardedFile) -> None:
        from filelock import FileLock, Timeout

        if self.process is not None:
            if self.process.is_alive():
                return
            self._look_at_end(file)
        file.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{file.folder}.lock").acquire(timeout=0):
                pass
        except Timeout:
            return  # another process is making them
        missing = [one for one in self.files if one.summary() is None]
        arguments = (missing, self.keep, self.quiet, self._failure(file))
        self.process = get_context("spawn").Process(target=_build_all, args=arguments)
        with workers.hidden_script():
            self.process.start()

    def _failure(self, file: ShardedFile) -> Path:
        return file.folder.parent / f"failure-{os.getpid()}.txt"

    def _look_at_end(self, file: ShardedFile) -> None:
        code, self.process = self.process.exitcode, None
        failure = self._failure(file)
        if failure.exists():
            text = failure.read_text(encoding="utf-8")
            failure.unlink()
            raise DataError(text)
        if code:
            self.killed += 1
        if self.killed > RESTARTS:
            raise DataError(f"{file.path}: the process that tokenised it was killed; is there enough memory and disk?")

    def stop(self) -> None:
        """What is whole is kept, and gone on from the next time."""
        if self.process is not None and self.process.is_alive():
            self.process.kill()
