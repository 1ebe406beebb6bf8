"""Is it the reward that teaches? Three arms of equal minutes from the same weights: reinforcement learning, further SFT
on questions of the same kinds with a worked way to the answer, and reinforcement learning with a random reward.

python scripts/rl_arms.py grpo --from_weight out/reason_192.pth --seeds 42 43
python scripts/rl_arms.py agent --from_weight out/full_sft_192.pth --seeds 42 43 --markdown docs/experiments/rl.md

Runs that are done are not done again, so it can be stopped.
"""

import argparse
import hashlib
import json
import random
import statistics
import sys
from pathlib import Path

import _report
import environment
from _path import ROOT

import cli
from cli import find_device
from dataset.questions import Question, read_heldout, read_questions
from dataset.starter import chains, corpus, reason_rl
from evaluation.scoreboard import answer_questions, count_right
from model import checkpoint
from model.device import training_dtype
from model.inference.chatbot import AnswerSettings, load_chatbot
from trainer.rewards import REWARDS
from trainer.rl import MEASURED
from trainer.rollout import Generator, OneTurn, measure, shown
from trainer.tool_turns import ToolTurns

ARMS = {"rl": "reinforcement learning", "sft": "further SFT", "random": "random reward"}
ROWS = 6_000  # of the worked questions
TIERS = {"grpo": ("reason_rl_val", "reason_heldout"), "agent": ("agent_val",)}
SAMPLES = 4  # of each question, at temperature 1


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("script", choices=list(TIERS))
    parser.add_argument("--from_weight", type=Path, required=True, help="weights that all arms begin with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, for each")
    parser.add_argument("--measure", type=int, default=MEASURED, help="held-out questions of each kind")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "rl_arms")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the table to this file")
    args = parser.parse_args()
    args.out_dir = args.out_dir.resolve()
    data = corpus.ensure_starter()
    worked = write_worked(args.script, args.out_dir / f"{args.script}_worked.jsonl")
    found: dict[str, list[dict[str, float]]] = {"start": [scores(args, args.from_weight, data)]}
    for arm in args.arms:
        for seed in args.seeds:
            path = train(args, arm, seed, worked, data)
            found.setdefault(ARMS[arm], []).append(scores(args, path, data))
    lines = table(found)
    print("\n".join(["", *lines]))
    if args.markdown:
        told = f"{args.minutes:g} minutes each, seeds {' '.join(map(str, args.seeds))}; {_report.machine()}; "
        told += f"commit {_report.commit()}; `{_report.command()}`"
        with open(args.markdown, "a", encoding="utf-8") as file:
            file.write("\n".join(["", f"### Arms of {args.script}", "", *lines, "", told, ""]))


def write_worked(script: str, path: Path) -> Path:
    """Conversations with a worked way to the answer, of the kinds and in the shares of the questions."""
    rng = random.Random(0)
    if script == "grpo":
        rows = [corpus.to_messages(item) for item in reason_rl.make_questions(rng, ROWS, held=False)]
    else:
        kinds = rng.choices(list(chains.SHARES), list(chains.SHARES.values()), k=ROWS)
        tasks = chains.draw_tasks(rng, kinds, False, corpus.beyond_tools)
        rows = [[chains.stages.TOOLS_OFFERED, *chains.worked(task)] for task in tasks]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"conversations": row}, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def train(args: argparse.Namespace, arm: str, seed: int, worked: Path, data: Path) -> Path:
    """The weights of an arm; what is complete with these flags is not trained again."""
    name = f"{args.script}_{arm}_{seed}"
    flags = ["--from_weight", args.from_weight.resolve(), "--seed", seed, "--minutes", args.minutes]
    flags += ["--out_dir", args.out_dir, "--save_weight", name, "--from_resume", 1]
    if arm == "sft":
        length = ["--max_seq_len", 512, "--batch_size", 4, "--decay", 1]
        command = ["train_full_sft.py", "--data_path", worked, "--val_path", data / "sft_val.jsonl", *length]
    else:
        command = [f"train_{args.script}.py", "--measure", 0] + ["--reward", "random"] * (arm == "random")
    print(f"\n== {name}", flush=True)
    if code := environment.run([sys.executable, *map(str, [*command, *flags])], cwd=ROOT):
        sys.exit(code)
    return next(args.out_dir.glob(f"{name}_*.pth"))


def scores(args: argparse.Namespace, path: Path, data: Path) -> dict[str, float]:
    """Per cent right: of each kind of held-out questions one sample at temperature 1, of the scoreboard greedily. Kept
    beside the weights."""
    place = hashlib.sha256(f"{path.resolve()} {args.measure}".encode()).hexdigest()[:8]
    kept = args.out_dir / f"{args.script}.{path.stem}.{place}.scores.json"
    if kept.exists() and kept.stat().st_mtime > path.stat().st_mtime:
        return json.loads(kept.read_text(encoding="utf-8"))
    model, _ = checkpoint.load(path)
    tokenizer = checkpoint.tokenizer_of(path)
    agent = args.script == "agent"
    settings = argparse.Namespace(max_new_tokens=96 if agent else 128, thinking=int(not agent), failed_call_cost=0.0)
    play = (ToolTurns if agent else OneTurn)(tokenizer, REWARDS["right"], settings)
    found = {}
    with Generator(model, tokenizer, training_dtype(find_device()), 1024 if agent else 256) as generator:
        for kind, questions in kinds_of(args, data).items():
            with shown(f"{path.stem}, {kind}", len(questions) * SAMPLES, quiet=False) as show:
                found[kind] = 100 * measure(generator, questions, play, SAMPLES, show)["sampled"]
    asked = read_heldout(data / "heldout.jsonl")
    bot = load_chatbot(path, find_device(), None, AnswerSettings())
    found["all skills, greedy"] = count_right(asked, answer_questions(bot, asked, "heldout.jsonl"))["percent"]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def kinds_of(args: argparse.Namespace, data: Path) -> dict[str, list[Question]]:
    kinds: dict[str, list[Question]] = {}
    for file in TIERS[args.script]:
        for question in read_questions(data / f"{file}.jsonl"):
            name = question.skill if args.script == "agent" else file
            if len(kinds.setdefault(name, [])) < args.measure:
                kinds[name].append(question)
    return kinds


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """A row an arm: the mean over the seeds, and each of them."""
    kinds = list(found["start"][0])
    lines = [f"| | {' | '.join(kinds)} |", f"| --- |{' ---: |' * len(kinds)}"]
    for arm, runs in found.items():
        cells = []
        for kind in kinds:
            values = [run[kind] for run in runs]
            each = f" ({', '.join(f'{value:.1f}' for value in values)})" * (len(values) > 1)
            cells.append(f"{statistics.mean(values):.1f}{each}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    cli.run(main)
