"""Measure a model on benchmarks: the questions that come with the repository, or published files by their folder.

python scripts/evaluate.py                                       # the newest SFT weights in out/, our own questions
python scripts/evaluate.py --model out/full_sft_512.pth --data DIR --shots 5     # the published ones that are there
python scripts/evaluate.py --tasks cmmlu --data DIR --train_files pretrain.jsonl sft.jsonl      # contaminated?
python scripts/evaluate.py --model NEW.pth --against OLD.pth     # or OLD.eval.json: difference with its interval
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

import _path

import cli
from cli import UsageError
from dataset.jsonl import DataError
from dataset.overlap import overlap
from evaluation import report
from evaluation.asking import Examinee, exact_dtype, is_chat_model
from evaluation.generative import run_generative
from evaluation.multiple_choice import FORMS, Result, needed, run_choice, run_pairs
from evaluation.tasks import OURS, PUBLISHED, Task, read_task
from model.checkpoint import CheckpointError
from model.device import DTYPES
from model.files import write_bytes
from model.inference.chatbot import AnswerSettings, load_chatbot

SOLUTION_TOKENS = 256  # of an answer that is generated


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(usage="python scripts/evaluate.py [options]   (--help lists them)", description=__doc__)
    cli.add_model_flags(parser, _path.ROOT / "out")
    add = parser.add_argument_group("what is asked").add_argument
    names = f"{', '.join(OURS)} (ours), {', '.join(PUBLISHED)}"
    add("--tasks", metavar="A,B", help=f"{names}; or paths of JSONL files (default: those in --data, else ours)")
    add("--data", metavar="DIR", help="folder with cmmlu/, mmlu/, ..., or the folder of the one task")
    add("--shots", type=int, default=0, help="worked examples before each question (default: 0)")
    add("--limit", type=int, help="this many questions of each task, spread over all of it")
    add("--forms", default=",".join(FORMS), help=f"of multiple choice (default: {','.join(FORMS)})")
    add("--chat", type=cli.flag, metavar="{0,1}", help="1 = ask in a chat, 0 = as a text to continue (default: 0 for "
        "weights of pretraining and folders without a chat template)")  # fmt: skip
    add("--too_long", choices=("cut", "refuse"), default="cut", help="prompts longer than the context: cut = they lose "
        "their beginning, as in lm-evaluation-harness, and are counted; refuse = an error (default: cut)")  # fmt: skip
    add = parser.add_argument_group("problems that are answered by generation").add_argument
    add("--samples", type=int, default=1, help="answers to each, for pass@k (default: 1, the likeliest)")
    add("--temperature", type=float, default=0.7, help="with several samples (default: 0.7)")
    add("--seed", type=cli.seed, default=0, help="of the samples (default: 0)")
    add("--max_new_tokens", type=int, default=SOLUTION_TOKENS, help=f"of an answer (default: {SOLUTION_TOKENS})")
    add = parser.add_argument_group("how it computes").add_argument
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=tuple(DTYPES), help="default: fp32 on a CPU, elsewhere bf16 where the hardware does it")
    add("--max_seq_len", type=int, help="tokens of context (default: as it was trained)")
    add = parser.add_argument_group("what comes of it").add_argument
    add("--train_files", nargs="+", metavar="FILE", default=[], help="look for the questions in this training "
        "data, or in a folder of its tokens, such as out/cache")  # fmt: skip
    add("--against", metavar="PATH", help="another model, or the JSON file of its evaluation: the paired difference")
    add("--out", metavar="FILE", help="JSON with every answer (default: beside the weights, NAME.eval.json)")
    add("--markdown", metavar="FILE", help="the table as Markdown")
    args = parser.parse_args(argv)
    cli.check_model_flags(parser, args)
    args.forms = tuple(form for form in args.forms.split(",") if form)
    if unknown := set(args.forms) - set(FORMS) or not args.forms:
        parser.error(f"--forms {unknown if args.forms else ''}: choose among {', '.join(FORMS)}")
    for name, low in (("shots", 0), ("limit", 1), ("samples", 1), ("max_new_tokens", 1), ("max_seq_len", 16)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {low}")
    if args.samples > 1 and not args.temperature > 0:
        parser.error("--temperature must be above 0 with several --samples: they would all be the same")
    return args


def read_tasks(args: argparse.Namespace) -> list[Task]:
    if args.tasks is None:
        names = [name for name in PUBLISHED if (Path(args.data) / name).is_dir()] if args.data else OURS
        if not names:
            raise UsageError(f"--data {args.data}: no folder of {', '.join(PUBLISHED)} in it; --tasks says what it is")
    else:
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    tasks = [read_task(name, args.data) for name in names]
    if not tasks:
        raise UsageError("--tasks names nothing")
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--tasks: two are called {twice}; give a copy of one file another name")
    for task in tasks:
        if args.limit and args.limit < len(task.questions):  # every part of a file that is sorted by subject
            step = len(task.questions) / args.limit
            task.questions = [task.questions[int(i * step)] for i in range(args.limit)]
    return tasks


def load(path: Path, args: argparse.Namespace, generates: bool) -> Examinee:
    device = cli.find_device(args.device)
    dtype = exact_dtype(device, args.dtype)
    temperature = args.temperature if args.samples > 1 else 0.0
    settings = AnswerSettings(args.max_seq_len, args.max_new_tokens, temperature, 1.0)
    bot = load_chatbot(path, device, dtype, settings, tokenizer=args.tokenizer, compiled=None if generates else False)
    chat = is_chat_model(bot, path) if args.chat is None else args.chat
    return Examinee(bot, chat)


def evaluate(examinee: Examinee, task: Task, args: argparse.Namespace) -> Result:
    """One task from its first question to its rows."""
    examinee.cut = examinee.moved = 0
    forms = len(needed(args.forms)) if task.kind == "choice" else args.samples
    bar = report.Bar(task.name, len(task.questions) * forms)
    if task.kind == "choice":
        result = run_choice(examinee, task, args.shots, args.forms, bar)
    elif task.kind == "pairs":
        result = run_pairs(examinee, task, bar)
    else:
        result = run_generative(examinee, task, args.shots, args.samples, args.seed, bar)
    bar.close()
    if examinee.cut and args.too_long == "refuse":
        text = f"{examinee.cut} of its prompts are longer than the context of {examinee.max_len} tokens"
        raise DataError(f"{task.name}: {text}; lower --shots, raise --max_seq_len, or give --too_long cut")
    if examinee.cut:
        result.notes.append(f"prompts that lost their beginning to fit {examinee.max_len} tokens: {examinee.cut}")
    if examinee.moved:
        result.notes.append(f"{examinee.moved} answers would melt into the prompt's last token: read as tokens of "
                            "their own")  # fmt: skip
    shots = [len(examples) for examples in task.shots.values()]
    if args.shots and min(shots, default=0) < args.shots:
        result.notes.append(f"there are {min(shots, default=0)} worked examples of some subjects, not {args.shots}")
    if args.train_files:
        found = overlap(task.texts(), args.train_files, examinee.bot.tokenizer)
        result.overlap, result.overlap_checked = found.per_question, found.checked
    return result


def evaluate_model(path: Path, tasks: list[Task], args: argparse.Namespace) -> tuple[list[Result], dict]:
    """The results of all tasks, and the facts about them."""
    examinee = load(path, args, any(task.kind in ("problems", "heldout") for task in tasks))
    how = "asked in a chat" if examinee.chat else "texts to continue"
    print(f"{examinee.bot.title}; {how}", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    results = [evaluate(examinee, task, args) for task in tasks]
    seconds = round(time.perf_counter() - begin, 1)
    facts = {"model": str(path), "chat": examinee.chat, "context": examinee.max_len, "seconds": seconds}
    facts |= {"limit": args.limit, "train_files": list(map(str, args.train_files))}
    return results, facts


def result_path(path: Path) -> Path:
    return path.with_name(f"{path.stem if path.suffix == '.pth' else path.name}.eval.json")


def read_earlier(file: Path, weights: Path, named: bool) -> dict | None:
    """What was measured before on the same weights. named: by --out. UsageError for another file of that name."""
    if not file.exists():
        return None
    try:
        earlier = report.read_result(file)
    except DataError:
        raise UsageError(f"--out {file}: there is another file of that name; give another") from None
    if named and Path(earlier.get("model", weights)).resolve() != weights.resolve():
        raise UsageError(f"--out {file}: it holds what {earlier['model']} was measured at; give another")
    newest = max(p.stat().st_mtime for p in ([weights, *weights.glob("*")] if weights.is_dir() else [weights]))
    return earlier if file.stat().st_mtime > newest else None


def write_result(file: Path, content: dict, earlier: dict | None) -> None:
    """Tasks that were measured before in the same way stay in the file; else the file is kept as FILE.1, .2, ..."""
    if earlier and all(earlier.get(name) == content[name] for name in ("chat", "context")):
        content = content | {part: earlier[part] | content[part] for part in ("tasks", "answers")}
    elif earlier:
        copy = next(path for n in itertools.count(1) if not (path := Path(f"{file}.{n}")).exists())
        os.replace(file, copy)
        print(f"note: {file} was measured in another way (chat, context): kept as {copy}", file=sys.stderr)
    write_bytes(file, (json.dumps(content, ensure_ascii=False) + "\n").encode())


def main() -> None:
    args = arguments()
    path = cli.model_path(args)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; check --model")
    tasks = read_tasks(args)
    out = Path(args.out) if args.out else result_path(path)
    read_earlier(out, path, bool(args.out))  # a fault of it is told now, not after hours
    other = None
    if args.against and args.against.endswith(".json"):
        other = report.read_result(args.against)
    elif args.against and not Path(args.against).exists():
        raise CheckpointError(f"{args.against}: no such file or folder; check --against")
    results, facts = evaluate_model(path, tasks, args)
    content = report.as_json(results, facts)
    print(report.as_text(results))
    write_result(out, content, read_earlier(out, path, bool(args.out)))
    if args.markdown:
        told = {"command": f"python scripts/evaluate.py {' '.join(sys.argv[1:])}"} | facts
        write_bytes(Path(args.markdown), report.as_markdown(results, path.name, told).encode())
    print(f"wrote {out}{f', {args.markdown}' if args.markdown else ''}", file=sys.stderr)
    if args.against:
        other = other or report.as_json(*evaluate_model(Path(args.against), tasks, args))
        print(f"\nagainst {args.against}:")
        print("\n".join(report.compare(other, content)))


if __name__ == "__main__":
    cli.run(main)
