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
import hashlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _path  # noqa: F401

import cli
from cli import ArgumentParser, UsageError, find_device, flag
from dataset.checks import Fault, conversation_faults, kind_of, validate_messages
from dataset.jsonl import DataError, parse_line, read_jsonl, read_lines
from dataset.packing import add_reason, reasons
from evaluation.endpoint import Endpoint
from model.checkpoint import CheckpointError
from model.device import DTYPES
from model.inference.answers import AssistantMessage
from model.inference.chatbot import AnswerSettings, load_chatbot
from model.inference.engine import SamplingParams

OPENING = b'{"conversations": ['  # how the lines of both output files begin


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="a .pth file, a Hugging Face folder, or the address of an endpoint")
    add("--tokenizer", metavar="FOLDER", help="of a teacher's weights that do not say theirs")
    add("--model", metavar="NAME", help="which model of the endpoint")
    add("--prompts", required=True, type=Path, metavar="FILE", help="JSONL file")
    add("--out", required=True, type=Path, metavar="FILE", help="JSONL file of the answers; what it has stays")
    add("--limit", type=int, metavar="N", help="only the first N prompts of the file")
    add("--temperature", type=float, default=0, help="0 = always the likeliest token (default)")
    add("--top_p", type=float, default=1, help="choose among the likeliest tokens of this share (default: 1)")
    add("--seed", type=cli.seed, help="with it and a temperature, a prompt gets the same answer each time")
    add("--max_new_tokens", type=int, default=512, help="a longer answer is dropped (default: 512)")
    add("--thinking", type=flag, metavar="{0,1}", help="1 = answers begin with thinking, 0 = without it "
        "(default: as the teacher likes)")  # fmt: skip
    add("--batch_size", type=int, default=32, help="prompts that a .pth teacher answers together (default: 32)")
    add("--max_seq_len", type=int, help="tokens of prompt and answer (default: as it was trained)")
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=list(DTYPES), help="default: as in eval_model.py")
    add("--concurrency", type=int, default=4, help="requests to an endpoint at a time (default: 4)")
    add("--timeout", type=float, default=300, help="seconds that an endpoint may take for an answer (default: 300)")
    args = parser.parse_args()
    args.is_endpoint = args.teacher.startswith(("http://", "https://"))
    if args.is_endpoint != bool(args.model):
        parser.error("--model NAME and the address of an endpoint belong together")
    here = [name for name in ("tokenizer", "max_seq_len", "device", "dtype") if getattr(args, name) is not None]
    if args.is_endpoint and here:
        parser.error(f"--{here[0]}: the endpoint has its own; leave it out")
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


# ------------------------------------------------------------------------------------------------ prompts


def key_of(messages: list[dict]) -> bytes:
    """Equal for equal messages."""
    return hashlib.blake2b(json.dumps(messages, sort_keys=True).encode(), digest_size=16).digest()


def read_prompts(path: str | Path, limit: int | None = None) -> tuple[dict[bytes, tuple[int, list[dict]]], str]:
    """The first `limit` different prompts, {key: (line, messages)}, and what was skipped, in one line of words.

    DataError if there is no prompt at all.
    """
    prompts: dict[bytes, tuple[int, list[dict]]] = {}
    skipped: dict = {}
    number = duplicates = 0
    for number, row, fault in read_jsonl(path):
        messages, error = ([], fault.text) if fault else _to_prompt(row)
        if error:
            add_reason(skipped, number, error)
        elif (key := key_of(messages)) in prompts:
            duplicates += 1
        else:
            prompts[key] = number, messages
            if len(prompts) == limit:
                break
    if not prompts:
        raise DataError(
            f"{path}: none of its {number} lines is a prompt: {'; '.join(reasons(skipped)) or 'the file is empty'}"
        )
    faulty = sum(reason["count"] for reason in skipped.values())
    text = (
        f"{Path(path).name}: {number:,} lines, {len(prompts):,} prompts, {duplicates:,} duplicates, {faulty:,} faulty"
    )
    return prompts, text + (f" [{'; '.join(reasons(skipped))}]" if skipped else "")


def _to_prompt(row: dict) -> tuple[list[dict], str | None]:
    """(the messages to answer, what is wrong with them or None)."""
    messages: Any = row.get("conversations")
    if "conversations" not in row:
        if "prompt" not in row:
            return [], 'no "prompt" and no "conversations" key'
        messages = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list):
        return [], validate_messages(messages)[0].text
    while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    # With an answer after them they must be a conversation that could be trained on.
    faults = validate_messages([*messages, {"role": "assistant", "content": "?"}])
    if error := next((fault.text for fault in faults if fault.level == "error"), None):
        return [], error
    if "user" not in [message["role"] for message in messages]:
        return [], "no user message: nothing to answer"
    if messages[-1]["role"] == "system":
        return [], f"message {len(messages)}: the last one is not the user's or a tool's"
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        return [], f"message {len(messages)}: content is blank"
    return messages, None


# ------------------------------------------------------------------------------------------------ teachers


def load_teacher(args: argparse.Namespace):
    """What has overflow() and answer_each(): an Endpoint, a Chatbot or a TransformersChatbot."""
    if args.is_endpoint:
        options: dict[str, Any] = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
        if args.top_p < 1:
            options["top_p"] = args.top_p
        if args.thinking is not None:  # as vLLM, SGLang and llama.cpp have it
            options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": args.thinking}}
        return Endpoint(args.teacher, args.model, options, os.environ.get("OPENAI_API_KEY"), args.timeout)
    if not Path(args.teacher).exists():
        raise UsageError(
            f"--teacher {args.teacher}: no such file or folder, and not the address (http://...) of an endpoint"
        )
    settings = AnswerSettings(args.max_seq_len, args.max_new_tokens, args.temperature, args.top_p, args.thinking)
    device, dtype = find_device(args.device), DTYPES.get(args.dtype)
    return load_chatbot(args.teacher, device, dtype, settings, tokenizer=args.tokenizer)


# ------------------------------------------------------------------------------------------------ answers


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


def to_row(answer: AssistantMessage, finish_reason: str) -> tuple[dict, str | None]:
    """(the assistant message of a row, why it is of no use or None)."""
    message = {"role": "assistant", "content": answer.content}
    message |= {"reasoning_content": answer.reasoning_content} if answer.reasoning_content else {}
    message |= {"tool_calls": json.dumps(answer.tool_calls, ensure_ascii=False)} if answer.tool_calls else {}
    if finish_reason == "length":
        return message, "cut off"
    if finish_reason == "content_filter":
        return message, "filtered"
    if answer.faults:
        return message, kind_of(answer.faults[0])
    if not answer.content and not answer.tool_calls:
        return message, "empty"
    circles = repeats(answer.content) or repeats(answer.reasoning_content)
    return message, "repeats endlessly" if circles else None


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
    progress = RateLine(len(prompts))
    for i, answer, finish_reason in teacher.answer_each([messages for _, messages in prompts], seeds, at_once):
        line, messages = prompts[i]
        if finish_reason == "refused":  # not kept: it costs nothing to ask again
            say(f"line {line}: {answer.content}")
            counts["refused"] += 1
        else:
            message, why = to_row(answer, finish_reason)
            row = {"conversations": [*messages, message]}
            errors = [fault.text for fault in conversation_faults(row) if fault.level == "error"]
            why = why or (kind_of(errors[0]) if errors else None)
            append(dropped_path if why else args.out, row | ({"why": why} if why else {}))
            counts[why or "used"] += 1
        progress.show(counts.total())
    return counts


class RateLine:
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
