"""Black-box distillation: a teacher answers prompts, and its answers are the data of an SFT.

python scripts/ask_teacher.py --teacher out/full_sft_768.pth --prompts prompts.jsonl --out answers.jsonl
python scripts/ask_teacher.py --teacher FOLDER ...                                # a Hugging Face folder
python scripts/ask_teacher.py --teacher http://127.0.0.1:8000/v1 --model NAME ... # key: environment OPENAI_API_KEY
python train_full_sft.py --data_path answers.jsonl

A prompt is {"prompt": "text"} or {"conversations": [...]}, whose last answer is left out. Run again, it goes on: what
has an answer in --out is not asked again, nor what is in FILE.dropped.jsonl: answers that were cut off, empty, went
round in circles or cannot be trained on.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _path  # noqa: F401

import cli
from cli import ArgumentParser, UsageError
from dataset.chat import END_THINK, THINK
from dataset.checks import Fault, conversation_faults, kind_of
from dataset.jsonl import DataError, parse_line, read_lines
from dataset.prompts import key_of, read_prompts
from model.checkpoint import CheckpointError
from model.device import DTYPES, find_device
from model.endpoint import Endpoint
from model.inference.chatbot import load_chatbot
from model.inference.engine import SamplingParams
from model.inference.tools import parse_calls

OPENING = b'{"conversations": ['  # how the lines of both output files begin


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="a .pth file, a Hugging Face folder, or the address of an endpoint")
    add("--model", metavar="NAME", help="which model of the endpoint")
    add("--prompts", required=True, type=Path, metavar="FILE", help="JSONL file")
    add("--out", required=True, type=Path, metavar="FILE", help="JSONL file of the answers; what it has stays")
    add("--limit", type=int, metavar="N", help="only the first N prompts of the file")
    add("--temperature", type=float, default=0, help="0 = always the likeliest token (default)")
    add("--top_p", type=float, default=1, help="choose among the likeliest tokens of this share (default: 1)")
    add("--seed", type=int, help="with it and a temperature, a prompt gets the same answer each time")
    add("--max_new_tokens", type=int, default=512, help="a longer answer is dropped (default: 512)")
    add("--thinking", type=int, choices=(0, 1), help="1 = answers begin with thinking, 0 = without it "
        "(default: as the teacher likes)")  # fmt: skip
    add("--batch_size", type=int, default=32, help="prompts that a .pth teacher answers together (default: 32)")
    add("--max_seq_len", type=int, help="tokens of prompt and answer (default: as it was trained)")
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=list(DTYPES), help="default: bf16 where the hardware computes in it, else fp32")
    add("--concurrency", type=int, default=4, help="requests to an endpoint at a time (default: 4)")
    add("--timeout", type=float, default=300, help="seconds that an endpoint may take for an answer (default: 300)")
    args = parser.parse_args()
    args.is_endpoint = args.teacher.startswith(("http://", "https://"))
    if args.is_endpoint != bool(args.model):
        parser.error("--model NAME and the address of an endpoint belong together")
    for name in ("limit", "max_new_tokens", "batch_size", "concurrency", "timeout"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} {getattr(args, name)}: must be above 0")
    if args.max_seq_len is not None and args.max_seq_len < 16:
        parser.error(f"--max_seq_len {args.max_seq_len}: must be at least 16")
    try:
        SamplingParams(temperature=args.temperature, top_p=args.top_p)
    except ValueError as error:
        parser.error(f"--{error}")
    if args.out.resolve() == args.prompts.resolve():
        parser.error("--out must be another file than --prompts")
    return args


def load_teacher(args: argparse.Namespace):
    """What has overflow() and answer_each(): an Endpoint, a Chatbot or a TransformersChatbot."""
    thinking = None if args.thinking is None else bool(args.thinking)
    if args.is_endpoint:
        settings: dict[str, Any] = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
        if args.top_p < 1:
            settings["top_p"] = args.top_p
        if thinking is not None:  # as vLLM, SGLang and llama.cpp have it
            settings["chat_template_kwargs"] = {"enable_thinking": thinking}
        return Endpoint(args.teacher, args.model, settings, os.environ.get("OPENAI_API_KEY"), args.timeout)
    path = Path(args.teacher)
    if not path.exists():
        raise UsageError(f"--teacher {path}: no such file or folder, and not the address (http://...) of an endpoint")
    where = {"load": int(path.is_dir()), "model_path": path, "weight": path, "lora_name": None, "thinking": thinking}
    device = find_device(args.device)
    return load_chatbot(argparse.Namespace(**vars(args) | where), device, DTYPES.get(args.dtype))


def read_answered(path: Path) -> set[bytes]:
    """Keys of the prompts in a file that an earlier run wrote; half a line at its end, of a killed one, is cut off."""
    keys: set[bytes] = set()
    ended = True
    for number, line in read_lines(path) if path.exists() else ():
        row, fault = parse_line(number, line)
        ended = line.endswith(b"\n")
        if fault and not ended and (line.startswith(OPENING) or OPENING.startswith(line)):
            os.truncate(path, path.stat().st_size - len(line))
            say(f"{path.name}: line {number} was written in part: cut off")
            break
        if not fault and not (isinstance(row.get("conversations"), list) and row["conversations"]):
            fault = Fault("error", 'no "conversations" (a list of messages)')
        if fault:
            raise DataError(f"{path}, line {number}: {fault.text}; give another --out, or mend the line")
        keys.add(key_of(row["conversations"][:-1]))
    else:
        if not ended:  # as some editors leave it
            with open(path, "ab") as file:
                file.write(b"\n")
    return keys


def to_message(text: str, finish_reason: str) -> tuple[dict, str | None]:
    """An answer as a decoder gives it -> (the assistant message, why it is of no use or None)."""
    before, end, content = text.partition(END_THINK)
    before = before.strip().removeprefix(THINK)
    if not end or THINK in before:  # no thinking, or an answer that talks about these markers
        before, content = "", text
    content, calls, faults = parse_calls(content)
    message = {"role": "assistant", "content": content}
    message |= {"reasoning_content": before.strip()} if before.strip() else {}
    message |= {"tool_calls": json.dumps(calls, ensure_ascii=False)} if calls else {}
    if finish_reason == "length":
        return message, "cut off"
    if finish_reason == "content_filter":
        return message, "filtered"
    if faults:
        return message, kind_of(faults[0])
    if content.startswith(THINK):
        return message, "thinking without end"
    if not content and not calls:
        return message, "empty"
    return message, "repeats endlessly" if repeats(content) or repeats(before) else None


def repeats(text: str) -> bool:
    """Whether it ends in one piece of at most 200 characters again and again: 4 times, and 100 characters, or more."""
    text = text.strip()
    stretches = ((piece, max(4 * piece, 100)) for piece in range(1, 201))
    return any(len(text) >= n and text[piece - n :] == text[-n:-piece] for piece, n in stretches)


def append(path: Path, row: dict) -> None:
    """In one write, so that a killed process loses one line at most."""
    with open(path, "ab") as file:
        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def ask(teacher, prompts: list[tuple[int, list[dict]]], args: argparse.Namespace, dropped_path: Path) -> Counter:
    """Asks them all, writes what is answered; returns how many were "used", and dropped for which reason."""
    seeds = [None if args.seed is None else args.seed + line for line, _ in prompts]  # the same when run again
    at_once = args.concurrency if args.is_endpoint else args.batch_size
    counts: Counter = Counter()
    progress = Progress(len(prompts))
    for i, text, finish_reason in teacher.answer_each([messages for _, messages in prompts], seeds, at_once):
        line, messages = prompts[i]
        if finish_reason == "refused":  # not kept: it costs nothing to ask again
            say(f"line {line}: {text}")
            counts["refused"] += 1
        else:
            message, why = to_message(text, finish_reason)
            row = {"conversations": [*messages, message]}
            errors = [fault.text for fault in conversation_faults(row) if fault.level == "error"]
            why = why or (kind_of(errors[0]) if errors else None)
            append(dropped_path if why else args.out, row | ({"why": why} if why else {}))
            counts[why or "used"] += 1
        progress.show(counts.total())
    return counts


class Progress:
    """One line that is rewritten on a terminal, a line every 10 s in a log."""

    def __init__(self, total: int):
        self.total, self.start, self.next = total, time.monotonic(), 0.0
        self.tty = sys.stderr.isatty()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if now < self.next and done < self.total:
            return
        self.next = now + (0.2 if self.tty else 10)
        rate = done / max(now - self.start, 1e-9)
        left = round((self.total - done) / rate)
        bar = f"[{'#' * (20 * done // self.total):.<20}] "
        text = f"{bar}{done:,}/{self.total:,} answers, {rate:.3g}/s, {left // 60}:{left % 60:02d} left"
        end = "" if self.tty and done < self.total else "\n"
        print(f"\r\033[K{text}" if self.tty else text, end=end, file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def main() -> None:
    args = arguments()
    if not args.out.resolve().parent.is_dir():
        raise UsageError(f"--out {args.out}: no such folder")
    dropped_path = args.out.with_suffix(".dropped.jsonl")
    prompts, description = read_prompts(args.prompts, args.limit)
    say(description)
    answered, useless = read_answered(args.out), read_answered(dropped_path)
    before, useless_before = len(prompts.keys() & answered), len(prompts.keys() & useless - answered)
    todo = [prompt for key, prompt in prompts.items() if key not in answered | useless]
    if before or useless_before:
        again = f", {useless_before:,} dropped (delete {dropped_path.name} to ask them again)" if useless_before else ""
        say(f"{before:,} prompts have an answer in {args.out.name}{again}; {len(todo):,} are left")
    counts: Counter = Counter()
    if todo:
        teacher = load_teacher(args)
        fits = [prompt for prompt in todo if not teacher.overflow(prompt[1])]
        try:
            counts = ask(teacher, fits, args, dropped_path)
        except KeyboardInterrupt:
            say("stopped; the answers so far are kept, and the same command goes on")
            sys.exit(130)
        except ValueError as error:  # weights that give no numbers
            raise CheckpointError(str(error)) from None
        counts["too long"] += len(todo) - len(fits)
    written = counts.pop("used", 0)
    losses = ", ".join(f"{count:,} {why}" for why, count in counts.most_common() if count)
    if not before + written:
        raise DataError(f"{args.out}: no answer is of use: {losses or 'all were dropped before'}")
    say(
        f"{args.out}: {before + written:,} answers, {written:,} of them new" + (f"; no use: {losses}" if losses else "")
    )


if __name__ == "__main__":
    cli.run(main)
