"""Files -> one clean file, what was held out, what was removed, and a report: the whole of scripts/clean_data.py.

report = clean_files(Job(plan, [Path("raw.jsonl")], Path("clean.jsonl")))

Rows are cleaned in several processes and kept beside the output, then the duplicates among them are looked for, then
those that stay are written. In memory is some 30 bytes a row, and one column of keys (see dedup.py).
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from dataset import dedup, packing, workers
from dataset.clean_rows import COPIES, LANGUAGES, Cleaned, Cleaner, Plan, all_rules, text_of
from dataset.files import DataError
from dataset.tables import Source

EXAMPLES = 3  # of each rule in the report
SHOWN = 200  # characters of an example


@dataclasses.dataclass
class Job:
    """What is to be cleaned, and into what."""

    plan: Plan
    files: Sequence[Path]
    out: Path
    removed: Path | None = None
    holdout: float = 0.0
    against: Sequence[Path] = ()
    num_proc: int = 1
    sample_by: str = "line"
    column: str | None = None

    @property
    def held_out(self) -> Path:
        stem, *endings = self.out.name.partition(".jsonl")
        return self.out.with_name(f"{stem}.val{''.join(endings)}")


def clean_files(job: Job) -> dict[str, Any]:
    """Does the job and returns its report, as written to JSON. DataError: why it cannot be done; then there is no
    output, and earlier output is as it was; but where no row can be kept, the removed ones are written."""
    sources = [Source(path, job.sample_by, job.column) for path in (*job.against, *job.files)]
    for source in sources:
        if source.path.stat().st_size == 0:
            raise DataError(f"{source.path}: the file is empty; download it again, or leave it out")
    with _workspace(job.out) as folder, _Removals(job) as removals, Spool(folder) as spool:
        report = _new_report(job, sources)
        for n, chunk, done in _cleaned(job, sources):
            _count(report, sources[n], chunk, done)
            spool.add(n, done)
            for row in done.removed if n >= len(job.against) else ():
                removals.add(sources[n], row.number, row.rule, row.why, row.line)
        spool.close()
        alive = _without_copies(job, sources, spool, removals)
        alive &= spool.sources >= len(job.against)
        removals.close()
        if not alive.any():
            removals.keep()
            why = ", ".join(f"{rule} {entry['rows']:,}" for rule, entry in removals.by_rule.items())
            raise DataError(f"{job.files[0]}: none of the rows can be kept; removed by {why or 'nothing: no rows'}")
        report["removed"] = removals.by_rule
        for source, rules in removals.by_source.items():
            report["sources"][source]["removed"] = dict(rules.most_common())
        _finish(report, spool, alive, job, sources)
        with writing(job.out):
            report["output"] = _write(job, spool, alive, folder)
        removals.keep()
    return report


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Of what is written inside, a fault of the disk is one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(f"{path}: cannot be written: {why}; make room, or give another place") from None


@contextlib.contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """A folder beside the output, which is removed however this ends."""
    folder = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    with writing(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ processes


def _cleaned(job: Job, sources: Sequence[Source]) -> Iterator[tuple[int, list, Cleaned]]:
    """(the source's place, lines, what came of them) of all sources, in order."""
    earlier = dataclasses.replace(job.plan, check=False, questions=())
    size = sum(source.path.stat().st_size for source in sources)
    tasks = _tasks(sources, len(job.against), size)
    plans = earlier, job.plan, len(job.against)
    if job.num_proc <= 1 or size < packing.PARALLEL_FROM:
        clean = _cleaner(*plans)
        for n, chunk in tasks:
            yield n, chunk, clean(n, chunk)
        return
    try:
        for (n, chunk), done in workers.in_order(_clean_in_worker, tasks, job.num_proc, _start_worker, *plans):
            yield n, chunk, done
    except workers.WorkerKilled as killed:
        raise DataError(f"{job.out}: not written: {killed}; run again, with fewer processes (--num_proc)") from None


def _tasks(sources: Sequence[Source], earlier: int, size: int) -> Iterator[tuple[int, list]]:
    progress, before = packing.FileProgress("cleaning", size), 0
    for n, source in enumerate(sources):
        for chunk in packing.chunks_of(source.lines()):
            progress.at(before + source.position)
            yield n, chunk
        before += source.path.stat().st_size
    progress.end()


def _cleaner(earlier: Plan, plan: Plan, against: int) -> Callable[[int, list], Cleaned]:
    """What cleans lines of the n-th source; the first `against` sources are earlier output."""
    cleaners = Cleaner(earlier), Cleaner(plan)
    return lambda n, chunk: cleaners[n >= against].clean(chunk)


def _start_worker(*plans: Any) -> None:
    global _clean
    _clean = _cleaner(*plans)


def _clean_in_worker(n: int, chunk: list) -> Cleaned:
    return _clean(n, chunk)


# ------------------------------------------------------------------------------------------------ rows on disk


class Spool:
    """The rows that may stay, on disk, and what is known of each."""

    def __init__(self, folder: Path):
        self.path = folder / "rows"
        self.keys = dedup.KeyStore(folder / "keys")
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.file = open(self.path, "w+b")  # noqa: SIM115

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
            self.keys.close()

    def add(self, source: int, done: Cleaned) -> None:
        with writing(self.path):
            self.file.write(done.data)
            self.keys.add(done.keys)
        sources = np.full(len(done.sizes), source, np.uint32)
        self.parts.append((sources, done.numbers, done.sizes, done.languages))

    def close(self) -> None:
        """No more rows come."""
        with writing(self.path):
            self.file.flush()
            self.keys.flush()
        columns = zip(*self.parts, strict=True) if self.parts else [np.zeros((1, 0), np.uint32)] * 4
        self.sources, self.numbers, self.sizes, self.languages = (np.concatenate(list(column)) for column in columns)
        self.parts = []
        self.ends = np.cumsum(self.sizes, dtype=np.uint64)

    def line(self, row: int) -> bytes:
        end = int(self.ends[row])
        start = end - int(self.sizes[row])
        self.file.seek(start)
        return self.file.read(end - start)

    def texts(self, rows: np.ndarray, kind: str) -> list[str]:
        return [text_of(json.loads(self.line(row)), kind) for row in rows.tolist()]


def _without_copies(job: Job, sources: Sequence[Source], spool: Spool, removals: "_Removals") -> np.ndarray:
    """(rows,) bool: which rows repeat no earlier one."""
    alive = np.ones(len(spool.sizes), bool)
    rules = [rule for rule in COPIES if rule not in job.plan.off]
    progress = packing.FileProgress("duplicates: of keys", len(spool.sizes) * 176)
    kind, near = job.plan.filters.kind, job.plan.filters.limits.get("near", dedup.NEAR)
    found = dedup.find(
        spool.keys,
        lambda rows: spool.texts(rows, kind),
        rules,
        near,
        lambda share: progress.at(int(share * progress.total)),
    )
    for copy in found:
        alive[copy.row] = False
        if spool.sources[copy.row] < len(job.against):
            continue
        of = f"of {sources[spool.sources[copy.of]].path} {spool.numbers[copy.of]}"
        why = of + (f", similarity {copy.similarity:.2f}" if copy.rule == "near" else "")
        source, number = sources[spool.sources[copy.row]], int(spool.numbers[copy.row])
        removals.add(source, number, copy.rule, why, spool.line(copy.row))
    progress.end()
    return alive


def _write(job: Job, spool: Spool, alive: np.ndarray, folder: Path) -> dict[str, dict]:
    """Writes the rows that stay, in the order in which they came, and what is held out; returns what the files are."""
    held = np.zeros(len(alive), bool)
    if job.holdout:
        # The key of the text decides, so a document is on the same side whatever else is there.
        held = spool.keys.column("normalised") < np.uint64(job.holdout * 2**64)
    described = {}
    for path, wanted in ((job.out, alive & ~held), (job.held_out, alive & held)):
        if path == job.held_out and not job.holdout:
            continue
        part, digest, size = folder / path.name, hashlib.sha256(), 0
        with _opened(part) as file:
            for row in np.flatnonzero(wanted).tolist():
                line = spool.line(row)
                file.write(line)
                digest.update(line)
                size += len(line)
        os.replace(part, path)
        described[str(path)] = {"rows": int(wanted.sum()), "bytes": size, "sha256_of_text": digest.hexdigest()}
    return described


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, compressed as its name says; the same text makes the same bytes."""
    with open(path, "wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                yield file
        elif path.suffix == ".zst":
            import pyarrow

            with pyarrow.CompressedOutputStream(raw, "zstd") as file:
                yield file
        else:
            yield raw


# ------------------------------------------------------------------------------------------------ report


class _Removals:
    """The rows that were taken out: into a file, if one is wanted, and counted by rule and source."""

    def __init__(self, job: Job):
        self.target = self.part = job.removed
        plain = self.target and not self.target.is_symlink() and (self.target.is_file() or not self.target.exists())
        if plain:  # not /dev/null
            self.part = self.target.with_name(f"{self.target.name}.{os.getpid()}.tmp")
        self.by_rule: dict[str, dict] = {}
        self.by_source: dict[str, Counter] = {}
        self.file: IO[bytes] | None = None

    def __enter__(self) -> "_Removals":
        if self.target:
            with writing(self.target):
                self.target.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.part, "wb")  # noqa: SIM115
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(DataError):
            self.close()
        if self.part != self.target:
            self.part.unlink(missing_ok=True)

    def add(self, source: Source, number: int, rule: str, why: str, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        entry = self.by_rule.setdefault(rule, {"rows": 0, "bytes": 0, "what": all_rules()[rule], "examples": []})
        entry["rows"] += 1
        entry["bytes"] += len(line)
        where = f"{source.path} {source.unit} {number}"
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append({"where": where, "why": why, "row": text[:SHOWN]})
        self.by_source.setdefault(str(source.path), Counter())[rule] += 1
        if self.file:
            row = {"source": str(source.path), source.unit: number, "rule": rule, "why": why, "row": text}
            with writing(self.target):
                self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))

    def close(self) -> None:
        if self.file:
            with writing(self.target):
                self.file.close()

    def keep(self) -> None:
        """In the place of an earlier file, now that it is whole."""
        if self.part != self.target:
            with writing(self.target):
                os.replace(self.part, self.target)


def _new_report(job: Job, sources: Sequence[Source]) -> dict[str, Any]:
    settings = job.plan.filters
    return {
        "kind": settings.kind,
        "rules_off": sorted(job.plan.off),
        "thresholds_set": dict(settings.limits),
        "languages_kept": list(settings.languages),
        "holdout": job.holdout,
        "against": [str(path) for path in job.against],
        "questions": len(job.plan.questions),
        "sources": {
            str(source.path): {"format": source.kind, "rows": 0, "bytes": 0, "removed": {}}
            for source in sources[len(job.against) :]
        },
        "repaired": Counter(),
    }


def _count(report: dict, source: Source, chunk: Iterable[tuple[int, bytes]], done: Cleaned) -> None:
    if entry := report["sources"].get(str(source.path)):
        entry["rows"] += len(list(chunk))
        entry["bytes"] += sum(len(line) for _, line in chunk)
        report["repaired"].update(done.repaired)


def _finish(report: dict, spool: Spool, alive: np.ndarray, job: Job, sources: Sequence[Source]) -> None:
    """Fills in what is known once the duplicates are: rows and bytes kept by source and language."""
    for n in range(len(job.against), len(sources)):
        kept = alive & (spool.sources == n)
        entry = report["sources"][str(sources[n].path)]
        entry |= {"kept": int(kept.sum()), "kept_bytes": int(spool.sizes[kept].sum(dtype=np.int64))}
    counts = np.bincount(spool.languages[alive], minlength=len(LANGUAGES)).tolist()
    report["languages"] = {name: count for name, count in zip(LANGUAGES, counts, strict=True) if count}
    report["repaired"] = dict(report["repaired"].most_common())
    report["removed"] = dict(sorted(report["removed"].items(), key=lambda entry: -entry[1]["rows"]))
