"""Any file of rows as numbered lines of JSON: what DataFile reads, and CSV, TSV, Parquet and plain text.

for path in data_files(["raw/", "more/*.csv.gz"]): source = Source(path); for number, line in source.lines(): ...
"""

import csv
import glob
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset import packing
from dataset.files import UNREADABLE, DataError, DataFile, encoding_of, unpacked

TABLES = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".jsonl", ".json", ".parquet", ".txt", *TABLES)
PACKED = (".gz", ".zst", ".xz", ".bz2")
SAMPLES = ("line", "paragraph", "document")  # what a row of plain text is, as datasets' text loader calls it
csv.field_size_limit(1 << 26)


def ending(path: Path) -> str:
    """The ending that says what a file is, without that of its compression."""
    return path.with_suffix("").suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def data_files(names: Sequence[str]) -> list[Path]:
    """The files that paths, folders and globs name, sorted in each. DataError for a name that there is no file of."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and ending(file) in ENDINGS)
            if not found:
                raise DataError(f"{name}: no data in this folder; looked for {', '.join(ENDINGS)}, plain or compressed")
        elif path.exists() or not glob.has_magic(name):
            found = [path]
        else:
            found = sorted(Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file())
            if not found:
                raise DataError(f"{name}: no such files; check the pattern")
        files += [file for file in found if file not in files]
    return files


class Source:
    """One file. `kind`: what it is, in words; `unit`: what lines() counts. DataError says why it cannot be read."""

    def __init__(self, path: Path, sample_by: str = "line", column: str | None = None):
        self.path, self.ending, self.sample_by, self.column, self.file = path, ending(path), sample_by, column, None
        self.unit, self._raw = "row", None
        if path.is_file() and not (self.ending == ".parquet" or self.ending in TABLES or self.ending == ".txt"):
            self.file = DataFile(path)
            self.unit, self.kind = self.file.unit, ", ".join(self.file.kind) or "JSONL"
            return
        try:
            with open(path, "rb") as raw:
                self.encoding = "" if self.ending == ".parquet" else _encoding(unpacked(raw).read(1 << 20))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; check the path") from None
        except UNREADABLE as error:
            raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        names = {".parquet": "Parquet", ".txt": f"plain text by {sample_by}", ".csv": "CSV", ".tsv": "TSV"}
        self.kind = f"{names[self.ending]} {self.encoding.upper() if self.encoding != 'utf-8' else ''}".strip()

    @property
    def position(self) -> int:
        """Bytes of the file that have been read."""
        if self.file:
            return self.file.position
        return self._raw.tell() if self._raw and not self._raw.closed else 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(number from 1, a row as JSON in UTF-8). Memory does not grow with the file."""
        lines = self.file.lines() if self.file else enumerate(self._rows(), 1)
        if self.column is None:
            yield from lines
            return
        for number, line in lines:
            yield number, _renamed(line, self.column)

    def _rows(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as self._raw:
                if self.ending == ".parquet":
                    rows: Iterator = _parquet(self._raw)
                else:
                    text = io.TextIOWrapper(unpacked(self._raw), self.encoding, errors="surrogateescape", newline="")
                    rows = self._texts(text) if self.ending == ".txt" else _table(text, TABLES[self.ending])
                for row in rows:
                    yield (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "surrogateescape")
        except DataError:
            raise
        except (*UNREADABLE, csv.Error) as error:
            raise DataError(f"{self.path}: damaged ({error}); download or copy the file again") from None

    def _texts(self, text: io.TextIOWrapper) -> Iterator[dict]:
        if self.sample_by == "document":
            if whole := text.read():
                yield {"text": whole}
            return
        lines: Iterator[list[str]] = ([line] for line in text)
        if self.sample_by == "paragraph":
            groups = itertools.groupby(text, lambda line: not line.strip())
            lines = (list(group) for blank, group in groups if not blank)
        for part in lines:
            if row := "".join(part).removeprefix("\ufeff").rstrip("\r\n"):
                yield {"text": row}


def _encoding(head: bytes) -> str:
    return "utf-8-sig" if head.startswith(b"\xef\xbb\xbf") else encoding_of(head)


def _table(text: io.TextIOWrapper, separator: str) -> Iterator[dict]:
    rows = csv.DictReader(text, delimiter=separator)
    for row in rows:
        row.pop(None, None)  # cells beyond the header
        yield {(key or "").strip(): value for key, value in row.items() if value is not None}


def _parquet(raw: io.BufferedReader) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(raw).iter_batches(1024):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None


def _renamed(line: bytes, column: str) -> bytes:
    """The row with the column's text as its text, and nothing else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(row, dict) or column not in row:
        return line
    return (json.dumps({"text": row[column]}, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------------------ what rows are

STAGES = {"pretrain": "pretrain", "sft": "sft", "dpo": "preference"}  # what packing.py calls the formats


def guess_kind(path: Path, lines: Iterator[tuple[int, bytes]], unit: str = "line") -> str:
    """The format (pretrain, sft or dpo) that most of the first rows can be read as. DataError if there is none."""
    votes: Counter = Counter()
    first = ""
    for number, line in itertools.islice(lines, 200):
        for kind, key in (("pretrain", "text"), ("dpo", "chosen"), ("sft", "conversations")):
            row, _, faults = packing.read_row(STAGES[kind], number, line)
            votes[kind] += row is not None and (key in row or (kind == "dpo" and "rejected" in row))
        if number == 1 and faults:
            first = f"{unit} 1: {faults[0].text}"
    if not votes:
        raise DataError(f"{path}: the file is empty")
    if not votes.total():
        raise DataError(f"{path}: what its rows are cannot be told; name the format with --kind ({first})")
    return max(votes, key=lambda kind: (votes[kind], list(STAGES).index(kind)))
