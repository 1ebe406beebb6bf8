"""Statistics and faults of a data file, or one of its rows token by token with its labels, as training reads them.

python scripts/inspect_data.py dataset/starter_data/sft.jsonl
python scripts/inspect_data.py dataset/starter_data/sft.jsonl --row 3
"""

import json
import os
import re
import shutil
import sys
import textwrap
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import _path  # noqa: F401
import numpy as np

from cli import ArgumentParser, prepare_terminal
from dataset import checks, clean_rows, cleaning, dedup, packing
from dataset.chat import render_chat
from dataset.checks import Fault, printable
from dataset.files import DataError, DataFile, with_path
from dataset.ngrams import units_of
from dataset.overlap import QuestionGrams, texts_of_file
from dataset.packing import Sample
from dataset.tables import STAGES, data_files, guess_kind
from dataset.tokenizer import TOKENIZER_DIR, load_tokenizer

PARTS = {"sft": ("conversations",), "dpo": ("chosen", "rejected")}
COPIES = {
    "exact": "exact duplicate: {of}",
    "normalised": "same text but for blanks, case or width: {of}",
    "near": "near duplicate: {of}, {share:.0%} alike",
}
PAIR = re.compile(r"(?<=: )of line \d+")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="pretraining text, conversations or preference pairs, as JSONL or JSON")
    parser.add_argument("--kind", choices=["auto", "pretrain", "sft", "dpo"], default="auto", help="format of the rows")
    parser.add_argument("--row", type=int, metavar="N", help="show line N (of an array: row N)")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER_DIR, metavar="DIR", help="default: model/tokenizer")
    seq_len = "tokens in a training row: what you give to training (default 512)"
    parser.add_argument("--seq_len", "--max_seq_len", type=int, default=512, help=seq_len)
    parser.add_argument("--questions", nargs="+", default=[], metavar="FILE", help="benchmarks: show the rows that "
                        "hold one of their questions (13 words in a row, or Chinese characters)")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="print every line number, also of faults in very many lines")
    args = parser.parse_args()
    if args.seq_len < 2:
        parser.error(f"--seq_len {args.seq_len}: must be at least 2")
    if args.row is not None and args.row < 1:
        parser.error(f"--row {args.row}: lines are counted from 1")
    prepare_terminal()
    try:
        file = DataFile(args.file)
        if not next(file.lines(), None):
            raise DataError(f"{args.file}: the file is empty")
        tokenizer = load_tokenizer(args.tokenizer)
        kind = guess_kind(file.path, file.lines(), file.unit) if args.kind == "auto" else args.kind
        if args.row is not None:
            show_row(file, kind, args.row, tokenizer, args.seq_len)
        else:
            questions = [text for path in data_files(args.questions) for text in texts_of_file(path)]
            Report(file, kind, tokenizer, args.seq_len, questions).print(args.all)
        sys.stdout.flush()
    except (DataError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        sys.exit(f"error: {error}")


def messages_of(row: dict, kind: str) -> list[dict]:
    """The messages of a row that may be faulty; a DPO row's prompt counts once."""
    parts = [part for key in PARTS[kind] if isinstance(part := row.get(key), list)]
    parts[1:] = [part[-1:] for part in parts[1:]]
    return [message for part in parts for message in part if isinstance(message, dict)]


def read_row(kind: str, number: int, line: bytes) -> tuple[dict | None, str, list[Fault]]:
    """As packing.read_row, with what is odd in the text among the faults."""
    row, form, found = packing.read_row(STAGES[kind], number, line)
    if row is None:
        return row, form, found
    if kind == "pretrain":
        return row, form, found or cleaning.text_warnings(row["text"])
    messages = messages_of(row, kind)
    for n, message in enumerate(messages, 1):
        for field in ("content", "reasoning_content"):
            if isinstance(text := message.get(field), str):
                for level, what in cleaning.text_warnings(text, chat=True):
                    found.append(Fault(level, f"{what}, in {field} of message {n}"))
    if len(messages) > 100:
        found.append(Fault("warning", f"very many messages: {len(messages)}"))
    return row, form, found


def too_long(tokens: int, seq_len: int) -> list[Fault]:
    """The fault of a pair of so many tokens, if it has one: training keeps a pair in one row."""
    return [Fault("error", f"{packing.TooLong(tokens, seq_len)}")] if tokens > seq_len else []


class Report:
    """Reads the file once, in memory that grows by some bytes a row, and prints what it found."""

    def __init__(self, file: DataFile, kind: str, tokenizer, seq_len: int, questions: Sequence[str] = ()):
        self.file, self.kind, self.tokenizer, self.seq_len = file, kind, tokenizer, seq_len
        self.size = file.path.stat().st_size
        self.faults: dict[tuple[str, str], list[tuple[int, str]]] = {}
        self.lines = self.used = 0
        self.warned_lines: set[int] = set()
        self.characters, self.tokens, self.turns = array("I"), array("I"), array("I")
        self.languages, self.roles, self.features = Counter(), Counter(), Counter()
        self.trained = self.continued = self.windows = 0
        self.notes: dict[str, list[int]] = {}
        self.keys, self.used_lines, self.texts = dedup.ListedKeys(), array("L"), []
        self.grams, self.found_questions = QuestionGrams(questions) if questions else None, set()
        self.forms, self.needed = Counter(), 0  # needed: tokens of the longest pair
        self.progress = packing.FileProgress(f"reading {file.path.name}", self.size)
        rows = packed_tokens = 0
        for packed in self._packed():
            rows += 1
            packed_tokens += len(packed["input_ids"]) - (kind == "pretrain")
        self._compare_texts()
        self._file_copies()
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
        for chunk in packing.chunks_of(self.file.lines()):
            texts = []
            for number, line in chunk:
                self.progress.at(self.file.position)
                row, pieces = self._check(number, line)
                if row is None:
                    continue
                self.used += 1
                if self.kind == "pretrain":
                    texts.append(row["text"])
                for ids, mask in pieces:
                    self.tokens.append(len(ids))
                    yield Sample(np.array(ids, np.uint32), np.array(mask, bool))
            for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                self.tokens.append(len(encoding))
                yield Sample(np.array([self.tokenizer.document_id, *encoding.ids]))

    def _check(self, number: int, line: bytes) -> tuple[dict | None, list]:
        """Files the faults of a line and counts what it holds; returns the row if training would use it, and the
        tokens and masks of its conversations."""
        self.lines = number
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            self.notes.setdefault("byte order mark before the first line", []).append(number)
        if line.endswith(b"\r\n"):
            self.notes.setdefault("line ends with CR LF", []).append(number)
        if not line.endswith(b"\n"):
            self.notes.setdefault("no newline at the end of the file", []).append(number)
        row, form, found = read_row(self.kind, number, line)
        usable, pieces = not any(fault.level == "error" for fault in found), []
        if usable and self.kind != "pretrain":
            pieces = [render_chat(self.tokenizer, row[part]) for part in PARTS[self.kind]]
        if usable and self.kind == "dpo":
            tokens = sum(len(ids) for ids, _ in pieces)
            self.needed = max(self.needed, tokens)
            found += too_long(tokens, self.seq_len)
            usable = tokens <= self.seq_len
        if usable:
            self.forms[form] += bool(form)
            text = same = clean_rows.text_of(row, STAGES[self.kind])
            if self.kind != "pretrain":
                messages = messages_of(row, self.kind)
                same = json.dumps(messages, ensure_ascii=False, sort_keys=True)
                self._count_messages(messages)
            self.characters.append(len(text))
            share = cleaning.cjk_share(text)
            self.languages["Chinese" if share >= 0.5 else "mixed" if share >= 0.05 else "other"] += 1
            self.used_lines.append(number)
            self.texts.append((same, text))
            if len(self.texts) >= 1000:
                self._compare_texts()
            if found:
                self.warned_lines.add(number)
        for fault in found:
            self._file(number, fault)
        return (row, pieces) if usable else (None, [])

    def _file(self, number: int, fault: Fault) -> None:
        self.faults.setdefault((fault.level, checks.kind_of(fault.text)), []).append((number, fault.text))

    def _compare_texts(self) -> None:
        """Keeps the keys of the texts that were read, which duplicates are found by, and looks for questions."""
        texts = [text for _, text in self.texts]
        self.keys.add(dedup.row_keys([same for same, _ in self.texts], texts, units_of(texts)))
        for text, question in self.grams.hits(texts) if self.grams else ():
            number = self.used_lines[len(self.used_lines) - len(texts) + text]
            if question not in self.found_questions:
                self._file(number, Fault("warning", f"benchmark question: {question + 1} of --questions"))
            self.found_questions.add(question)
        self.texts.clear()

    def _file_copies(self) -> None:
        for copy in dedup.find(self.keys, self._texts_of):
            of = f"of line {self.used_lines[copy.of]}"
            what = COPIES[copy.rule].format(of=of, share=copy.similarity)
            self.warned_lines.add(self.used_lines[copy.row])
            self._file(self.used_lines[copy.row], Fault("warning", what))

    def _texts_of(self, rows: np.ndarray) -> list[str]:
        """The texts of some of the used rows: the file is read once more for them."""
        wanted, texts = {self.used_lines[row] for row in rows.tolist()}, []
        for number, line in self.file.lines():
            if number in wanted:
                row, _, _ = packing.read_row(STAGES[self.kind], number, line)
                texts.append(clean_rows.text_of(row, STAGES[self.kind]))
        return texts

    def _count_messages(self, messages: list[dict]) -> None:
        self.turns.append(len(messages))
        self.roles.update(message["role"] for message in messages)
        self.features["tools"] += any(message.get("tools") for message in messages)
        self.features["tool calls"] += any(message.get("tool_calls") for message in messages)
        self.features["reasoning"] += any(message.get("reasoning_content") for message in messages)

    def print(self, everything: bool) -> None:
        unit = self.file.unit
        how = "".join(f", {what}" for what in self.file.kind)
        print(f"{self.file.path}: {self.kind}{how}, {self.size:,} bytes, {self.lines:,} {unit}s")
        print(f"  used by training   {self.used:,} rows, {len(self.warned_lines):,} of them with warnings")
        print(f"  skipped            {self.lines - self.used:,} {unit}s with errors")
        for form, count in self.forms.most_common():
            if form:
                print(f"  read as            {printable(form, 200)}: {count:,} rows")
        if self.used:
            self._print_figures()
        if self.needed:
            print(f"  row                of {self.seq_len} tokens; the longest pair needs --max_seq_len {self.needed}")
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
        if self.grams:
            checked = int(self.grams.long_enough.sum())
            share = len(self.found_questions) / max(checked, 1)
            print(
                f"\nBenchmark questions: {len(self.found_questions):,} of {checked:,} ({share:.1%}) stand in this file."
            )

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
        if self.kind != "dpo":
            print(f"  packed             {self.rows:,} rows of {self.seq_len} tokens, {self.fill:.1%} full")
        if self.kind == "sft":
            print(f"  continued          {self.continued:,} longer than a row, in {self.windows:,} windows; none cut")

    def _print_group(self, kind: str, entries: list[tuple[int, str]], everything: bool) -> None:
        pairs = {line: PAIR.search(text) for line, text in entries}  # a line once, with the line that it repeats
        numbers = [f"{line} ({pair[0]})" if pair else str(line) for line, pair in pairs.items()]
        print(f"  {kind}: {len(numbers):,} {self.file.unit}{'' if len(numbers) == 1 else 's'}")
        print(textwrap.indent(_numbers(numbers, everything), "      "))
        if any(pairs.values()):
            return
        line, text = entries[0]
        if text != kind:
            print(f"      e.g. {self.file.unit} {line}: {shown(self.file, text)}")


def shown(file: DataFile, fault: str) -> str:
    """A fault in one line, whose remedy is for this file."""
    return with_path(printable(fault, 600), file.path, file.kind)


def _numbers(numbers: list[str], everything: bool, most: int = 200) -> str:
    more = f" ... and {len(numbers) - most:,} more (--all)" if len(numbers) > most and not everything else ""
    width = max(shutil.get_terminal_size().columns - 6, 40)
    return textwrap.fill(", ".join(numbers if everything else numbers[:most]) + more, width)


def show_row(file: DataFile, kind: str, number: int, tokenizer, seq_len: int) -> None:
    """Prints one row: its faults, then every token with its id and whether it is a label (something to learn)."""
    last, line = 0, b""
    for last, line in file.lines():  # noqa: B007
        if last == number:
            break
    if last != number:
        raise DataError(f"{file.path}: there is no {file.unit} {number}, the last one is {last}")
    row, form, found = read_row(kind, number, line)
    print(f"{file.path}, {file.unit} {number}: {kind}, {len(line):,} bytes{f', read as {form}' if form else ''}")
    parts = []
    if kind != "pretrain" and not any(level == "error" for level, _ in found):
        parts = [(part, *render_chat(tokenizer, row[part])) for part in PARTS[kind]]
        if kind == "dpo":
            found += too_long(sum(len(ids) for _, ids, _ in parts), seq_len)
    for level, text in found:
        print(f"  {level}: {shown(file, text)}")
    if any(level == "error" for level, _ in found):
        needed = sum(len(ids) for _, ids, _ in parts)
        remedy = f" with --max_seq_len {seq_len}; {needed} is enough" if needed else ""
        print(f"  Training skips this row{remedy}.")
        return
    if kind == "pretrain":
        ids = [tokenizer.document_id, *tokenizer.encode(row["text"], add_special_tokens=False).ids]
        # The marker ends the document before, so it is a label too, but for the first one of the file.
        show_tokens("text", ids, [int(number > 1), *[1] * (len(ids) - 1)], tokenizer, seq_len)
        return
    for part, ids, mask in parts:
        show_tokens(part, ids, mask, tokenizer, seq_len)


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
