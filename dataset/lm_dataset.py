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
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from dataset import chat, checks, jsonl, packing
from dataset.jsonl import DataError, read_jsonl
from dataset.packing import END_OF_TEXT

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

__all__ = ["DataError", "batches", "collate", "preference_dataset", "pretrain_dataset", "read_jsonl"]
__all__ += ["reason_dataset", "sft_dataset", "summary", "bytes_per_token", "validation_batches"]

CACHE_DIR = Path(__file__).resolve().parent.parent / "out" / "cache"
FIRST_TEXT_ID = 16  # ids below are markers
IGNORE = -100  # label that the loss leaves out


def default_cache_dir() -> Path:
    """Where tokens are kept: MINIMIND_CACHE, else out/cache if it can be written to, else the user's cache folder, else
    a temporary one."""
    if os.environ.get("MINIMIND_CACHE"):
        return Path(os.environ["MINIMIND_CACHE"]).absolute()
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimind"
    for folder in (CACHE_DIR, user):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir()) / f"minimind-{os.getuid() if hasattr(os, 'getuid') else os.getlogin()}"


def pretrain_dataset(path: str | Path, tokenizer: Tokenizer, seq_len: int, **options) -> Dataset:
    """{"text"} lines -> rows of seq_len + 1 tokens (column input_ids). Options: cache_dir, num_proc, quiet."""
    return _packed_dataset("pretrain", Path(path), tokenizer, seq_len, **options)


def sft_dataset(path: str | Path, tokenizer: Tokenizer, seq_len: int, **options) -> Dataset:
    """{"conversations"} lines -> rows of up to seq_len tokens (columns input_ids, loss_mask, segment_lengths).
    Options: cache_dir, num_proc, quiet."""
    return _packed_dataset("sft", Path(path), tokenizer, seq_len, **options)


def reason_dataset(path: str | Path, tokenizer: Tokenizer, seq_len: int, **options) -> Dataset:
    """As sft_dataset; an answer without "reasoning_content" gets the empty thinking block of thinking switched off."""
    return _packed_dataset("reason", Path(path), tokenizer, seq_len, **options)


def preference_dataset(path: str | Path, tokenizer: Tokenizer, seq_len: int, **options) -> Dataset:
    """{"chosen", "rejected"} lines -> rows as sft_dataset's. A pair is two segments of one row, chosen and rejected, so
    odd segments are chosen and even ones rejected; labels are the tokens of the last answer. Pairs that are longer than
    a row are skipped and counted."""
    return _packed_dataset("preference", Path(path), tokenizer, seq_len, **options)


def summary(dataset: Dataset) -> dict:
    """The figures of a packed dataset: kind, seq_len, lines, used, skipped, tokens, labels, rows, fill, seconds, ..."""
    return json.loads(dataset.info.description)


def _packed_dataset(
    kind: str,
    path: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    cache_dir: str | Path = CACHE_DIR,
    num_proc: int | None = None,
    quiet: bool = False,
) -> Dataset:
    from filelock import FileLock, Timeout

    folder = _cache_folder(kind, path, tokenizer, seq_len, Path(cache_dir))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
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
                # Built beside its place and renamed: a killed run leaves no half cache.
                building = Path(f"{folder}.building")
                shutil.rmtree(building, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)
                building.mkdir()
                try:
                    packing.pack_file(kind, path, tokenizer, seq_len, building, num_proc, quiet)
                    os.rename(building, folder)
                finally:
                    shutil.rmtree(building, ignore_errors=True)
                dataset = _open(folder)
        finally:
            lock.release()
    except OSError as error:
        raise DataError(f"{cache_dir}: cannot write the token cache: {error.strerror or error}") from None
    except BrokenExecutor:
        raise DataError(f"{path}: a process that tokenised it was killed; is there enough memory?") from None
    _say(packing.describe(path, summary(dataset), cached), quiet)
    return dataset


def _cache_folder(kind: str, path: Path, tokenizer: Tokenizer, seq_len: int, cache_dir: Path) -> Path:
    """Where the rows of this very file are kept: its identity and all that shapes the rows are in the name."""
    if not 2 <= seq_len <= 1 << 20:
        raise DataError(f"seq_len {seq_len} is out of range: it must be at least 2 and at most {1 << 20}")
    try:
        stat = path.resolve().stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    if not path.is_file():
        raise DataError(f"{path}: not a file; give the path of one JSONL file")
    if stat.st_size == 0:
        raise DataError(f"{path}: the file is empty")
    # The code that renders and packs is part of the key: a changed template must not meet rows of the old one.
    code = [Path(module.__file__).read_text(encoding="utf-8") for module in (chat, checks, jsonl, packing)]
    identity = [kind, seq_len, str(path.resolve()), stat.st_size, stat.st_mtime_ns, tokenizer.to_str(), code]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return cache_dir / f"{kind}-{path.stem[:40]}-{seq_len}-{key}"


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

    input_ids = np.full((len(rows), seq_len), END_OF_TEXT, np.int64)
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
    """
    from torch import Generator
    from torch.utils.data import DataLoader

    source, to_batch = _Source(dataset), _collate_of(dataset)
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


def _collate_of(dataset: Dataset) -> partial:
    figures = summary(dataset)
    return partial(collate, seq_len=figures["seq_len"], kind=figures["kind"])


def bytes_per_token(tokenizer: Tokenizer) -> torch.Tensor:
    """(vocab,) int64: UTF-8 bytes that each token stands for, 0 for markers; what bits per byte divides by."""
    import torch

    # A byte-level token is spelt with one character for each of its bytes.
    sizes = [len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())]
    return torch.tensor([0] * FIRST_TEXT_ID + sizes[FIRST_TEXT_ID:])
