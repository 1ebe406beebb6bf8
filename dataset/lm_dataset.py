"""JSONL files -> tokens packed into full rows (memory-mapped, built once, cached) -> batches.

rows = pretrain_dataset("dataset/starter_data/pretrain.jsonl", load_tokenizer(), seq_len=512)
for batch in batches(rows, batch_size=8, seed=0): ...
"""

from __future__ import annotations  # torch and datasets are imported where they are used: `--help` stays quick

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset import cache, files, packing
from dataset.cache import content_hash, default_cache_dir
from dataset.jsonl import DataError, read_jsonl
from dataset.packing import PADDING
from dataset.questions import Questions, read_questions
from dataset.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

__all__ = ["DataError", "batches", "collate", "preference_dataset", "pretrain_dataset", "read_jsonl"]
__all__ += ["content_hash", "default_cache_dir"]
__all__ += ["question_dataset", "reason_dataset", "sft_dataset", "summary", "bytes_per_token", "validation_batches"]

# The files whose code shapes the rows.
RENDERING = ("chat", "template", "tokenizer", "checks", "files", "jsonl", "mapping", "packing")
IGNORE = -100  # label that the loss leaves out


def pretrain_dataset(path: str | Path, tokenizer: ChatTokenizer, seq_len: int, **options) -> Dataset:
    """{"text"} lines -> rows of seq_len + 1 tokens (column input_ids). Options: cache_dir, num_proc, quiet."""
    return _packed_dataset("pretrain", Path(path), tokenizer, seq_len, **options)


def sft_dataset(path: str | Path, tokenizer: ChatTokenizer, seq_len: int, **options) -> Dataset:
    """{"conversations"} lines -> rows of up to seq_len tokens (columns input_ids, loss_mask, segment_lengths).
    Options: cache_dir, num_proc, quiet."""
    return _packed_dataset("sft", Path(path), tokenizer, seq_len, **options)


def reason_dataset(path: str | Path, tokenizer: ChatTokenizer, seq_len: int, **options) -> Dataset:
    """As sft_dataset; an answer without "reasoning_content" gets the empty thinking block of thinking switched off."""
    return _packed_dataset("reason", Path(path), tokenizer, seq_len, **options)


def preference_dataset(path: str | Path, tokenizer: ChatTokenizer, seq_len: int, **options) -> Dataset:
    """{"chosen", "rejected"} lines -> rows as sft_dataset's. A pair is two segments of one row, chosen and rejected, so
    odd segments are chosen and even ones rejected; labels are the tokens of the last answer. Pairs that are longer than
    a row are skipped and counted."""
    return _packed_dataset("preference", Path(path), tokenizer, seq_len, **options)


def question_dataset(path: str | Path, tokenizer: ChatTokenizer, seq_len: int, quiet: bool = False, **options):
    """Questions with an answer to check against (dataset/questions.py), for reinforcement learning."""
    return read_questions(path, quiet)


def summary(dataset: Dataset | Questions) -> dict:
    """The figures of a packed dataset: kind, seq_len, lines, used, skipped, tokens, labels, rows, fill, seconds, ...;
    of questions the hash of their file."""
    if isinstance(dataset, Questions):
        return {"sha256": dataset.sha256}
    return json.loads(dataset.info.description)


def _packed_dataset(
    kind: str,
    path: Path,
    tokenizer: ChatTokenizer,
    seq_len: int,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
    quiet: bool = False,
) -> Dataset:
    from filelock import FileLock, Timeout

    _check(path, seq_len)
    cache_dir = Path(cache_dir or default_cache_dir())
    try:
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
                _build(folder, kind, path, tokenizer, seq_len, num_proc, quiet, {"sha256": digest})
                if _version(path) != version:
                    shutil.rmtree(folder)
                    raise DataError(f"{path}: the file was changed while it was read; run again when it is whole")
                dataset = _open(folder)
            os.utime(folder)  # used just now: trim() begins with those that were used longest ago
        finally:
            lock.release()
        place = "" if cached or quiet else _tell_place(cache_dir, folder)
    except OSError as error:
        remedy = "set MINIMIND_CACHE to a folder that can be written"
        raise DataError(f"{cache_dir}: cannot write the token cache: {error.strerror or error}; {remedy}") from None
    except BrokenExecutor:
        raise DataError(f"{path}: a process that tokenised it was killed; is there enough memory?") from None
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


def _tell_place(cache_dir: Path, folder: Path) -> str:
    """Where the cache is and what it holds, in words, once it is within its limit."""
    total, removed = cache.trim(cache_dir, folder, cache.largest_cache())
    own, total, gone = (f"{size / 1e6:,.1f} MB" for size in (cache.folder_size(folder), total, sum(removed)))
    text = f"; kept in {cache_dir} ({own}; {total} with all that is there)"
    if removed:
        text += f"; removed {gone} that were used longest ago (more than MINIMIND_CACHE_GB, or 20)"
    if cache_dir == cache.temporary_cache_dir():
        text += ", a temporary folder, for no other can be written: set MINIMIND_CACHE to keep it"
    return text


def _cache_folder(kind: str, digest: str, tokenizer: ChatTokenizer, seq_len: int, cache_dir: Path) -> Path:
    """Where the rows of a file with this content are kept: all that shapes the rows is in the name."""
    # The code that renders and packs is part of the key: a changed template must not meet rows of the old one.
    code = [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in RENDERING]
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


def batches(
    dataset: Dataset,
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

    indices = _batch_indices(len(dataset), batch_size, seed, start_sample, shuffle, rank, world_size)
    if isinstance(dataset, Questions):
        return ([dataset[i] for i in chosen] for chosen in indices)
    source, to_batch = _Source(dataset), _collate_of(dataset)
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


def _collate_of(dataset: Dataset) -> partial:
    figures = summary(dataset)
    return partial(collate, seq_len=figures["seq_len"], kind=figures["kind"])


def bytes_per_token(tokenizer: ChatTokenizer) -> torch.Tensor:
    """(vocab,) int64: UTF-8 bytes that each token stands for, 0 for markers; what bits per byte divides by."""
    import torch

    sizes = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    for token in tokenizer.marker_ids.values():
        sizes[token] = 0
    return torch.tensor(sizes)
