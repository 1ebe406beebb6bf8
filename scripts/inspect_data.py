"""Statistics and faults of a JSONL data file, or one of its rows token by token with its labels.

python scripts/inspect_data.py dataset/starter_data/sft.jsonl
python scripts/inspect_data.py dataset/starter_data/sft.jsonl --row 3
"""

import itertools
import json
import os
import re
import shutil
import sys
import textwrap
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import _path  # noqa: F401
import numpy as np

from cli import ArgumentParser, prepare_terminal
from dataset import checks, cleaning, jsonl, packing
from dataset.chat import render_chat
from dataset.checks import Fault
from dataset.jsonl import DataError
from dataset.packing import Sample
from dataset.tokenizer import TOKENIZER_DIR, load_tokenizer

KEYS = {"text": "pretrain", "conversations": "sft", "chosen": "dpo", "rejected": "dpo"}
PARTS = {"sft": ("conversations",), "dpo": ("chosen", "rejected")}
PAIR = re.compile(r"(?<=: )of line \d+")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="JSONL file: pretraining text, conversations or preference pairs")
    parser.add_argument("--kind", choices=["auto", "pretrain", "sft", "dpo"], default="auto", help="format of the rows")
    parser.add_argument("--row", type=int, metavar="N", help="show line N token by token")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER_DIR, metavar="DIR", help="default: model/tokenizer")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens in a training row (default 512)")
    parser.add_argument("--all", action="store_true", help="print every line number, also of faults in very many lines")
    args = parser.parse_args()
    if args.seq_len < 2:
        parser.error(f"--seq_len {args.seq_len}: must be at least 2")
    if args.row is not None and args.row < 1:
        parser.error(f"--row {args.row}: lines are counted from 1")
    prepare_terminal()
    try:
        if not args.file.is_file():
            raise DataError(f"{args.file}: {'not a file' if args.file.exists() else 'no such file'}; check the path")
        if args.file.stat().st_size == 0:
            raise DataError(f"{args.file}: the file is empty")
        tokenizer = load_tokenizer(args.tokenizer)
        kind = guess_kind(args.file) if args.kind == "auto" else args.kind
        if args.row is not None:
            show_row(args.file, kind, args.row, tokenizer, args.seq_len)
        else:
            Report(args.file, kind, tokenizer, args.seq_len).print(args.all)
        sys.stdout.flush()
    except (DataError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        sys.exit(f"error: {error}")


def guess_kind(path: Path) -> str:
    """The format that most of the first rows have."""
    votes: Counter = Counter()
    for _, row, _ in itertools.islice(jsonl.read_jsonl(path), 200):
        votes.update({KEYS[key] for key in row or () if key in KEYS})
    if not votes:
        keys = ", ".join(f'"{key}"' for key in KEYS)
        raise DataError(f"{path}: none of the first lines has one of the keys {keys}; name the format with --kind")
    return votes.most_common(1)[0][0]


def messages_of(row: dict, kind: str) -> list[dict]:
    """The messages of a row that may be faulty; a DPO row's prompt counts once."""
    parts = [part for key in PARTS[kind] if isinstance(part := row.get(key), list)]
    parts[1:] = [part[-1:] for part in parts[1:]]
    return [message for part in parts for message in part if isinstance(message, dict)]


def row_faults(row: dict, kind: str) -> list[Fault]:
    """Errors (training skips the row) and warnings (it is kept) of one row by itself."""
    if kind == "pretrain":
        error = checks.text_fault(row)
        return [error] if error else cleaning.text_warnings(row["text"])
    found = checks.conversation_faults(row) if kind == "sft" else checks.preference_faults(row)
    messages = messages_of(row, kind)
    for n, message in enumerate(messages, 1):
        for field in ("content", "reasoning_content"):
            if isinstance(text := message.get(field), str):
                for level, what in cleaning.text_warnings(text, chat=True):
                    found.append(Fault(level, f"{what}, in {field} of message {n}"))
    if len(messages) > 100:
        found.append(Fault("warning", f"very many messages: {len(messages)}"))
    return found


class Report:
    """Reads the file once, in memory that grows by some bytes a row, and prints what it found."""

    def __init__(self, path: Path, kind: str, tokenizer, seq_len: int):
        self.path, self.kind, self.tokenizer, self.seq_len = path, kind, tokenizer, seq_len
        self.faults: dict[tuple[str, str], list[tuple[int, str]]] = {}
        self.lines = self.used = self.warned = 0
        self.characters, self.tokens, self.turns = array("I"), array("I"), array("I")
        self.languages, self.roles, self.features = Counter(), Counter(), Counter()
        self.trained = self.continued = self.windows = 0
        self.notes: dict[str, list[int]] = {}
        self.duplicates = cleaning.Duplicates()
        self.progress = packing.FileProgress(f"reading {path.name}", path.stat().st_size)
        rows = packed_tokens = 0
        for packed in self._packed():
            rows += 1
            packed_tokens += len(packed["input_ids"]) - (kind == "pretrain")
        self.progress.end()
        self.rows, self.fill = rows, packed_tokens / max(rows * seq_len, 1)

    def _packed(self) -> Iterator[dict]:
        if self.kind == "pretrain":
            return packing.pack_documents((piece.ids for piece in self._encoded()), self.seq_len)
        return packing.pack_pieces(self._windows(), self.seq_len)

    def _windows(self) -> Iterator[Sample]:
        for piece in self._encoded():
            windows = list(packing.split_conversation(piece, self.seq_len))
            self.continued += len(piece.ids) > self.seq_len
            self.windows += len(windows) if len(piece.ids) > self.seq_len else 0
            self.trained += int(piece.mask.sum())
            yield from windows

    def _encoded(self) -> Iterator[Sample]:
        """Checks, counts and tokenises every line."""
        for chunk in packing.chunks_of(jsonl.read_lines(self.path)):
            texts = []
            for number, line in chunk:
                self.progress.add(len(line))
                row = self._check(number, line)
                if row is None:
                    continue
                self.used += 1
                if self.kind == "pretrain":
                    texts.append(row["text"])
                    continue
                for part in PARTS[self.kind]:
                    ids, mask = render_chat(self.tokenizer, row[part])
                    self.tokens.append(len(ids))
                    yield Sample(np.array(ids, np.uint32), np.array(mask, bool))
            for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                self.tokens.append(len(encoding))
                yield Sample(np.array([self.tokenizer.document_id, *encoding.ids]))

    def _check(self, number: int, line: bytes) -> dict | None:
        """Files the faults of a line and counts what it holds; returns the row if training would use it."""
        self.lines = number
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            self.notes.setdefault("byte order mark before the first line", []).append(number)
        if line.endswith(b"\r\n"):
            self.notes.setdefault("line ends with CR LF", []).append(number)
        if not line.endswith(b"\n"):
            self.notes.setdefault("no newline at the end of the file", []).append(number)
        row, fault = jsonl.parse_line(number, line)
        found = [fault] if row is None else row_faults(row, self.kind)
        usable = not any(fault.level == "error" for fault in found)
        if usable:
            text, same = row.get("text"), None
            if self.kind != "pretrain":
                messages = messages_of(row, self.kind)
                text = "\n".join(message.get("content") or "" for message in messages)
                same = json.dumps(messages, ensure_ascii=False, sort_keys=True)
                self._count_messages(messages)
            self.characters.append(len(text))
            share = cleaning.cjk_share(text)
            self.languages["Chinese" if share >= 0.5 else "mixed" if share >= 0.05 else "other"] += 1
            if duplicate := self.duplicates.check(number, text, same):
                found.append(duplicate)
            self.warned += bool(found)
        for level, text in found:
            kind = checks.kind_of(text)
            self.faults.setdefault((level, kind), []).append((number, text))
        return row if usable else None

    def _count_messages(self, messages: list[dict]) -> None:
        self.turns.append(len(messages))
        self.roles.update(message["role"] for message in messages)
        self.features["tools"] += any(message.get("tools") for message in messages)
        self.features["tool calls"] += any(message.get("tool_calls") for message in messages)
        self.features["reasoning"] += any(message.get("reasoning_content") for message in messages)

    def print(self, everything: bool) -> None:
        size = self.path.stat().st_size
        print(f"{self.path}: {self.kind}, {size:,} bytes, {self.lines:,} lines")
        print(f"  used by training   {self.used:,} rows, {self.warned:,} of them with warnings")
        print(f"  skipped            {self.lines - self.used:,} lines with errors")
        if self.used:
            self._print_figures()
        for note, lines in self.notes.items():
            print(f"  note               {note}: {_numbers([str(line) for line in lines], everything)}")
        for level, title in (
            ("error", "Errors: training skips the row"),
            ("warning", "Warnings: training keeps the row"),
        ):
            groups = {kind: entries for (of, kind), entries in self.faults.items() if of == level}
            print(f"\n{title}" if groups else f"\nNo {level}s.")
            for kind, entries in sorted(groups.items(), key=lambda group: -len(group[1])):
                self._print_group(kind, entries, everything)
        if self.duplicates.index is None:
            print("\nNear duplicates were not searched: that needs `pip install datasketch`.")
        elif self.used > cleaning.MOST_NEAR:
            print(f"\nNear duplicates were searched among the first {cleaning.MOST_NEAR:,} rows only.")

    def _print_figures(self) -> None:
        total = sum(self.languages.values())
        shares = ", ".join(f"{count:,} {name} ({count / total:.0%})" for name, count in self.languages.most_common())
        print(f"  languages          {shares}; Chinese: at least half of the words, mixed: 5 to 50 %")
        for name, values in (("characters", self.characters), ("tokens", self.tokens), ("messages", self.turns)):
            if values:
                figures = np.asarray(values)
                low, middle, high = np.quantile(figures, [0, 0.5, 0.95], method="nearest")
                text = (
                    f"{figures.sum():,}; per row: min {low:,}, median {middle:,}, 95 % {high:,}, max {figures.max():,}"
                )
                print(f"  {name:<18} {text}")
        if self.roles:
            print("  roles              " + ", ".join(f"{count:,} {role}" for role, count in self.roles.most_common()))
            print("  rows with          " + ", ".join(f"{name} {count:,}" for name, count in self.features.items()))
            print(f"  trained tokens     {self.trained:,} ({self.trained / sum(self.tokens):.1%})")
        if self.kind == "dpo":
            long = sum(tokens > self.seq_len for tokens in self.tokens)
            print(f"  longer than {self.seq_len:<7}{long:,} of {len(self.tokens):,} answers with their prompt")
        else:
            print(f"  packed             {self.rows:,} rows of {self.seq_len} tokens, {self.fill:.1%} full")
        if self.kind == "sft":
            print(f"  continued          {self.continued:,} longer than a row, in {self.windows:,} windows; none cut")

    def _print_group(self, kind: str, entries: list[tuple[int, str]], everything: bool) -> None:
        pairs = {line: PAIR.search(text) for line, text in entries}  # a line once, with the line that it repeats
        numbers = [f"{line} ({pair[0]})" if pair else str(line) for line, pair in pairs.items()]
        print(f"  {kind}: {len(numbers):,} {'line' if len(numbers) == 1 else 'lines'}")
        print(textwrap.indent(_numbers(numbers, everything), "      "))
        if any(pairs.values()):
            return
        line, text = entries[0]
        if text != kind:
            print(f"      e.g. line {line}: {_printable(text)}")


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _numbers(numbers: list[str], everything: bool, most: int = 200) -> str:
    more = f" ... and {len(numbers) - most:,} more (--all)" if len(numbers) > most and not everything else ""
    width = max(shutil.get_terminal_size().columns - 6, 40)
    return textwrap.fill(", ".join(numbers if everything else numbers[:most]) + more, width)


def show_row(path: Path, kind: str, number: int, tokenizer, seq_len: int) -> None:
    """Prints one row: its faults, then every token with its id and whether it is a label (something to learn)."""
    last, line = 0, b""
    for last, line in jsonl.read_lines(path):  # noqa: B007
        if last == number:
            break
    if last != number:
        raise DataError(f"{path}: there is no line {number}, the last one is {last}")
    row, fault = jsonl.parse_line(number, line)
    found = [fault] if row is None else row_faults(row, kind)
    print(f"{path}, line {number}: {kind}, {len(line):,} bytes")
    for level, text in found:
        print(f"  {level}: {_printable(text)}")
    if any(level == "error" for level, _ in found):
        print("  Training skips this row.")
        return
    if kind == "pretrain":
        ids = [tokenizer.document_id, *tokenizer.encode(row["text"], add_special_tokens=False).ids]
        # The marker ends the document before, so it is a label too, but for the first one of the file.
        show_tokens("text", ids, [int(number > 1), *[1] * (len(ids) - 1)], tokenizer, seq_len)
        return
    for part in PARTS[kind]:
        show_tokens(part, *render_chat(tokenizer, row[part]), tokenizer, seq_len)


def show_tokens(name: str, ids: list[int], mask: list[int], tokenizer, seq_len: int) -> None:
    long = f"; longer than seq_len {seq_len}: goes on in the next row" if len(ids) > seq_len else ""
    print(f"\n{name}: {len(ids):,} tokens, {sum(mask):,} of them labels (*){long}")
    print(f"{'place':>7} {'id':>6}   text")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for place, (token_id, label) in enumerate(zip(ids, mask, strict=True)):
        text = f"{place:>7} {token_id:>6} {'*' if label else ' '} {visible(tokenizer, token_id)}"
        print(f"\033[32m{text}\033[0m" if colour and label else f"\033[2m{text}\033[0m" if colour else text)


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, backwards (GPT-2's table: printable bytes stand for
    themselves, the others for the characters from U+0100 on)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = byte_alphabet()


def visible(tokenizer, token_id: int) -> str:
    """A token in quotes with control characters escaped; bytes that are only a part of a character as \\x."""
    token = tokenizer.id_to_token(token_id) or ""
    if token_id < 16 or any(char not in BYTES for char in token):
        return token
    data = bytes(BYTES[char] for char in token)
    try:
        return repr(data.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(data)[1:]


if __name__ == "__main__":
    main()
