"""Train a tokenizer: byte-level BPE on any data of this project (pretrain, conversations, preference pairs).

python train_tokenizer.py                         # on the starter corpus; writes out/tokenizer
python train_tokenizer.py --data_path starter REAL.jsonl --weight 0.3 1 --eval_path REAL_VAL.jsonl   # the shipped one
"""

import argparse
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cli import ArgumentParser, UsageError
from dataset.chat import BOS, EOS, MARKERS, PAD, SPECIAL_MARKERS, load_tokenizer
from dataset.checks import Fault, quoted
from dataset.files import DataError, DataFile, with_path
from dataset.jsonl import parse_line
from dataset.mapping import as_ours
from dataset.packing import add_reason, reasons

# Qwen2's split: transformers, vLLM and llama.cpp know it. Digits stand alone, so that arithmetic can be learnt.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# BPE takes time quadratic in the length of a piece, and learns nothing from one without an end: longer ones are cut.
LONGEST_PIECE = 256  # characters
LONG_PIECE = re.compile(  # of one of SPLIT's kinds; it is tried at the beginning of a run only, so that it stays linear
    "|".join(rf"(?<!{kind}){kind}{{{LONGEST_PIECE + 1},}}" for kind in (r"[^\W\d_]", r"[^\w\s]", "_", r"\s"))
)
MIN_VOCAB = len(MARKERS) + 256
MAX_VOCAB = 1 << 24
OUT_DIR = Path(__file__).resolve().parent / "out" / "tokenizer"
HELD_OUT = 100  # one text in so many is kept out of training, to measure on
HELD_OUT_CHARACTERS = 1_000_000
STARTER_FILES = ("pretrain", "sft", "lora_medical", "reason", "tools")
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")

# encode -> decode must give these back unchanged.
IDENTITY = {
    "emoji": "😀👍🏽 👨‍👩‍👧‍👦👩🏿‍🚀🏳️‍🌈 1️⃣ ❤️",
    "flags": "🇨🇳🇫🇷🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "rare CJK": "𠀀𠮷𪚥𫝀𫠝𬺰𮯰𰻞𱍐 㐀䶵 豈﨎 ⺀⼀ 葛\U000e0100",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x85\x9f",
    "NUL": "\0 a\0b\0\0",
    "combining marks": "e\u0301 é ﬁ Å \u212b Z\u0351\u0363a\u0321\u0334l\u034fgo \u0e01\u0e33 \u1112\u1161\u11ab 한",
    "right to left": "שָׁלוֹם مرحبا \u202eabc\u202c \u200f\u2067١٢٣\u2069",
    "line ends": "a\r\nb\rc\n\n\n\r\n\u2028\u2029\v\f ",
    "spaces": " ",
    "runs of spaces": "  a   b\t\t c    \u3000\u00a0\u2003\u200b\u200d\ufeff ",
    "private use": "\ue000\uf8ff\U000f0000\U0010fffd \ufffe\uffff\ufffd",
    "digits": "0123456789 3.14159 ２０２４ ٣ ½ Ⅷ 1e-5",
    "code": "def f(x):\n    return x[::-1]  # 反转\n\tif a != b and c <= d: pass\n",
    "markers": "<|im_start|>user\n<think></think><tool_call><|endoftext|><|im_end|>",
    "contractions": "I'm DON'T it’s we'LL 'tis 's",
    "empty": "",
}


def main() -> None:
    args = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be Unicode
    check_folder(Path(args.out_dir), args.overwrite)
    files = weighted_files(args.data_path, args.weight, args.sample_mb)
    held_out = [text for text, _ in stream_texts([(Path(args.eval_path), 1.0)], "evaluation")] if args.eval_path else []
    texts = training_texts(files, None if args.eval_path else held_out)
    tokenizer = interruptible(lambda: train_bpe(texts, args.vocab_size))
    check_identity(tokenizer)
    save_tokenizer(tokenizer, Path(args.out_dir))
    check_identity(load_tokenizer(args.out_dir))
    print(f"encode -> decode is the identity on {len(IDENTITY)} kinds of text", flush=True)
    print_compression(tokenizer, held_out)
    print(f"wrote {args.out_dir}\nnext: python train_pretrain.py --tokenizer {args.out_dir}")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    starter = "JSONL files; the word starter stands for the starter corpus"
    add("--data_path", nargs="+", metavar="FILE", default=["starter"], help=starter)
    weight = "one per --data_path: how often its rows are counted (0.5 = every second row)"
    add("--weight", nargs="+", type=float, metavar="W", help=weight)
    held_out = f"JSONL to measure on (default: 1 in {HELD_OUT} texts, kept out of training)"
    add("--eval_path", metavar="FILE", help=held_out)
    add("--vocab_size", type=int, default=6400, help="default: %(default)s")
    sample = "rows are taken evenly from the files up to this much, which bounds the memory: about 50 times as much"
    add("--sample_mb", type=float, default=32, help=f"{sample} (default: %(default)s)")
    add("--out_dir", default=os.path.relpath(OUT_DIR), metavar="FOLDER", help="default: %(default)s")
    overwrite = "1 = replace the tokenizer that lies in --out_dir; weights trained with that one need it still"
    add("--overwrite", type=cli.flag, default=False, metavar="{0,1}", help=overwrite)
    args = parser.parse_args()
    if args.vocab_size < MIN_VOCAB:
        needed = f"{len(MARKERS)} markers and 256 bytes need {MIN_VOCAB}"
        raise UsageError(f"--vocab_size {args.vocab_size} is too small: {needed}")
    if args.vocab_size > MAX_VOCAB:
        raise UsageError(f"--vocab_size {args.vocab_size} is too large: at most {MAX_VOCAB}")
    if not args.out_dir:
        raise UsageError("--out_dir is empty: give a folder, or leave it out")
    if not args.sample_mb > 0:
        raise UsageError(f"--sample_mb {args.sample_mb:g} must be more than 0")
    args.weight = args.weight or [1.0] * len(args.data_path)
    if len(args.weight) != len(args.data_path) or not all(0 < weight <= 1000 for weight in args.weight):
        files = len(args.data_path)
        raise UsageError(f"--weight needs one number from 0 to 1000 for each of the {files} --data_path entries")
    return args


def check_folder(folder: Path, overwrite: bool) -> None:
    """Before the work begins: UsageError if there is a tokenizer already, DataError if none can be written."""
    there = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).exists()]
    if there and not overwrite:
        remedy = "give another --out_dir, or --overwrite 1 to replace it"
        raise UsageError(f"--out_dir {folder} has a tokenizer already ({there[0]}): {remedy}")
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise DataError(f"--out_dir {folder}: {place} is no folder that can be written; give another one")


def weighted_files(names: list[str], weights: list[float], sample_mb: float) -> list[tuple[Path, float]]:
    """(file, how often its rows are taken); all weights shrink together when the whole is over sample_mb."""
    files = []
    for name, weight in zip(names, weights, strict=True):
        if name == "starter":
            from dataset.starter.corpus import ensure_starter

            folder = ensure_starter()
            files += [(folder / f"{stage}.jsonl", weight) for stage in STARTER_FILES]
        else:
            files.append((Path(name), weight))
    scale = min(1.0, sample_mb * 1e6 / max(1, sum(DataFile(path).text_size * weight for path, weight in files)))
    if scale < 1:
        print(f"data is over --sample_mb {sample_mb:g}: taking {scale:.1%} of it, evenly", flush=True)
    return [(path, weight * scale) for path, weight in files]


def training_texts(files: list[tuple[Path, float]], held_out: list[str] | None) -> Iterator[str]:
    """Texts to train on; where `held_out` is a list, some go into it instead, with all that they count."""
    characters = 0
    for n, (text, times) in enumerate(stream_texts(files, "training")):
        if held_out is not None and n % HELD_OUT == HELD_OUT - 1 and characters < HELD_OUT_CHARACTERS:
            held_out.append(text)
            characters += len(text)
        else:
            yield from [text] * times


def stream_texts(files: list[tuple[Path, float]], purpose: str) -> Iterator[tuple[str, int]]:
    """Streams the files' texts, each with how often it counts; says how far it is, and at the end of each file how many
    lines were no use."""
    for path, weight in files:
        file, used, faults, due = DataFile(path), 0, {}, 0.0
        size, shown = path.stat().st_size, time.monotonic()
        for number, line in file.lines():
            texts, reason = row_texts(*parse_line(number, line))
            if not texts:
                add_reason(faults, number, reason)
                continue
            used += 1
            due += weight
            if times := math.floor(due + 1e-9):
                yield from ((text, times) for text in texts)
                due -= times
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                print(f"{path.name}: {file.position / size:.0%} read", flush=True)
        why = [with_path(text, path, file.kind) for text in reasons(faults, file.unit)]
        if not used:
            raise DataError(f"{path}: no usable row: {'; '.join(why) or 'the file is empty'}")
        kind = f" ({', '.join(file.kind)})" if file.kind else ""
        times = f", each counted {weight:.3g} times" if weight != 1 else ""
        skipped = f", {sum(fault['count'] for fault in faults.values())} skipped" if faults else ""
        print(f"{path.name}{kind}: {used} rows for {purpose}{times}{skipped}", flush=True)
        print("".join(f"  skipped {text}\n" for text in why), end="", flush=True)


def row_texts(row: dict | None, fault: Fault | None = None) -> tuple[list[str], str]:
    """(the pieces the model will see of a row: a text, or what stands between the markers of its messages; why there is
    none)."""
    if row is None:
        return [], fault.text
    if isinstance(row.get("text"), str):
        return [row["text"]] if row["text"] else [], "empty text"
    try:
        row, _ = as_ours("preference" if {"chosen", "rejected"} <= row.keys() else "sft", row)
        if "conversations" not in row and "chosen" not in row:
            row, _ = as_ours("pretrain", row)
    except ValueError as doubt:
        return [], str(doubt)
    if isinstance(row.get("text"), str):
        return [row["text"]] if row["text"] else [], "empty text"
    texts = [text for key in ("conversations", "chosen", "rejected") for text in message_texts(row.get(key))]
    keys = ", ".join(map(quoted, list(row)[:5]))
    return texts, f"no text, no conversation and no chosen/rejected in it: the keys are {keys or 'none'}"


def message_texts(messages: Any) -> Iterator[str]:
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict):
            continue
        if message.get("content"):
            yield f"{message.get('role')}\n{message['content']}"
        for name in ("reasoning_content", "tools", "tool_calls"):
            if value := message.get(name):
                yield "\n" + (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def interruptible(work: Callable[[], Tokenizer]) -> Tokenizer:
    """What work() returns, from a thread of its own: the trainer is no Python, and in the main thread it would hear no
    Ctrl-C. Says every ten seconds that it goes on."""
    done: dict[str, Any] = {}

    def run() -> None:
        try:
            done["result"] = work()
        except BaseException as error:  # raised again by the main thread
            done["error"] = error

    thread, started, shown = threading.Thread(target=run, daemon=True), time.monotonic(), time.monotonic()
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"training: {shown - started:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("error: stopped; nothing was written", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # an orderly exit would wait for the trainer
    if "error" in done:
        raise done["error"]
    return done["result"]


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{{LONGEST_PIECE}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, cut, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(marker, normalized=False, special=True) for marker in MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    started = time.monotonic()
    long = 0

    def counted() -> Iterator[str]:
        nonlocal long
        for text in texts:
            long += len(text) > LONGEST_PIECE and sum(1 for _ in LONG_PIECE.finditer(text))
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # only training is spared the long pieces
    # The trainer marks all of them special; the think and tool markers must stay visible in decoded answers.
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_MARKERS
    print(f"trained {tokenizer.get_vocab_size()} entries in {time.monotonic() - started:.1f} s", flush=True)
    if long:
        print(f"note: {long:,} words or runs of over {LONGEST_PIECE} characters were cut for the training")
    if tokenizer.get_vocab_size() < vocab_size:
        print(f"note: this text has no more pairs that occur twice; --vocab_size {vocab_size} needs more of it")
    return Tokenizer.from_str(json.dumps(spec))


def check_identity(tokenizer: Tokenizer) -> None:
    """DataError if some kind of text does not come back unchanged."""
    for name, text in IDENTITY.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise DataError(f"encode -> decode does not give back: {name}")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, each written whole or not at all."""
    from model.files import to_json, write_bytes  # torch takes seconds to import, and --help does without

    template = Path(__file__).resolve().parent / "dataset" / "chat_template.jinja"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": template.read_text(encoding="utf-8"),
    }
    write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_bytes(folder / "tokenizer_config.json", to_json(config))


def print_compression(tokenizer: Tokenizer, held_out: list[str]) -> None:
    """Characters and bytes per token of the held-out texts, by language."""
    rows = {"Chinese": [], "English": []}  # English stands for all that is not Chinese
    for text in held_out:
        rows["Chinese" if len(CHINESE.findall(text)) > len(text) / 5 else "English"].append(text)
    rows["all"] = held_out
    print(f"{'held-out text':14}{'texts':>8}{'characters/token':>19}{'bytes/token':>14}")
    for language, texts in rows.items():
        tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
        if tokens:
            print(f"{language:14}{len(texts):8}{characters / tokens:19.3f}{size / tokens:14.3f}")


if __name__ == "__main__":
    cli.run(main)
