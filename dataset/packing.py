"""Tokenises a JSONL file and packs it into full rows in an Arrow file; streamed, so memory does not grow with the file.

Used by lm_dataset.py, which keeps the result in a cache.
"""

import bisect
import itertools
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from dataset.chat import render_chat
from dataset.checks import Fault, conversation_faults, kind_of, preference_faults, text_fault
from dataset.jsonl import DataError, parse_line, read_lines
from dataset.tokenizer import ChatTokenizer

PADDING = 0  # the id in what a row does not fill: no label is there, and nothing attends to it
CHUNK = 1 << 20  # bytes of lines that are tokenised together
PARALLEL_FROM = 4 << 20  # files above this size are tokenised by several processes
PACK_BUFFER = 2000  # conversations among which the best-fitting one is looked for


@dataclass
class Sample:
    """What must stay together in one row: a conversation, or a preference pair as two segments, chosen and rejected."""

    ids: np.ndarray
    mask: np.ndarray | None = None  # bool, True = a label; None: plain text
    lengths: list[int] | None = None  # of its segments; None: it is one


def _encode(
    kind: str, tokenizer: ChatTokenizer, seq_len: int, lines: list[tuple[int, bytes]]
) -> tuple[list[Sample], list[tuple[int, str]]]:
    """Lines -> (the rows that can be used, [(line number, why not)] of the others)."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    faults_of = {"pretrain": lambda row: [text_fault(row)], "preference": preference_faults}
    texts, pieces, skipped = [], [], []
    for number, line in lines:
        row, fault = parse_line(number, line)
        faults = [fault] if row is None else faults_of.get(kind, conversation_faults)(row)
        error = next((fault for fault in faults if fault and fault.level == "error"), None)
        if error is None and kind == "pretrain":
            texts.append(row["text"])
        elif error is None:
            try:
                if kind == "preference":
                    pieces.append(_pair(tokenizer, row, seq_len, dtype))
                else:
                    ids, mask = render_chat(tokenizer, row["conversations"], thinking_off=kind == "reason")
                    pieces.append(Sample(np.array(ids, dtype), np.array(mask, bool)))
            except ValueError as refused:
                error = Fault("error", f"{refused}")
        if error is not None:
            skipped.append((number, error.text))
    if kind == "pretrain":
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        pieces = [Sample(np.array([tokenizer.document_id, *encoding.ids], dtype)) for encoding in encodings]
    return pieces, skipped


def _pair(tokenizer: ChatTokenizer, row: dict, seq_len: int, dtype: type) -> Sample:
    """Both conversations of a preference pair; labels are the last answer alone, not earlier ones in the prompt."""
    sides = [render_chat(tokenizer, row[side]) for side in ("chosen", "rejected")]
    ids = np.concatenate([np.array(ids, dtype) for ids, _ in sides])
    if len(ids) > seq_len:
        raise ValueError(f"pair longer than a row: {len(ids)} tokens with both answers; raise --max_seq_len")
    mask = np.concatenate([_last_answer(np.array(mask, bool)) for _, mask in sides])
    return Sample(ids, mask, [len(ids) for ids, _ in sides])


def _last_answer(mask: np.ndarray) -> np.ndarray:
    """The mask of a conversation without the answers before the last one."""
    (trained,) = mask.nonzero()
    gaps = (np.diff(trained) > 1).nonzero()[0]
    begin = trained[gaps[-1] + 1] if len(gaps) else 0
    return mask & (np.arange(len(mask)) >= begin)


def _start_worker(kind: str, tokenizer: ChatTokenizer, seq_len: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    _worker = (kind, tokenizer, seq_len)
    # A worker must not outlive a killed parent: its queue never tells it.
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@contextmanager
def _hidden_script() -> Iterator[None]:
    """A process that is spawned imports the script that runs, for what it may define: torch and all, three seconds and
    300 MB for each worker, which needs none of it. It does not where the script's path is not known."""
    script = vars(sys.modules["__main__"])
    hidden = {name: script[name] for name in ("__spec__", "__file__") if name in script}
    script.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        script.update(hidden)


def _encode_in_worker(lines: list[tuple[int, bytes]]) -> tuple[list, list]:
    return _encode(*_worker, lines)


def _encode_all(
    kind: str, tokenizer: ChatTokenizer, seq_len: int, chunks: Iterable, num_proc: int
) -> Iterator[tuple[list, list]]:
    """_encode over all chunks, in order; with several processes only a few chunks are in flight, so RAM stays flat."""
    if num_proc <= 1:
        yield from (_encode(kind, tokenizer, seq_len, chunk) for chunk in chunks)
        return
    options = (get_context("spawn"), _start_worker, (kind, tokenizer, seq_len))
    with ProcessPoolExecutor(num_proc, *options) as pool:
        waiting: deque = deque()
        for chunk in chunks:
            with _hidden_script():
                waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def chunks_of(lines: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    chunk, size = [], 0
    for number, line in lines:
        chunk.append((number, line))
        size += len(line) + 64
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def pack_documents(documents: Iterable[np.ndarray], seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """One stream of tokens cut to rows of seq_len + 1 that share one token, so every token but the first is a label."""
    parts: list[np.ndarray] = []
    size = 0
    for ids in documents:
        parts.append(ids)
        size += len(ids)
        if size > seq_len:
            stream = np.concatenate(parts)
            cut = (size - 1) // seq_len * seq_len
            for start in range(0, cut, seq_len):
                yield {"input_ids": stream[start : start + seq_len + 1]}
            parts, size = [stream[cut:]], size - cut
    if size > 1:
        yield {"input_ids": np.concatenate(parts)}


def split_conversation(piece: Sample, seq_len: int) -> Iterator[Sample]:
    """Windows of at most seq_len tokens; each repeats the last seq_len // 2 tokens of the one before, masked, as
    context. So every label is trained exactly once. Windows without a label are left out."""
    repeat = seq_len // 2
    for start in range(0, max(len(piece.ids) - repeat, 1), seq_len - repeat):
        window, labels = piece.ids[start : start + seq_len], piece.mask[start : start + seq_len].copy()
        if start:
            labels[:repeat] = False
        if labels.any():
            yield Sample(window, labels, piece.lengths)


def pack_pieces(pieces: Iterable[Sample], seq_len: int) -> Iterator[dict]:
    """Best fit: a row begins with the longest of the buffer and adds the longest that still fits, till none does."""
    buffer: list[tuple[int, int]] = []  # (length, serial number), sorted
    stored: dict[int, Sample] = {}

    def next_row() -> dict:
        space, chosen = seq_len, []
        while (at := bisect.bisect_right(buffer, (space, sys.maxsize))) > 0:
            length, serial = buffer.pop(at - 1)
            chosen.append(stored.pop(serial))
            space -= length
        lengths = [length for piece in chosen for length in piece.lengths or [len(piece.ids)]]
        return {
            "input_ids": np.concatenate([piece.ids for piece in chosen]),
            "loss_mask": np.concatenate([piece.mask for piece in chosen]),
            "segment_lengths": np.array(lengths, np.uint32),
        }

    for serial, piece in enumerate(pieces):
        stored[serial] = piece
        bisect.insort(buffer, (len(piece.ids), serial))
        if len(buffer) >= PACK_BUFFER:
            yield next_row()
    while buffer:
        yield next_row()


def pack_file(
    kind: str, path: Path, tokenizer: ChatTokenizer, seq_len: int, folder: Path, num_proc: int | None, quiet: bool
) -> None:
    """Streams the file into folder/rows.arrow and folder/summary.json."""
    started = time.perf_counter()
    size = path.stat().st_size
    if num_proc is None:
        num_proc = min(os.cpu_count() or 1, 16) if size > PARALLEL_FROM else 1
    figures: dict[str, Any] = {"kind": kind, "seq_len": seq_len, "lines": 0, "used": 0, "skipped": {}}
    figures |= {"tokens": 0, "labels": 0, "continued": 0, "windows": 0, "rows": 0}
    progress = FileProgress(f"tokenising {path.name}", size, quiet)

    def lines() -> Iterator[tuple[int, bytes]]:
        for number, line in read_lines(path):
            figures["lines"] = number
            progress.add(len(line))
            yield number, line

    def encoded() -> Iterator[Sample]:
        for rows, skipped in _encode_all(kind, tokenizer, seq_len, chunks_of(lines()), num_proc):
            figures["used"] += len(rows)
            for number, why in skipped:
                add_reason(figures["skipped"], number, why)
            yield from rows

    def pieces() -> Iterator[Sample]:
        for piece in encoded():
            figures["labels"] += int(piece.mask[1:].sum())
            windows = list(split_conversation(piece, seq_len))
            if len(piece.ids) > seq_len:
                figures["continued"] += 1
                figures["windows"] += len(windows)
            yield from windows

    if kind == "pretrain":
        packed = pack_documents((piece.ids for piece in encoded()), seq_len)
    else:
        packed = pack_pieces(pieces(), seq_len)
    _write_arrow(folder / "rows.arrow", packed, figures)
    progress.end()
    if kind == "pretrain":
        figures["labels"] = figures["tokens"] = figures["tokens"] - figures["rows"]  # rows share a token
    if not figures["rows"]:
        raise DataError(f"{path}: none of its {figures['lines']} lines can be used: {reasons(figures['skipped'])}")
    figures["fill"] = figures["tokens"] / (figures["rows"] * seq_len)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "summary.json").write_text(json.dumps(figures, ensure_ascii=False), encoding="utf-8")


def _write_arrow(path: Path, rows: Iterator[dict[str, np.ndarray]], figures: dict) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file:
        writer = None
        while batch := list(itertools.islice(rows, 256)):
            columns = {}
            for name in batch[0]:
                offsets = np.cumsum([0, *(len(row[name]) for row in batch)], dtype=np.int32)
                values = pa.array(np.concatenate([row[name] for row in batch]))
                columns[name] = pa.ListArray.from_arrays(pa.array(offsets), values)
            record = pa.RecordBatch.from_pydict(columns)
            writer = writer or pa.ipc.new_stream(file, record.schema)
            writer.write_batch(record)
            figures["rows"] += len(batch)
            figures["tokens"] += sum(len(row["input_ids"]) for row in batch)
        if writer:
            writer.close()


def add_reason(skipped: dict, number: int, why: str) -> None:
    """Counts a skipped line under the kind of its fault, with the numbers of the first five."""
    reason = skipped.setdefault(kind_of(why), {"count": 0, "lines": []})
    reason["count"] += 1
    reason["lines"] += [number] if len(reason["lines"]) < 5 else []


def reasons(skipped: dict, most: int = 6) -> str:
    """What add_reason() counted, in one line, the most frequent first."""

    def lines(reason: dict) -> str:
        more = ", ..." if reason["count"] > len(reason["lines"]) else ""
        return ("lines " if reason["count"] > 1 else "line ") + ", ".join(map(str, reason["lines"])) + more

    ranked = sorted(skipped.items(), key=lambda item: -item[1]["count"])
    parts = [f"{reason['count']:,} {why} ({lines(reason)})" for why, reason in ranked[:most]]
    if rest := sum(reason["count"] for _, reason in ranked[most:]):
        parts.append(f"{rest:,} for other reasons (scripts/inspect_data.py lists all)")
    return "; ".join(parts)


def describe(path: Path, figures: dict, cached: bool) -> str:
    """The figures of a packed dataset in one line."""
    count = figures["lines"] - figures["used"]
    text = f"{path.name}: {figures['lines']:,} lines, {figures['used']:,} used, {count:,} skipped"
    if count:
        line = next(iter(figures["skipped"].values()))["lines"][0]
        text += f" [{reasons(figures['skipped'])}; see python scripts/inspect_data.py {path} --row {line}]"
    if figures["continued"]:
        text += f"; {figures['continued']:,} longer than a row, continued in {figures['windows']:,} windows"
    text += f"; {figures['tokens']:,} tokens"
    text += f" ({figures['labels']:,} trained)" if figures["kind"] != "pretrain" else ""
    text += f" in {figures['rows']:,} rows of {figures['seq_len']}, {100 * figures['fill']:.1f} % full"
    return text + ("; cached" if cached else f"; {figures['seconds']} s")


class FileProgress:
    """Bytes done of a file, on stderr: one line that is rewritten on a terminal, a line every 10 s in a log."""

    def __init__(self, name: str, total: int, quiet: bool = False):
        self.name, self.total, self.quiet, self.done = name, total, quiet, 0
        self.tty = sys.stderr.isatty()
        self.next = time.monotonic() + 2

    def add(self, count: int) -> None:
        self.done += count
        if not self.quiet and time.monotonic() >= self.next:
            text = f"{self.name}: {100 * self.done / self.total:.0f} % of {self.total / 1e6:.0f} MB"
            print(f"\r{text}" if self.tty else text, file=sys.stderr, end="" if self.tty else "\n", flush=True)
            self.next = time.monotonic() + (0.5 if self.tty else 10)

    def end(self) -> None:
        if self.tty and not self.quiet:
            print("\r\033[K", file=sys.stderr, end="", flush=True)
