"""JSONL files -> tokens packed into full rows (memory-mapped, built once, cached) -> batches.

rows = pretrain_dataset("dataset/starter_data/pretrain.jsonl", load_tokenizer(), seq_len=512)
for batch in batches(rows, batch_size=8, seed=0): ...
"""

from __future__ import annotations  # torch and datasets are imported where they are used: `--help` stays quick

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset import cache, files, packing
from dataset.cache import content_hash, default_cache_dir
from dataset.jsonl import DataError, read_jsonl
from dataset.mixing import Mixture, Part
from dataset.packing import PADDING
from dataset.questions import Questions, read_questions
from dataset.shards import Builder, ShardedFile, require_space
from dataset.sources import Source, parse_sources
from dataset.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

__all__ = ["DataError", "batches", "collate", "preference_dataset", "pretrain_dataset", "read_jsonl"]
__all__ += ["content_hash", "default_cache_dir"]
__all__ += ["question_dataset", "sft_dataset", "summary", "bytes_per_token", "validation_batches", "training_data"]

Paths = str | Path | list[Source]
# The files whose code shapes the rows.
RENDERING = ("chat", "template", "tokenizer", "checks", "files", "jsonl", "mapping", "packing", "parquet")
LARGE = 16  # shards of text from which a source is packed in shards
IGNORE = -100  # label that the loss leaves out


def pretrain_dataset(path: Paths, tokenizer: ChatTokenizer, seq_len: int, **options) -> Dataset | Mixture:
    """{"text"} lines -> rows of seq_len + 1 tokens (column input_ids). Options: cache_dir, num_proc, quiet. Of sources
    (training_data()), a Mixture of such rows, which batches() takes too."""
    return _rows("pretrain", path, tokenizer, seq_len, **options)


def sft_dataset(path: Paths, tokenizer: ChatTokenizer, seq_len: int, **options) -> Dataset | Mixture:
    """{"conversations"} lines -> rows of up to seq_len tokens (columns input_ids, loss_mask, segment_lengths).
    Options: cache_dir, num_proc, quiet."""
    return _rows("sft", path, tokenizer, seq_len, **options)


def preference_dataset(path: Paths, tokenizer: ChatTokenizer, seq_len: int, **options) -> Dataset | Mixture:
    """{"chosen", "rejected"} lines -> rows as sft_dataset's. A pair is two segments of one row, chosen and rejected, so
    odd segments are chosen and even ones rejected; labels are the tokens of the last answer. Pairs that are longer than
    a row are skipped and counted."""
    return _rows("preference", path, tokenizer, seq_len, **options)


def question_dataset(path: Paths, tokenizer: ChatTokenizer, seq_len: int, quiet: bool = False, **options) -> Questions:
    """Questions with an answer to check against (dataset/questions.py), for reinforcement learning."""
    if not isinstance(path, list):
        return read_questions(path, quiet)
    if weighted := [source.name for source in path if source.weight is not None]:
        raise DataError(f"{weighted[0]}: questions have no weights, only texts and conversations have")
    parts = [read_questions(file, quiet) for source in path for file in source.files]
    questions = Questions(question for part in parts for question in part)
    questions.sha256 = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return questions


def training_data(texts: list[str]) -> str | list[Source]:
    """What --data_path says: the path of one file; or sources, where there are several, or one is large."""
    sources = parse_sources(texts)
    files = [file for source in sources for file in source.files]
    return sources if len(files) > 1 or _is_large(files) else str(files[0])


def summary(dataset: Dataset | Mixture | Questions) -> dict:
    """The figures of a packed dataset: kind, seq_len, lines, used, skipped, tokens, labels, rows, fill, seconds, ...;
    of a Mixture kind, seq_len and sha256; of questions the hash of their files."""
    if isinstance(dataset, Questions):
        return {"sha256": dataset.sha256, "rows": len(dataset)}
    return dataset.figures() if isinstance(dataset, Mixture) else json.loads(dataset.info.description)


def cache_folders(dataset: Dataset | Mixture | Questions) -> set[Path]:
    """Where the cache holds its rows."""
    if isinstance(dataset, Mixture):
        parts = dataset.parts
        return {path.parent for part in parts for path in part.paths} | {f.folder for part in parts for f in part.files}
    return set() if isinstance(dataset, Questions) else {Path(file["filename"]).parent for file in dataset.cache_files}


def row_count(dataset: Dataset | Mixture, exact: bool) -> int:
    """Rows of an epoch. Unless it must be exact, a large source that is still in the making is not waited for."""
    return dataset.guess() if isinstance(dataset, Mixture) and not exact else len(dataset)


def _rows(kind: str, path: Paths, *positional, **options) -> Dataset | Mixture:
    make = _mixture if isinstance(path, list) else _packed_dataset
    return make(kind, path if isinstance(path, list) else Path(path), *positional, **options)


def _is_large(paths: list[Path]) -> bool:
    """By the size of the text alone, so that a source is always read in the same order."""
    return sum(files.DataFile(path).text_size for path in paths) >= LARGE * cache.shard_bytes()


def _mixture(
    kind: str,
    sources: list[Source],
    tokenizer: ChatTokenizer,
    seq_len: int,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
    quiet: bool = False,
    keep: Collection[Path] = (),
) -> Mixture:
    """Small sources are packed now, file by file; large ones by a process of their own, in shards."""
    cache_dir = Path(cache_dir or default_cache_dir())
    parts, sharded = [], []
    for source in sources:
        for path in source.files:
            _check(path, seq_len)
    with _writable(cache_dir):
        cache.make_cache_dir(cache_dir)
    for source in sources:
        hashes = [content_hash(path, cache_dir, quiet) for path in source.files]
        parts.append(Part(source.name, hashes=hashes))
        if _is_large(source.files):
            parts[-1].files = [
                _sharded(kind, path, digest, tokenizer, seq_len, cache_dir)
                for path, digest in zip(source.files, hashes, strict=True)
            ]
            sharded += parts[-1].files
    kept = {*keep, *(file.folder for file in sharded)}  # all must be there when the run begins, however small the cache
    for source, part in zip(sources, parts, strict=True):
        for path in source.files if not part.files else ():
            dataset = _packed_dataset(kind, path, tokenizer, seq_len, cache_dir, num_proc, quiet, kept)
            part.paths.append(Path(dataset.cache_files[0]["filename"]))
            part.sizes.append(len(dataset))
            kept.add(part.paths[-1].parent)
    if sharded:
        require_space(sharded, cache_dir, quiet)
        builder = Builder(sharded, kept, quiet)
        for part in parts:
            part.builder = builder
    weights = None
    if any(source.weight is not None for source in sources):
        weights = [1.0 if source.weight is None else source.weight for source in sources]
    content = [weights, [part.hashes for part in parts], [file.shard_bytes for file in sharded]]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Mixture(parts, weights, kind, seq_len, digest)


def _sharded(
    kind: str, path: Path, digest: str, tokenizer: ChatTokenizer, seq_len: int, cache_dir: Path
) -> ShardedFile:
    size = cache.shard_bytes()
    folder = _cache_folder(kind, digest, tokenizer, seq_len, cache_dir, size)
    text_size, identity = files.DataFile(path).text_size, {"sha256": digest, "tokenizer": tokenizer.chat_hash}
    return ShardedFile(kind, path.absolute(), folder, tokenizer, seq_len, identity, text_size, size)


@contextmanager
def _writable(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "set MINIMIND_CACHE to a folder that can be written"
        raise DataError(f"{cache_dir}: cannot write the token cache: {error.strerror or error}; {remedy}") from None


def _packed_dataset(
    kind: str,
    path: Path,
    tokenizer: ChatTokenizer,
    seq_len: int,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
    quiet: bool = False,
    keep: Collection[Path] = (),
) -> Dataset:
    from filelock import FileLock, Timeout

    _check(path, seq_len)
    cache_dir = Path(cache_dir or default_cache_dir())
    with _writable(cache_dir):
        cache.make_cache_dir(cache_dir)
        version, digest = _version(path), content_hash(path, cache_dir, quiet)
        folder = _cache_folder(kind, digest, tokenizer, seq_len, cache_dir)
        lock = FileLock(f"{folder}.lock")  # ends with its process, however that ends
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"{path.name}: waiting for another process that is tokenising it", quiet)
            lock.acquire()
        try:
            dataset = _open(folder)
            cached = dataset is not None
            if not cached:
                try:
                    identity = {"sha256": digest, "tokenizer": tokenizer.chat_hash}
                    _build(folder, kind, path, tokenizer, seq_len, num_proc, quiet, identity)
                except BrokenExecutor:
                    text = "a process that tokenised it was killed; is there enough memory?"
                    raise DataError(f"{path}: {text}") from None
                if _version(path) != version:
                    shutil.rmtree(folder)
                    raise DataError(f"{path}: the file was changed while it was read; run again when it is whole")
                dataset = _open(folder)
            os.utime(folder)  # used just now: trim() begins with those that were used longest ago
        finally:
            lock.release()
        place = "" if cached or quiet else _tell_place(cache_dir, folder, keep)
    _say(packing.describe(path, summary(dataset), "; cached" if cached else place), quiet)
    return dataset


def _check(path: Path, seq_len: int) -> None:
    """DataError if there cannot be rows of this file."""
    if not 2 <= seq_len <= 1 << 20:
        raise DataError(f"seq_len {seq_len} is out of range: it must be at least 2 and at most {1 << 20}")
    files.DataFile(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")


def _version(path: Path) -> list[int]:
    """What tells that a file is being changed."""
    stat = os.stat(path)
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _build(folder: Path, kind: str, path: Path, *options) -> None:
    """Makes the rows beside their place and renames them: a killed run leaves no half cache."""
    building = Path(f"{folder}.building")
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    building.mkdir()
    try:
        packing.pack_file(kind, path, building, *options)
        os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _tell_place(cache_dir: Path, folder: Path, keep: Collection[Path]) -> str:
    """Where the cache is and what it holds, in words, once it is within its limit."""
    total, removed = cache.trim(cache_dir, {folder, *keep}, cache.largest_cache())
    own, total, gone = (f"{size / 1e6:,.1f} MB" for size in (cache.folder_size(folder), total, sum(removed)))
    text = f"; kept in {cache_dir} ({own}; {total} with all rows that are there)"
    if removed:
        text += f"; removed {gone} that were used longest ago (more than MINIMIND_CACHE_GB, or 20)"
    if cache_dir == cache.temporary_cache_dir():
        text += ", a temporary folder, for no other can be written: set MINIMIND_CACHE to keep it"
    return text


def _cache_folder(
    kind: str, digest: str, tokenizer: ChatTokenizer, seq_len: int, cache_dir: Path, shard_bytes: int | None = None
) -> Path:
    """Where the rows of a file with this content are kept: all that shapes the rows is in the name."""
    # The code that renders and packs is part of the key: a changed template must not meet rows of the old one.
    code = [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in RENDERING]
    if shard_bytes:
        code.append(f"{shard_bytes} {Path(__file__).with_name('shards.py').read_text(encoding='utf-8')}")
    identity = [kind, seq_len, digest, tokenizer.chat_hash, code]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return cache_dir / f"{kind}-{seq_len}-{key}"


def _open(folder: Path) -> Dataset | None:
    """The cached dataset, or None if there is none or it is damaged."""
    import pyarrow
    from datasets import Dataset, DatasetInfo

    try:
        description = (folder / "summary.json").read_text(encoding="utf-8")
        figures = json.loads(description)
        dataset = Dataset.from_file(str(folder / "rows.arrow"), info=DatasetInfo(description=description))
        return dataset if len(dataset) == figures["rows"] else None
    except (OSError, ValueError, KeyError, pyarrow.ArrowException):
        return None


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def collate(rows: list[dict[str, np.ndarray]], seq_len: int, kind: str) -> dict[str, torch.Tensor | int]:
    """Rows of a packed dataset -> input_ids (B, T), labels (B, T), both int64; `tokens`, the number of labels; and
    `weight`, the number of items whose mean the loss is: the labels, or the pairs of preference rows.

    labels[b, t] is the token that follows input_ids[b, t], or -100. SFT rows also give segment_ids (B, T) int32, the
    number of the conversation inside the row from 1, 0 where there is padding; preference rows what _answers() does.
    An empty dict is a row of padding.
    """
    import torch

    input_ids = np.full((len(rows), seq_len), PADDING, np.int64)
    labels = np.full((len(rows), seq_len), IGNORE, np.int64)
    segment_ids = np.zeros((len(rows), seq_len), np.int32)
    for b, row in enumerate(rows):
        if not row:
            continue
        ids = np.asarray(row["input_ids"])
        if "loss_mask" not in row:
            input_ids[b, : len(ids) - 1] = ids[:-1]
            labels[b, : len(ids) - 1] = ids[1:]
            continue
        lengths = np.asarray(row["segment_lengths"])
        segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        input_ids[b, : len(ids)] = ids
        segment_ids[b, : len(ids)] = segments
        trained = np.asarray(row["loss_mask"])[1:] & (segments[1:] == segments[:-1])
        labels[b, : len(ids) - 1][trained] = ids[1:][trained]
    batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
    if kind != "pretrain":
        batch["segment_ids"] = torch.from_numpy(segment_ids)
    tokens = int((labels != IGNORE).sum())
    if kind == "preference":
        batch |= _answers(labels, segment_ids)
        return batch | {"tokens": tokens, "weight": len(batch["answer_lengths"])}
    return batch | {"tokens": tokens, "weight": tokens}


def _answers(labels: np.ndarray, segment_ids: np.ndarray) -> dict[str, torch.Tensor]:
    """Of preference rows, whose pairs are two neighbouring segments each. answer_of (B, T) int64: the answer that a
    label belongs to, numbered over the batch, 2 i the chosen one of pair i and 2 i + 1 the rejected one; -1 where there
    is no label. answer_lengths (pairs, 2) int64: their numbers of labels."""
    import torch

    segments_of = segment_ids.max(axis=1)  # (B,)
    first = np.cumsum(segments_of) - segments_of  # (B,): answers in the rows before
    answer_of = np.where(labels != IGNORE, first[:, None] + segment_ids - 1, -1)
    lengths = np.bincount(answer_of[answer_of >= 0], minlength=segments_of.sum())
    return {
        "answer_of": torch.from_numpy(answer_of.astype(np.int64)),
        "answer_lengths": torch.from_numpy(lengths.astype(np.int64)).view(-1, 2),
    }


def _open_rows(path: str) -> _Source:
    from datasets import Dataset

    return _Source(Dataset.from_file(path))


class _Source:
    """Packed rows by index, as numpy straight from Arrow; what a DataLoader needs of a dataset."""

    def __init__(self, dataset: Dataset):
        self.table = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, np.ndarray]]:
        table = self.table[[int(index) for index in indices]]
        columns = {}
        for name in table.column_names:
            array = table.column(name).combine_chunks()
            values = array.flatten().to_numpy(zero_copy_only=False)
            columns[name] = np.split(values, np.cumsum(array.value_lengths().to_numpy())[:-1])
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _batch_indices(
    size: int, batch_size: int, seed: int, start: int, shuffle: bool, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """This rank's part of each global batch of the endless order that `batches` describes, from sample `start` on."""
    epoch, ahead = start // size, np.empty(0, np.int64)
    skip = start % size
    while True:
        while len(ahead) < batch_size * world_size:
            order = np.random.default_rng([seed, epoch]).permutation(size) if shuffle else np.arange(size)
            ahead = np.concatenate([ahead, order[skip:]])
            epoch, skip = epoch + 1, 0
        yield ahead[rank * batch_size : (rank + 1) * batch_size]
        ahead = ahead[batch_size * world_size :]


def _grouped(keys: Iterator, batch_size: int, rank: int, world_size: int) -> Iterator[list]:
    """This rank's part of each global batch of an endless order."""
    while True:
        yield list(itertools.islice(keys, batch_size * world_size))[rank * batch_size : (rank + 1) * batch_size]


def batches(
    dataset: Dataset | Mixture,
    batch_size: int,
    *,
    seed: int,
    start_sample: int = 0,
    shuffle: bool = True,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[dict]:
    """An endless stream of batches: epoch after epoch, each in an order that depends on (seed, epoch) alone.

    Global batch k is samples [start + k*B*W, start + (k+1)*B*W) of that order, and rank r takes its B of them. Nothing
    is dropped at the end of an epoch; a run resumed at `start_sample` goes on in the same order on any number of ranks.
    Of Questions a batch is a list.
    """
    from torch import Generator
    from torch.utils.data import DataLoader

    if isinstance(dataset, Questions):
        indices = _batch_indices(len(dataset), batch_size, seed, start_sample, shuffle, rank, world_size)
        return ([dataset[i] for i in chosen] for chosen in indices)
    to_batch = _collate_of(dataset)
    if isinstance(dataset, Mixture):
        source = dataset.reader(_open_rows)
        indices = _grouped(dataset.keys(seed, start_sample, shuffle), batch_size, rank, world_size)
    else:
        source = _Source(dataset)
        indices = _batch_indices(len(dataset), batch_size, seed, start_sample, shuffle, rank, world_size)
    if num_workers == 0:
        return (to_batch(source.__getitems__(chosen)) for chosen in indices)
    # Its own generator: the loader would draw its workers' seed from the global one, and so change the run.
    options = {"num_workers": num_workers, "collate_fn": to_batch, "generator": Generator()}
    return iter(DataLoader(source, batch_sampler=indices, **options))


def validation_batches(dataset: Dataset, batch_size: int) -> Iterator[dict]:
    """Every row once, in order. The last batch is filled up with padding rows: all batches have one shape."""
    source, to_batch = _Source(dataset), _collate_of(dataset)
    for start in range(0, len(dataset), batch_size):
        rows = source.__getitems__(range(start, min(start + batch_size, len(dataset))))
        yield to_batch(rows + [{}] * (batch_size - len(rows)))


def _collate_of(dataset: Dataset | Mixture) -> partial:
    figures = summary(dataset)
    return partial(collate, seq_len=figures["seq_len"], kind=figures["kind"])


def bytes_per_token(tokenizer: ChatTokenizer) -> torch.Tensor:
    """(vocab,) int64: UTF-8 bytes that each token stands for, 0 for markers; what bits per byte divides by."""
    import torch

    sizes = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    for token in tokenizer.marker_ids.values():
        sizes[token] = 0
    return torch.tensor(sizes)
