"""What hubs keep in archives and Parquet, as the files that scripts/evaluate.py reads: a CSV a subject, or JSONL.

unpack("subjects", [Path("data/mmlu/all/test-00000-of-00001.parquet")], Path("data/mmlu"))   # data/mmlu/test/LAW.csv
"""

import csv
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dataset.files import DataError


def unpack(how: str, paths: list[Path], folder: Path) -> list[Path]:
    """The files that were made of these in the folder. how: "zip", an archive's members as they are; of Parquet,
    "splits", a JSONL for each split, "folders", one for each folder, "subjects", a CSV for each split and value of the
    column subject. DataError if that cannot be done."""
    makers = {"zip": _members, "splits": _splits, "folders": _folders, "subjects": _subjects}
    import pyarrow

    try:
        return makers[how](paths, folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, pyarrow.ArrowException, LookupError) as error:
        raise DataError(f"{paths[0]} cannot be unpacked ({error}): --replace fetches it again") from None


def _members(paths: list[Path], folder: Path) -> list[Path]:
    """Within the folder, whatever the names in the archive say. Those that are there are left."""
    made = []
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > shutil.disk_usage(folder).free:
                raise DataError(f"{path}: no space left to unpack it")
            made += [Path(archive.extract(member, folder)) for member in members]
    return made


def _splits(paths: list[Path], folder: Path) -> list[Path]:
    return _as_jsonl(paths, lambda path: folder / f"{_split(path)}.jsonl")


def _folders(paths: list[Path], folder: Path) -> list[Path]:
    return _as_jsonl(paths, lambda path: folder / f"{path.parent.name}.jsonl")


def _split(path: Path) -> str:
    """test-00000-of-00001.parquet -> test"""
    return re.sub(r"-\d+-of-\d+$", "", path.stem)


def _as_jsonl(paths: list[Path], target: Callable[[Path], Path]) -> list[Path]:
    """Every row as a line; files of the same target one after the other."""
    parts: dict[Path, list[Path]] = {}
    for path in paths:
        if path.suffix != ".parquet":  # JSONL already
            continue
        parts.setdefault(target(path), []).append(path)
    for made, sources in parts.items():
        with _whole(made) as file:
            for row in _rows(sources):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return list(parts)


def _subjects(paths: list[Path], folder: Path) -> list[Path]:
    tables: dict[Path, list[list[str]]] = {}
    for path in paths:
        for row in _rows([path]):
            name = re.sub(r"[^\w-]", "_", row["subject"])
            line = [row["question"], *row["choices"], "ABCD"[row["answer"]]]
            tables.setdefault(folder / _split(path) / f"{name}.csv", []).append(line)
    for made, lines in tables.items():
        with _whole(made) as file:
            csv.writer(file).writerows([["question", *"ABCD", "answer"], *lines])
    return list(tables)


def _rows(paths: list[Path]) -> Iterator[dict]:
    import pyarrow.parquet

    for path in paths:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """Complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.tmp")
    with open(half, "w", encoding="utf-8", newline="") as file:
        yield file
    os.replace(half, path)
