"""Talk to a model, ask it one question, or score it on a held-out file.

python eval_model.py                                   # the SFT weights in out/: automatic test or manual input
python eval_model.py --model_mode 0                    # the pretrained weights continue a text
python eval_model.py --ask "Who are you?"              # one answer, nothing else
python eval_model.py --score dataset/starter_data/heldout.jsonl
python eval_model.py --load 1 --model_path FOLDER      # a Hugging Face folder
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dataset.chat import BOS_ID, EOS_ID, MARKER_IDS, PAD_ID, load_tokenizer, render_chat
from dataset.heldout import Question, read_heldout, scoreboard
from dataset.jsonl import DataError
from model import checkpoint
from model.adapters import load_adapter
from model.checkpoint import CheckpointError
from model.generation import SamplingParams, decode, generate_each
from model.model import compute_dtype
from trainer import cli, trainer
from trainer.cli import UsageError

ROOT = Path(__file__).resolve().parent
STAGES = {  # --model_mode: what it is called, its files, how to get them
    0: ("pretrained", ("pretrain",), "run python train_pretrain.py first"),
    1: ("SFT", ("full_sft",), "run python train_full_sft.py first"),
    2: ("RLHF", ("rlhf", "dpo"), "train them first"),
    3: ("reasoning", ("reason",), "train them first"),
}
STOP_IDS = (PAD_ID, BOS_ID, EOS_ID)  # end of document, beginning of another turn, end of turn
SCORE_TOKENS = 128  # longest answer when scoring

CONTINUED = [
    ["The capital of France is"], ["法国的首都是"], ["One sunny day, a cat"], ["小猫有一个"], ["猫属于"],
    ["A horse is"], ["7 + 15 ="], ["中文：我买帽子。\n英语："],
]  # fmt: skip
ANSWERED = [  # each a conversation: the user's messages
    ["Who are you?"], ["你是谁？"], ["What is the capital of France?", "And its population?"], ["7 + 15 = ?"],
    ["把“书”翻译成英语。"], ["Tell me a short story about a cat."], ["Sort these numbers: 7, 3, 9"],
    ["日本的首都是哪里？", "那人口呢？"],
]  # fmt: skip


def flag(text: str) -> bool:
    """Accepts 0 and 1, and MiniMind's True and False."""
    if text.lower() in ("0", "false", "1", "true"):
        return text.lower() in ("1", "true")
    raise argparse.ArgumentTypeError(f"{text} is neither 0 nor 1")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python eval_model.py [options]   (--help lists them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("which model").add_argument
    add("--load", type=int, choices=(0, 1), default=0, help="0 = raw .pth (default), 1 = Hugging Face folder")
    add("--model_mode", type=int, choices=tuple(STAGES), default=1,
        help="0 = pretrained, 1 = SFT (default), 2 = RLHF, 3 = reasoning")  # fmt: skip
    add("--out_dir", default=str(ROOT / "out"), help="where the weights are")
    add("--weight", metavar="FILE", help="this .pth instead of the one of the stage in --out_dir")
    add("--model_path", metavar="FOLDER", help="the Hugging Face folder of --load 1")
    add("--hidden_size", type=int, help="if weights of several sizes are in --out_dir (default: the newest)")
    add("--use_moe", type=flag, metavar="{0,1}", help="if both kinds are in --out_dir (default: the newest)")
    add("--lora_name", metavar="NAME", help="adapter out_dir/lora/NAME_HIDDEN.pth")

    add = parser.add_argument_group("how it answers").add_argument
    add("--temperature", type=float, default=0.7, help="0 = always the likeliest token (default: 0.7)")
    add("--top_p", type=float, default=0.9, help="choose among the likeliest tokens of this share (default: 0.9)")
    add("--max_seq_len", type=int, help="tokens of prompt and answer (default: as it was trained)")
    add("--max_new_tokens", type=int, help=f"tokens of an answer (default: 512; --score: {SCORE_TOKENS})")
    add("--history_cnt", type=int, default=8, help="earlier messages the model sees, an even number (default: 8)")
    add("--system", metavar="TEXT", help="system message")
    add("--stream", type=flag, metavar="{0,1}", default=True, help="show the answer as it is generated (default: 1)")
    add("--seed", type=int, help="the same answers every time")
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=list(cli.DTYPES), help="default: bf16 where the hardware computes in it, else fp32")

    group = parser.add_argument_group("instead of a conversation")
    add = group.add_mutually_exclusive_group().add_argument
    add("--ask", metavar="TEXT", help="print the answer to this, or the continuation with --model_mode 0")
    add("--score", metavar="FILE", help="accuracy by skill on a held-out JSONL file, greedy")
    group.add_argument("--scores_out", metavar="FILE", help="with --score: every answer and the scores, as JSON")
    group.add_argument("--show_wrong", type=int, default=0, metavar="N", help="with --score: print N wrong answers")
    args = parser.parse_args()

    if (args.load == 1) != bool(args.model_path):
        parser.error("--load 1 and --model_path FOLDER belong together")
    if (args.scores_out or args.show_wrong) and not args.score:
        parser.error("--scores_out and --show_wrong need --score FILE")
    if args.history_cnt < 0 or args.history_cnt % 2:
        parser.error(f"--history_cnt {args.history_cnt}: must be even, as questions and answers come in pairs")
    if args.max_seq_len is not None and args.max_seq_len < 16:
        parser.error(f"--max_seq_len {args.max_seq_len}: must be at least 16")
    if args.ask is not None and not args.ask.strip():
        parser.error("--ask: there is nothing to answer")
    try:
        new = 1 if args.max_new_tokens is None else args.max_new_tokens
        SamplingParams(temperature=args.temperature, top_p=args.top_p, max_new_tokens=new)
    except ValueError as error:
        parser.error(f"--{error}")
    return args


# ------------------------------------------------------------------------------------------------ the model


def find_weights(args: argparse.Namespace) -> Path:
    """The file of the stage in out_dir; the newest, if there are several."""
    if args.weight:
        return Path(args.weight)
    name, stages, remedy = STAGES[args.model_mode]
    kind = "(_moe)?" if args.use_moe is None else "_moe" * args.use_moe
    pattern = re.compile(rf"({'|'.join(stages)})_{args.hidden_size or '[0-9]+'}{kind}\.pth")
    found = [path for path in Path(args.out_dir).glob("*.pth") if pattern.fullmatch(path.name)]
    if not found:
        which = " of this size or kind" if args.hidden_size or args.use_moe is not None else ""
        files = " or ".join(f"{stage}_*.pth" for stage in stages)
        raise CheckpointError(
            f"no {name} weights{which} ({files}) in {args.out_dir}: {remedy}, or give --out_dir or --weight"
        )
    found.sort(key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        print(f"note: {names}: taking the newest, {found[-1].name}; --hidden_size or --weight choose", file=sys.stderr)
    return found[-1]


def load_chatbot(args: argparse.Namespace):
    """A Chatbot, or for a Hugging Face folder with another tokenizer a TransformersChatbot."""
    device = trainer.find_device(args.device)
    tokenizer = load_tokenizer()
    if args.load == 1:
        path = Path(args.model_path)
        if path.is_dir() and (path / "config.json").exists():
            tokenizer = load_own_tokenizer(path)
        if tokenizer is None:
            if args.lora_name:
                raise UsageError(f"--lora_name: {path} has a tokenizer of another kind, and adapters are for our own")
            print(f"note: {path} has a tokenizer of another kind: answering through transformers", file=sys.stderr)
            return TransformersChatbot(path, device, args)
    else:
        path = find_weights(args)
    model, meta = checkpoint.load(path, device)
    if args.lora_name:
        kind = "_moe" if model.config.is_moe else ""
        adapter = Path(args.out_dir) / "lora" / f"{args.lora_name}_{model.config.hidden_size}{kind}.pth"
        if not adapter.exists():
            raise CheckpointError(f"--lora_name {args.lora_name}: there is no {adapter}; check the name and --out_dir")
        load_adapter(adapter, model, "chosen", base=path)
    if model.config.vocab_size < tokenizer.get_vocab_size():
        raise CheckpointError(
            f"{path} has {model.config.vocab_size} tokens, the tokenizer {tokenizer.get_vocab_size()}: "
            "they do not belong together; train again, or give a Hugging Face folder with its own tokenizer"
        )
    if not meta and args.load == 0:
        print(f"note: {path} does not say which tokenizer it needs: taking model/tokenizer", file=sys.stderr)
    trained_len = meta.get("finished", {}).get("max_seq_len", 2048)
    return Chatbot(path, model, tokenizer, trained_len, args)


def load_own_tokenizer(folder: Path):
    """The tokenizer of a Hugging Face folder if it is one of ours, with the same markers; else None."""
    try:
        tokenizer = load_tokenizer(folder)
    except (FileNotFoundError, ValueError):
        return None
    return tokenizer if all(tokenizer.token_to_id(m) == i for m, i in MARKER_IDS.items()) else None


class Chatbot:
    """Prompts are texts, which are continued, or lists of messages, which are answered."""

    def __init__(self, path: Path, model, tokenizer, trained_len: int, args: argparse.Namespace):
        device = model.model.norm.weight.device
        self.dtype = cli.DTYPES[args.dtype] if args.dtype else compute_dtype(device)
        self.model, self.tokenizer, self.args = model.to(self.dtype), tokenizer, args
        self.max_len = min(args.max_seq_len or trained_len, model.config.max_position_embeddings)
        self.opening = "<think>\n" if args.model_mode == 3 else ""  # of each answer; the prompt ends with it
        self.tokens = 0  # generated so far
        precision = str(self.dtype).removeprefix("torch.")
        size = f"{model.num_parameters() / 1e6:.1f} M parameters"
        self.title = f"{path.name}: {size}, {precision} on {device}, context {self.max_len} tokens"
        self.name = str(path)

    def encode(self, prompt: str | list[dict]) -> list[int]:
        if isinstance(prompt, str):
            return [PAD_ID, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        thinking = True if self.opening else None  # None: as the model likes
        return render_chat(self.tokenizer, prompt, add_generation_prompt=True, enable_thinking=thinking)[0]

    def overflow(self, prompt: str | list[dict]) -> int:
        """By how many tokens the prompt is too long to leave room for an answer; 0 if it fits."""
        reserved = min(self.args.max_new_tokens or 128, self.max_len // 2)
        return max(0, len(self.encode(prompt)) + reserved - self.max_len)

    def params(self, default_tokens: int, **changes) -> SamplingParams:
        new = self.args.max_new_tokens or default_tokens
        return SamplingParams(max_new_tokens=new, stop_token_ids=STOP_IDS, **changes)

    def stream(self, prompt: str | list[dict], seed: int | None) -> Iterator[str]:
        """The answer, piece by piece."""
        sampling = self.params(512, temperature=self.args.temperature, top_p=self.args.top_p, seed=seed)
        yield self.opening
        for (event,) in decode(self.model, [self.encode(prompt)], [sampling], self.tokenizer, max_len=self.max_len):
            self.tokens += 1
            yield event.text

    def answer_all(self, prompts: list[list[dict]]) -> Iterator[tuple[int, str]]:
        """(number, answer) of all prompts, greedy, as they are done."""
        sampling = self.params(SCORE_TOKENS, temperature=0)
        ids = [self.encode(prompt) for prompt in prompts]
        for i, result in generate_each(self.model, ids, sampling, self.tokenizer, max_len=self.max_len):
            self.tokens += len(result.token_ids)
            yield i, self.opening + result.text


class TransformersChatbot:
    """Any other model and tokenizer, by transformers: the same methods, slower, the answer in one piece."""

    def __init__(self, path: Path, device: torch.device, args: argparse.Namespace):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise UsageError(f"{path} needs transformers: pip install transformers") from None
        dtype = cli.DTYPES[args.dtype] if args.dtype else compute_dtype(device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
        except Exception as error:  # transformers raises nearly anything for a folder that it cannot load
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise CheckpointError(f"{path}: transformers cannot load it: {reason}") from None
        self.args, self.tokens, self.name = args, 0, str(path)
        self.max_len = args.max_seq_len or min(2048, getattr(self.model.config, "max_position_embeddings", 2048))
        self.title = f"{path.name}: {self.model.num_parameters() / 1e6:.1f} M parameters, through transformers"

    def encode(self, prompt: str | list[dict]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if not self.tokenizer.chat_template:
            raise CheckpointError(f"{self.name} has no chat template: use --model_mode 0 to continue texts")
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]

    overflow = Chatbot.overflow

    def stream(self, prompt: str | list[dict], seed: int | None, greedy: bool = False) -> Iterator[str]:
        ids = torch.tensor([self.encode(prompt)], device=self.model.device)
        if seed is not None:
            torch.manual_seed(seed)
        sampling = {"do_sample": False}
        if self.args.temperature > 0 and not greedy:
            sampling = {"do_sample": True, "temperature": self.args.temperature, "top_p": self.args.top_p, "top_k": 0}
        new = min(self.args.max_new_tokens or (SCORE_TOKENS if greedy else 512), self.max_len - ids.shape[1])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **sampling)
        out = out[0, ids.shape[1] :]
        self.tokens += len(out)
        yield self.tokenizer.decode(out, skip_special_tokens=True)

    def answer_all(self, prompts: list[list[dict]]) -> Iterator[tuple[int, str]]:
        for i, prompt in enumerate(prompts):
            yield i, "".join(self.stream(prompt, None, greedy=True))


def final_answer(text: str) -> str:
    """Without the thinking before it."""
    return (text.partition("</think>")[2] if text.startswith("<think>") else text).strip()


# ------------------------------------------------------------------------------------------------ conversation


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def clean(text: str) -> str:
    """Bytes of the terminal that are not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def show(text: str) -> None:
    """On a terminal, the thinking is dim."""
    if sys.stdout.isatty():
        text = text.replace("<think>", "\033[2m<think>").replace("</think>", "</think>\033[0m")
    print(text, end="", flush=True)


def say(bot, prompt: str | list[dict], args: argparse.Namespace, seed: int | None) -> str:
    """Show the answer as it comes, then its speed. Ctrl-C ends the answer, not the conversation."""
    begin, before, pieces, stopped = time.perf_counter(), bot.tokens, [], ""
    try:
        for piece in bot.stream(prompt, seed):
            pieces.append(piece)
            if args.stream:
                show(piece)
    except KeyboardInterrupt:
        stopped = ", stopped"
    text = "".join(pieces)
    if not args.stream:
        show(text)
    if "<think>" in text and "</think>" not in text and sys.stdout.isatty():
        print("\033[0m", end="")
    n, seconds = bot.tokens - before, time.perf_counter() - begin
    print("\n" + dim(f"[{n} tokens, {n / seconds:.0f} tokens/s{stopped}]") + "\n", flush=True)
    return final_answer(text)


def respond(bot, history: list[dict], text: str, args: argparse.Namespace, n: int) -> list[dict]:
    """Answer a user's message (the n-th of all), or continue a text; returns the conversation as the model saw it, with
    the answer."""
    system, prompt, dropped = system_message(args), text, 0
    if args.model_mode != 0:
        kept = history[-args.history_cnt :] if args.history_cnt else []
        prompt = [*system, *kept, {"role": "user", "content": text}]
        while bot.overflow(prompt) and len(prompt) > len(system) + 1:
            del prompt[len(system) : len(system) + 2]
            dropped += 2
    if over := bot.overflow(prompt):
        print(f"too long by {over} tokens for a context of {bot.max_len}: shorten it, or raise --max_seq_len\n")
        return history
    if dropped:
        print(dim(f"[the conversation outgrew {bot.max_len} tokens: its {dropped} oldest messages were dropped]"))
    show(dim(text) if args.model_mode == 0 else "minimind> ")
    # Another seed for each message: the same question twice need not get the same answer.
    answer = say(bot, prompt, args, None if args.seed is None else args.seed + n)
    return [] if args.model_mode == 0 else [*prompt[len(system) :], {"role": "assistant", "content": answer}]


def system_message(args: argparse.Namespace) -> list[dict]:
    return [{"role": "system", "content": args.system}] if args.system else []


def converse(bot, args: argparse.Namespace) -> None:
    """Asks for automatic test or manual input, and does it."""
    print(bot.title)
    choice = None
    while choice not in ("0", "1"):
        choice = clean(input("[0] 自动测试 automatic test\n[1] 手动输入 manual input\n> ")).strip()
    automatic(bot, args) if choice == "0" else manual(bot, args)


def automatic(bot, args: argparse.Namespace) -> None:
    n = 0
    for conversation in CONTINUED if args.model_mode == 0 else ANSWERED:
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
    prompt = args.ask if args.model_mode == 0 else [*system_message(args), {"role": "user", "content": args.ask}]
    if over := bot.overflow(prompt):
        raise DataError(f"--ask: too long by {over} tokens for a context of {bot.max_len}; raise --max_seq_len")
    for piece in bot.stream(prompt, args.seed) if args.stream else ["".join(bot.stream(prompt, args.seed))]:
        print(piece, end="", flush=True)
    print()


# ------------------------------------------------------------------------------------------------ score


def score(bot, questions: list[Question], args: argparse.Namespace) -> None:
    """Answers all questions; prints a table by skill, and last one line of JSON."""
    for question in questions:
        if bot.overflow(question.messages):
            text = f"the question leaves no room for an answer in a context of {bot.max_len}"
            raise DataError(f"{args.score}, line {question.line}: {text}; raise --max_seq_len")
    begin, answers = time.perf_counter(), [""] * len(questions)
    for done, (i, text) in enumerate(bot.answer_all([question.messages for question in questions]), 1):
        answers[i] = final_answer(text)
        progress(done, len(questions), time.perf_counter() - begin)
    seconds = time.perf_counter() - begin

    totals = scoreboard(questions, answers, args.show_wrong)
    speed = {"seconds": round(seconds, 1), "tokens_per_second": round(bot.tokens / seconds)}
    result = {"score": {**totals, "file": args.score, "model": bot.name, **speed}}
    if args.scores_out:
        pairs = zip(questions, answers, strict=True)
        details = [{"line": q.line, "skill": q.skill, "answer": text, "right": q.is_right(text)} for q, text in pairs]
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


def main() -> None:
    args = arguments()
    args.ask, args.system = args.ask and clean(args.ask), args.system and clean(args.system)
    sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(errors="backslashreplace")
    questions = read_heldout(args.score) if args.score else None
    if args.scores_out and not Path(args.scores_out).resolve().parent.is_dir():
        raise UsageError(f"--scores_out {args.scores_out}: no such folder")
    try:
        bot = load_chatbot(args)
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
