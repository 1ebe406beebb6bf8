"""What --data_path says: one or several sources, each a file, a pattern of files or a folder, with or without a weight.

parse_sources(["zh.jsonl:2", "en.parquet:1", "shards/*.jsonl.zst"])
"""

import glob
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cli import UsageError
from dataset.files import DataError

DATA_FILE = re.compile(r"\.(jsonl?|parquet)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)


class Source(NamedTuple):
    name: str  # as it was given, without the weight
    files: list[Path]  # in the order of their names
    weight: float | None  # its share of the rows, relative to the others'; None: it was not given


def parse_sources(texts: Iterable[str]) -> list[Source]:
    """UsageError for a weight that is none; DataError for a file, a pattern or a folder without anything."""
    sources = []
    for text in texts:
        name, weight = _split(text)
        sources.append(Source(name, _files(name), weight))
    return sources


def _split(text: str) -> tuple[str, float | None]:
    """PATH:WEIGHT. The colon of C:\\data and those in the names of files that are there belong to the path."""
    found = re.fullmatch(r"(.+):([^:/\\]*)", text, re.DOTALL)
    if Path(text).exists() or not found:
        return text, None
    try:
        weight = float(found[2])
    except ValueError:
        raise DataError(f"{text}: no such file, and {found[2]!r} is no weight; write PATH or PATH:2") from None
    if not 0 < weight < math.inf:
        raise UsageError(f"--data_path {text}: a weight must be a number above 0; leave a source out to switch it off")
    return found[1], weight


def _files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if DATA_FILE.search(file.name) and file.is_file())
        if not files:
            raise DataError(f"{name}: a folder without data files (.jsonl, .json, .parquet, also .gz, .bz2, .xz, .zst)")
        return files
    if not path.exists() and glob.has_magic(name):
        files = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file())
        if not files:
            raise DataError(f"{name}: no file matches the pattern; check it, and put it in quotes")
        return files
    return [path]
