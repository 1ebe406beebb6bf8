"""Talk to a model, ask it one question, or score it on a held-out file.

python eval_model.py                                   # the SFT weights in out/: automatic test or manual input
python eval_model.py --model_mode 0                    # the pretrained weights continue a text
python eval_model.py --ask "Who are you?"              # one answer, nothing else
python eval_model.py --score dataset/starter_data/heldout.jsonl
python eval_model.py --tools 1 --ask "Calculate 12 + 45."                # with calculator, dates and units
python eval_model.py --model PATH                      # any .pth file or Hugging Face folder
"""

import argparse
import json
import os
import sys
import time
from itertools import chain
from pathlib import Path

import cli
from cli import ArgumentParser, UsageError, find_device, flag
from dataset.chat import THINK, TOOL_CALL
from dataset.jsonl import DataError
from evaluation.scoreboard import Question, answer_questions, count_right, print_scoreboard, read_heldout
from model.checkpoint import CheckpointError
from model.device import DTYPES
from model.inference.answers import AssistantMessage, Piece, to_message
from model.inference.chatbot import SCORE_TOKENS, THINKING_SCORE_TOKENS, AnswerSettings, load_chatbot
from model.inference.engine import SamplingParams
from model.inference.tools import SCHEMAS, run_tool

ROOT = Path(__file__).resolve().parent
CONTINUED = [
    ["The capital of France is"], ["法国的首都是"], ["One sunny day, a cat"], ["小猫有一个"], ["猫属于"],
    ["A horse is"], ["7 + 15 ="], ["中文：我买帽子。\n英语："],
]  # fmt: skip
ANSWERED = [  # each a conversation: the user's messages
    ["Who are you?"], ["你是谁？"], ["What is the capital of France?", "And its population?"], ["7 + 15 = ?"],
    ["把“书”翻译成英语。"], ["Tell me a short story about a cat."], ["Sort these numbers: 7, 3, 9"],
    ["日本的首都是哪里？", "那人口呢？"],
]  # fmt: skip
ANSWERED_WITH_TOOLS = [
    ["Calculate 12 + 45."], ["7 公里是多少米？"], ["What date is 10 days after 2026-11-24?"], ["计算 23 * 8。"],
    ["Who are you?"],
]  # fmt: skip
TOOL_ROUNDS = 4  # calls, results, calls, ... for one question, at most


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        usage="python eval_model.py [options]   (--help lists them)",
        description=__doc__,
    )
    cli.add_model_flags(parser, ROOT / "out")
    cli.add_inference_flags(parser)
    add = parser.add_argument_group("how it answers").add_argument
    add("--lora_name", metavar="NAME", help="adapter out_dir/lora/NAME_HIDDEN.pth; or the path of its file")
    add("--temperature", type=float, default=0.7, help="0 = always the likeliest token (default: 0.7)")
    add("--top_p", type=float, default=0.9, help="choose among the likeliest tokens of this share (default: 0.9)")
    add("--max_seq_len", type=int, help="tokens of prompt and answer (default: as it was trained)")
    score_tokens = f"{SCORE_TOKENS}, with thinking {THINKING_SCORE_TOKENS}"
    add("--max_new_tokens", type=int, help=f"tokens of an answer (default: 512; --score: {score_tokens})")
    add("--history_cnt", type=int, default=8, help="earlier messages the model sees, an even number; tool calls "
        "and results come with them, uncounted (default: 8)")  # fmt: skip
    add("--system", metavar="TEXT", help="system message")
    add("--thinking", type=flag, metavar="{0,1}", help="1 = the answer begins with thinking, 0 = without it "
        "(default: 1 with --model_mode 3, else as the model likes)")  # fmt: skip
    add("--tools", type=flag, metavar="{0,1}", default=False,
        help="1 = the model may call a calculator, dates and unit conversion (default: 0)")  # fmt: skip
    add("--stream", type=flag, metavar="{0,1}", default=True, help="show the answer as it is generated (default: 1)")
    add("--seed", type=cli.seed, help="the same answers every time")

    group = parser.add_argument_group("instead of a conversation")
    add = group.add_mutually_exclusive_group().add_argument
    add("--ask", metavar="TEXT", help="print the answer to this, or the continuation with --model_mode 0")
    add("--score", metavar="FILE", help="accuracy by skill on a held-out JSONL file, greedy")
    group.add_argument("--scores_out", metavar="FILE", help="with --score: every answer and the scores, as JSON")
    group.add_argument("--show_wrong", type=int, default=0, metavar="N", help="with --score: print N wrong answers")
    args = parser.parse_args(argv)
    check(parser, args)
    if args.thinking is None and args.model_mode == 3:
        args.thinking = True
    return args


def check(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what does not fit together."""
    cli.check_model_flags(parser, args)
    if args.max_seq_len is not None and args.max_seq_len < 16:
        parser.error(f"--max_seq_len {args.max_seq_len}: must be at least 16")
    if (args.scores_out or args.show_wrong) and not args.score:
        parser.error("--scores_out and --show_wrong need --score FILE")
    if args.history_cnt < 0 or args.history_cnt % 2:
        parser.error(f"--history_cnt {args.history_cnt}: must be even, as questions and answers come in pairs")
    if args.ask is not None and not args.ask.strip():
        parser.error("--ask: there is nothing to answer")
    if args.model_mode == 0 and (args.tools or args.thinking is not None):
        parser.error("--tools and --thinking are of answers, and --model_mode 0 continues texts")
    if args.system is not None and (args.score or args.model_mode == 0):
        parser.error("--system is of a conversation: neither --score nor --model_mode 0 has one")
    if args.tools and args.score:
        parser.error("--tools 1: the questions of --score bring their own tools; leave it out")
    try:
        new = 1 if args.max_new_tokens is None else args.max_new_tokens
        SamplingParams(temperature=args.temperature, top_p=args.top_p, max_new_tokens=new)
    except ValueError as error:
        parser.error(f"--{error}")


def load(args: argparse.Namespace):
    """The chatbot that the flags describe."""
    settings = AnswerSettings(args.max_seq_len, args.max_new_tokens, args.temperature, args.top_p, args.thinking)
    adapter = None
    if args.lora_name and args.lora_name != "None":  # as MiniMind spells that there is none
        adapter = Path(args.lora_name)
        if adapter.suffix != ".pth":
            adapter = Path(args.out_dir) / "lora" / adapter
    options = {"quantized": args.quantize, "compiled": args.compile, "extrapolate": args.inference_rope_scaling}
    options["tokenizer"] = args.tokenizer
    device, dtype = find_device(args.device), DTYPES.get(args.dtype)
    return load_chatbot(cli.model_path(args), device, dtype, settings, adapter=adapter, **options)


# ------------------------------------------------------------------------------------------------ conversation


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def clean(text: str) -> str:
    """Bytes of the terminal that are not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Screen:
    """Shows an answer as it comes: thinking and tool calls with their tags on lines of their own, dim on a terminal."""

    def __init__(self):
        self.new_line, self.after_tag, self.is_dim = True, False, False

    def show(self, piece: Piece) -> None:
        if piece.marker:
            self._tag(piece.marker)
        self._write(piece.text)
        sys.stdout.flush()

    def _tag(self, tag: str) -> None:
        opens = tag in (THINK, TOOL_CALL)
        if not self.new_line:
            print()
        if opens and sys.stdout.isatty():
            print("\033[2m", end="")
        print(tag, end="")
        self.is_dim, self.new_line, self.after_tag = opens, False, True
        if not opens and sys.stdout.isatty():
            print("\033[0m", end="")

    def _write(self, text: str) -> None:
        if text:
            print("" if text.startswith("\n") or not self.after_tag else "\n", text, sep="", end="")
            self.new_line, self.after_tag = text.endswith("\n"), False

    def close(self) -> None:
        """After an answer that ended, or was stopped, between the tags."""
        if self.is_dim and sys.stdout.isatty():
            print("\033[0m", end="", flush=True)


def say(bot, prompt: str | list[dict], args: argparse.Namespace, seed: int | None) -> tuple[AssistantMessage, bool]:
    """Show the answer as it comes, then, in a conversation, its speed; returns it, and whether it was stopped. Ctrl-C
    ends the answer, not the conversation."""
    begin, before, pieces, stopped = time.perf_counter(), bot.tokens, [], False
    screen = Screen()
    try:
        for piece in bot.stream(prompt, seed):
            pieces.append(piece)
            if args.stream:
                screen.show(piece)
    except KeyboardInterrupt:
        if args.ask:
            raise
        stopped = True
    finally:
        for piece in pieces if not args.stream else ():
            screen.show(piece)
        screen.close()
    print()
    if not args.ask:
        n, seconds = bot.tokens - before, time.perf_counter() - begin
        print(dim(f"[{n} tokens, {n / seconds:.0f} tokens/s{', stopped' * stopped}]") + "\n", flush=True)
    return to_message(pieces), stopped


def make_room(bot, system: list[dict], earlier: list[list[dict]], exchange: list[dict]) -> int:
    """Drops the oldest exchanges until the rest fits; returns by how many tokens it is too long all the same."""
    dropped = 0
    while (over := bot.overflow([*system, *chain(*earlier), *exchange])) and earlier:
        dropped += len(earlier.pop(0))
    if dropped and not over:
        print(dim(f"[the conversation outgrew {bot.max_len} tokens: its {dropped} oldest messages were dropped]"))
    return over


def answer(bot, earlier: list[list[dict]], exchange: list[dict], args: argparse.Namespace, seed: int | None) -> int:
    """Adds the answer to the exchange, and before it the calls and results that it takes; shows all of it.

    Earlier exchanges are dropped where there is no room. Returns by how many tokens the exchange is too long: then it
    has no answer, and 0 if it has one.
    """
    system, name = system_message(args), "" if args.ask else "minimind> "
    for turn in range(TOOL_ROUNDS + 1):
        if over := make_room(bot, system, earlier, exchange):
            return over
        print(name, end="", flush=True)
        message, stopped = say(bot, [*system, *chain(*earlier), *exchange], args, seed)
        carry_out = args.tools and not stopped
        for fault in message.faults if carry_out else ():
            print(dim(f"[{fault}]"))
        calls = message.tool_calls if carry_out else []
        if calls and turn == TOOL_ROUNDS:
            print(dim(f"[that was call after call, {TOOL_ROUNDS} times: no more are carried out]"))
        if not calls or turn == TOOL_ROUNDS:
            exchange.append({"role": "assistant", "content": message.text})
            return 0
        exchange.append({"role": "assistant", "content": message.content, "tool_calls": calls})
        for call in calls:
            exchange.append({"role": "tool", "content": run_tool(**call)})
            print(dim(f"tool> {exchange[-1]['content']}"))


def respond(bot, history: list[list[dict]], text: str, args: argparse.Namespace, n: int) -> list[list[dict]]:
    """Answer a user's message (the n-th of all), or continue a text; returns the exchanges as the model saw them, with
    the new one. An exchange is a user's message and what it led to, so that no result is parted from its call."""
    # Another seed for each message: the same question twice need not get the same answer.
    seed = None if args.seed is None else args.seed + n
    kept = args.history_cnt // 2
    earlier, exchange = history[-kept:] if kept else [], [{"role": "user", "content": text}]
    if args.model_mode != 0:
        over = answer(bot, earlier, exchange, args, seed)
    elif not (over := bot.overflow(text)):
        print(dim(text), end="", flush=True)
        say(bot, text, args, seed)
    if over:
        print(f"too long by {over} tokens for a context of {bot.max_len}: shorten it, or raise --max_seq_len\n")
        return history
    return [*earlier, exchange]


def system_message(args: argparse.Namespace) -> list[dict]:
    message = {"role": "system", "content": args.system or ""} | ({"tools": SCHEMAS} if args.tools else {})
    return [message] if args.system or args.tools else []


def converse(bot, args: argparse.Namespace) -> None:
    """Asks for automatic test or manual input, and does it."""
    print(bot.title)
    choice = None
    while choice not in ("0", "1"):
        choice = clean(input("[0] 自动测试 automatic test\n[1] 手动输入 manual input\n> ")).strip()
    automatic(bot, args) if choice == "0" else manual(bot, args)


def automatic(bot, args: argparse.Namespace) -> None:
    n = 0
    questions = ANSWERED_WITH_TOOLS if args.tools else ANSWERED
    for conversation in CONTINUED if args.model_mode == 0 else questions:
        history = []
        for text in conversation:
            if args.model_mode != 0:
                print(f"you> {text}")
            history = respond(bot, history, text, args, n)
            n += 1


def manual(bot, args: argparse.Namespace) -> None:
    try:
        import readline  # noqa: F401  arrow keys and history in input()
    except ImportError:
        pass
    print(dim("/clear 清空对话 forgets the conversation, /exit 退出 leaves"))
    history, n = [], 0
    while True:
        text = clean(input("you> ")).strip()
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            history = []
            print(dim("[已清空 forgotten]"))
        elif text:
            history = respond(bot, history, text, args, n)
            n += 1


def ask(bot, args: argparse.Namespace) -> None:
    if args.model_mode != 0:
        over = answer(bot, [], [{"role": "user", "content": args.ask}], args, args.seed)
    elif not (over := bot.overflow(args.ask)):
        say(bot, args.ask, args, args.seed)
    if over:
        raise DataError(f"--ask: too long by {over} tokens for a context of {bot.max_len}; raise --max_seq_len")


# ------------------------------------------------------------------------------------------------ score


def score(bot, questions: list[Question], args: argparse.Namespace) -> None:
    """Answers all questions; prints a table by skill, and last one line of JSON."""
    begin = time.perf_counter()

    def show(done: int) -> None:
        progress(done, len(questions), time.perf_counter() - begin)

    answers = answer_questions(bot, questions, args.score, show)
    seconds = time.perf_counter() - begin
    print_scoreboard(questions, answers, args.show_wrong)
    speed = {"seconds": round(seconds, 1), "tokens_per_second": round(bot.tokens / seconds)}
    result = {"score": {**count_right(questions, answers), "file": args.score, "model": bot.name, **speed}}
    if args.scores_out:
        details = [
            {"line": question.line, "skill": question.skill, "answer": answer.text, "right": question.is_right(answer)}
            for question, answer in zip(questions, answers, strict=True)
        ]
        content = json.dumps(result | {"questions": details}, ensure_ascii=False, indent=1)
        Path(args.scores_out).write_text(content + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))


def progress(done: int, total: int, seconds: float) -> None:
    """A bar on a terminal, five lines in a log."""
    if sys.stderr.isatty():
        bar, end = "#" * (30 * done // total), "\n" if done == total else ""
        print(f"\r[{bar:<30}] {done}/{total} questions, {seconds:.0f} s", end=end, file=sys.stderr, flush=True)
    elif 5 * done // total > 5 * (done - 1) // total:
        print(f"{done}/{total} questions, {seconds:.0f} s", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    args.ask, args.system = args.ask and clean(args.ask), args.system and clean(args.system)
    sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(errors="backslashreplace")
    questions = read_heldout(args.score) if args.score else None
    if args.scores_out and not Path(args.scores_out).resolve().parent.is_dir():
        raise UsageError(f"--scores_out {args.scores_out}: no such folder")
    try:
        bot = load(args)
        if questions:
            score(bot, questions, args)
        elif args.ask is not None:
            ask(bot, args)
        else:
            converse(bot, args)
    except (EOFError, KeyboardInterrupt) as end:
        print("\n再见 Bye")
        sys.exit(130 if isinstance(end, KeyboardInterrupt) and (questions or args.ask) else 0)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:  # weights that give no numbers
        raise CheckpointError(str(error)) from None


if __name__ == "__main__":
    cli.run(main)
