"""Tokenises a JSONL file and packs it into full rows in an Arrow file; streamed, so memory does not grow with the file.

Used by lm_dataset.py, which keeps the result in a cache.
"""

import bisect
import itertools
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset import workers
from dataset.chat import render_chat
from dataset.checks import Fault, conversation_faults, kind_of, preference_faults, printable, text_fault
from dataset.files import DataError, DataFile, with_path
from dataset.jsonl import parse_line
from dataset.mapping import as_ours
from dataset.tokenizer import THINK, ChatTokenizer

THINKING_OFF_ONE_IN = 5
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


class TooLong(ValueError):
    """A pair needs a row of `tokens`."""

    def __init__(self, tokens: int, seq_len: int):
        super().__init__(f"pair longer than a row: {tokens} tokens with both answers, the row has {seq_len}")
        self.tokens = tokens


class Encoded(NamedTuple):
    """What came of some lines."""

    pieces: list[Sample]  # of the rows that can be used
    skipped: list[tuple[int, str, int]]  # of the others: line number, why not, tokens of a pair that is too long
    forms: Counter  # how many rows were read as what, if not as our own


def read_row(kind: str, number: int, line: bytes) -> tuple[dict | None, str, list[Fault]]:
    """A line -> (the row with our keys, None if there is none; what it was read as, "": ours; its faults). This is what
    training sees of a file, and inspect_data.py shows."""
    row, fault = parse_line(number, line)
    if row is None:
        return None, "", [fault]
    try:
        row, form = as_ours(kind, row)
    except ValueError as doubt:
        return None, "", [Fault("error", f"{doubt}")]
    if kind == "pretrain":
        return row, form, [fault] if (fault := text_fault(row)) else []
    return row, form, (preference_faults if kind == "preference" else conversation_faults)(row)


def encode(kind: str, tokenizer: ChatTokenizer, seq_len: int, lines: list[tuple[int, bytes]]) -> Encoded:
    """Lines, each with its number, tokenised."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    texts, pieces, skipped, forms = [], [], [], Counter()
    for number, line in lines:
        row, form, faults = read_row(kind, number, line)
        error = next((fault.text for fault in faults if fault.level == "error"), None)
        tokens = 0
        if error is None and kind == "pretrain":
            texts.append(row["text"])
        elif error is None:
            try:
                if kind == "preference":
                    pieces.append(_pair(tokenizer, row, seq_len, dtype))
                else:
                    # So that thinking can be switched off where some rows think, a share of the others shows it.
                    off = number % THINKING_OFF_ONE_IN == 0 and THINK in tokenizer.marker_ids
                    ids, mask = render_chat(tokenizer, row["conversations"], thinking_off=off)
                    pieces.append(Sample(np.array(ids, dtype), np.array(mask, bool)))
            except ValueError as refused:
                error, tokens = f"{refused}", getattr(refused, "tokens", 0)
        if error is not None:
            skipped.append((number, error, tokens))
        elif form:
            forms[form] += 1
    if kind == "pretrain":
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        pieces = [Sample(np.array([tokenizer.document_id, *encoding.ids], dtype)) for encoding in encodings]
    return Encoded(pieces, skipped, forms)


def _pair(tokenizer: ChatTokenizer, row: dict, seq_len: int, dtype: type) -> Sample:
    """Both conversations of a preference pair; labels are the last answer alone, not earlier ones in the prompt."""
    sides = [render_chat(tokenizer, row[side]) for side in ("chosen", "rejected")]
    ids = np.concatenate([np.array(ids, dtype) for ids, _ in sides])
    if len(ids) > seq_len:
        raise TooLong(len(ids), seq_len)
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


def _encode_in_worker(lines: list[tuple[int, bytes]]) -> Encoded:
    return encode(*_worker, lines)


def encode_all(kind: str, tokenizer: ChatTokenizer, seq_len: int, chunks: Iterable, num_proc: int) -> Iterator[Encoded]:
    """encode() over all chunks, in order; with several processes only a few chunks are in flight, so RAM stays flat."""
    if num_proc <= 1:
        yield from (encode(kind, tokenizer, seq_len, chunk) for chunk in chunks)
        return
    tasks = ((chunk,) for chunk in chunks)
    for _, encoded in workers.in_order(_encode_in_worker, tasks, num_proc, _start_worker, kind, tokenizer, seq_len):
        yield encoded


def chunks_of(lines: Iterable[tuple[int, bytes]], most: int = CHUNK) -> Iterator[list[tuple[int, bytes]]]:
    chunk, size = [], 0
    for number, line in lines:
        chunk.append((number, line))
        size += len(line) + 64
        if size >= most:
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
    kind: str,
    path: Path,
    folder: Path,
    tokenizer: ChatTokenizer,
    seq_len: int,
    num_proc: int | None,
    quiet: bool,
    identity: dict[str, str],
) -> None:
    """Streams the file into folder/rows.arrow and folder/summary.json, which has `identity` too."""
    started = time.perf_counter()
    size = path.stat().st_size
    if num_proc is None:
        num_proc = min(os.cpu_count() or 1, 16) if size > PARALLEL_FROM else 1
    file = DataFile(path)
    figures = new_figures(kind, seq_len, file, identity)
    progress = FileProgress(f"tokenising {path.name}", size, quiet)

    def lines() -> Iterator[tuple[int, bytes]]:
        for number, line in file.lines():
            figures["lines"] = number
            progress.at(file.position)
            yield number, line

    def encoded() -> Iterator[Sample]:
        for rows, skipped, forms in encode_all(kind, tokenizer, seq_len, chunks_of(lines()), num_proc):
            count(figures, rows, skipped, forms)
            yield from rows

    if kind == "pretrain":
        packed = pack_documents((piece.ids for piece in encoded()), seq_len)
    else:
        packed = pack_pieces(windows_of(encoded(), seq_len, figures), seq_len)
    write_arrow(folder / "rows.arrow", packed, figures)
    progress.end()
    complete_figures(path, figures, time.perf_counter() - started)
    (folder / "summary.json").write_text(json.dumps(figures, ensure_ascii=False), encoding="utf-8")


def new_figures(kind: str, seq_len: int, file: DataFile, identity: dict[str, str]) -> dict[str, Any]:
    figures: dict[str, Any] = identity | {"kind": kind, "seq_len": seq_len, "lines": 0, "used": 0, "skipped": {}}
    figures |= {"file": file.kind, "unit": file.unit, "forms": Counter()}
    return figures | {"tokens": 0, "labels": 0, "continued": 0, "windows": 0, "rows": 0}


def count(figures: dict, rows: list[Sample], skipped: list[tuple[int, str, int]], forms: Counter) -> None:
    """Adds what came of some lines."""
    figures["used"] += len(rows)
    figures["forms"] += forms
    for number, why, tokens in skipped:
        add_reason(figures["skipped"], number, why, tokens)


def windows_of(pieces: Iterable[Sample], seq_len: int, figures: dict) -> Iterator[Sample]:
    """split_conversation() of each piece, counted."""
    for piece in pieces:
        figures["labels"] += int(piece.mask[1:].sum())
        windows = list(split_conversation(piece, seq_len))
        if len(piece.ids) > seq_len:
            figures["continued"] += 1
            figures["windows"] += len(windows)
        yield from windows


def complete_figures(path: Path, figures: dict, seconds: float) -> None:
    """Adds what is known once the whole file is packed. DataError if nothing came of it."""
    if figures["kind"] == "pretrain":
        figures["labels"] = figures["tokens"] = figures["tokens"] - figures["rows"]  # rows share a token
    if not figures["rows"]:
        if not figures["lines"]:
            raise DataError(f"{path}: the file is empty")
        why = with_path("; ".join(reasons(figures["skipped"], figures["unit"])), path, figures["file"])
        raise DataError(f"{path}: none of its {figures['lines']:,} {figures['unit']}s can be used: {why}")
    figures["fill"] = figures["tokens"] / (figures["rows"] * figures["seq_len"])
    figures["seconds"] = round(seconds, 1)


def write_arrow(path: Path, rows: Iterator[dict[str, np.ndarray]], figures: dict) -> None:
    """Counts the rows and their tokens in figures."""
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


def add_reason(skipped: dict, number: int, why: str, tokens: int = 0) -> None:
    """Counts a skipped line under the kind of its fault, with the numbers of the first five and the first fault in
    full. tokens: what a pair that is too long needs."""
    reason = skipped.setdefault(kind_of(why), {"count": 0, "lines": [], "first": why, "needs": {}})
    reason["count"] += 1
    reason["lines"] += [number] if len(reason["lines"]) < 5 else []
    if tokens:
        size = str(1 << (tokens - 1).bit_length())  # a power of two that is enough; a string, as JSON's keys are
        reason["needs"][size] = reason["needs"].get(size, 0) + 1
        reason["most"] = max(reason.get("most", 0), tokens)


def reasons(skipped: dict, unit: str = "line", most: int = 12) -> list[str]:
    """What add_reason() counted, a text for each kind of fault, the most frequent first; of each the first in full."""
    ranked = sorted(skipped.values(), key=lambda reason: -reason["count"])
    texts = []
    for reason in ranked[:most]:
        count, numbers = reason["count"], ", ".join(map(str, reason["lines"]))
        more = ", ..." if count > len(reason["lines"]) else ""
        where = f"{unit} {numbers}" if count == 1 else f"{count:,} {unit}s ({numbers}{more})"
        text = printable(reason["first"], 400)
        texts.append(f"{where}: {text}{_row_needed(reason) if reason['needs'] else ''}")
    if rest := sum(reason["count"] for reason in ranked[most:]):
        texts.append(f"{rest:,} for other reasons (scripts/inspect_data.py lists all)")
    return texts


def _row_needed(reason: dict) -> str:
    """The row that pairs which are too long need."""
    text, total = f"; --max_seq_len {reason['most']} is enough for all of them", 0
    if reason["count"] == 1:
        return f"; --max_seq_len {reason['most']} is enough"
    for size, count in sorted((int(size), count) for size, count in reason["needs"].items()):
        total += count
        if reason["count"] > total >= reason["count"] / 2:
            return f"{text}, {size} for {total:,}"
    return text


def describe(path: Path, figures: dict, place: str) -> str:
    """The figures of a packed dataset: one line, which `place` ends, and one more for each kind of fault."""
    count, unit = figures["lines"] - figures["used"], figures["unit"]
    kind = f" ({', '.join(figures['file'])})" if figures["file"] else ""
    text = f"{path.name}{kind}: {figures['lines']:,} {unit}s, {figures['used']:,} used, {count:,} skipped"
    forms = sorted(figures["forms"].items(), key=lambda form: -form[1])
    text += "".join(
        f"; {number:,} row{'s' * (number > 1)} read as {printable(form, 200)}" for form, number in forms[:4]
    )
    if others := sum(number for _, number in forms[4:]):
        text += f"; {others:,} rows read in {len(forms) - 4} other ways"
    if figures["continued"]:
        text += f"; {figures['continued']:,} longer than a row, continued in {figures['windows']:,} windows"
    text += f"; {figures['tokens']:,} tokens"
    text += f" ({figures['labels']:,} trained)" if figures["kind"] != "pretrain" else ""
    text += f" in {figures['rows']:,} rows of {figures['seq_len']}, {100 * figures['fill']:.1f} % full{place}"
    if not count:
        return text
    line = next(iter(figures["skipped"].values()))["lines"][0]
    stage = {"preference": "dpo"}.get(figures["kind"], figures["kind"])
    options = f"--kind {stage} --max_seq_len {figures['seq_len']} --row {line}"
    see = f"see python scripts/inspect_data.py {shlex.quote(str(path))} {options}"
    skipped = [with_path(f"  skipped {why}", path, figures["file"]) for why in reasons(figures["skipped"], unit)]
    return "\n".join([text, *skipped, f"  {see}"])


class FileProgress:
    """Bytes done of a file, on stderr: one line that is rewritten on a terminal, a line every 10 s in a log."""

    def __init__(self, name: str, total: int, quiet: bool = False):
        self.name, self.total, self.quiet, self.done = name, total, quiet, 0
        self.tty = sys.stderr.isatty()
        self.next = time.monotonic() + 2

    def at(self, position: int) -> None:
        self.done = position
        if not self.quiet and time.monotonic() >= self.next:
            text = f"{self.name}: {100 * self.done / self.total:.0f} % of {self.total / 1e6:.0f} MB"
            print(f"\r{text}" if self.tty else text, file=sys.stderr, end="" if self.tty else "\n", flush=True)
            self.next = time.monotonic() + (0.5 if self.tty else 10)

    def end(self) -> None:
        if self.tty and not self.quiet:
            print("\r\033[K", file=sys.stderr, end="", flush=True)
