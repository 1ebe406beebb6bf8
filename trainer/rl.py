"""Around the loops of reinforcement learning: their flags, the adapter, questions of one turn, and what people look at.

figures = Figures(run, held_out, play)     # before the loop: measures; finish() measures again, prints and draws
"""

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cli import UsageError
from dataset.jsonl import DataError
from dataset.questions import Question, Questions, read_heldout
from model import checkpoint
from model.adapters import save_adapter
from model.files import write_bytes
from model.model import LoRAConfig, add_lora
from trainer.report import pyplot, read_log
from trainer.rewards import REWARDS
from trainer.rollout import Collected, Generator, OneTurn, Rollout, interval, measure, policy_of, shown
from trainer.run import Run

MEASURED = 500  # questions that are asked before and after
FOLLOWED = 100  # and at each validation on the way


# ------------------------------------------------------------------------------------------------ flags


def add_rollout_flags(parser: argparse.ArgumentParser) -> Callable:
    """Those that all scripts of reinforcement learning have; returns the group's add_argument, for those of one."""
    add = parser.add_argument_group("reinforcement learning").add_argument
    add("--group_size", type=int, default=8, help="answers to each of --batch_size questions (default: %(default)s)")
    add("--max_new_tokens", type=int, default=128, help="of an answer; one that needs more is cut off and worth 0")
    add("--refills", type=int, default=2, help="times that further questions are drawn in place of those whose answers "
        "are all worth the same (default: 2)")  # fmt: skip
    add("--enough", type=float, default=0.5, help="share of --batch_size groups that need no refill (default: 0.5)")
    add("--updates_per_rollout", type=int, default=1, help="passes over the same answers (default: %(default)s)")
    add("--rows", type=int, default=16, help="rows of --max_seq_len tokens that are computed at once (default: 16)")
    add("--beta", type=float, default=0.0, help="weight of KL(policy || start), exact over the whole vocabulary")
    add("--start_share", type=float, default=0.5, help="of the weights it begins with, in the mean that is written: "
        "what they knew besides is kept (default: 0.5)")  # fmt: skip
    add("--reward", choices=list(REWARDS), default="right", help="random: worth nothing, must teach nothing")
    add("--thinking", type=int, choices=(0, 1), default=1, help="1 = answers begin with thinking (default: 1)")
    add("--sample_interval", type=int, default=10, help="steps between samples in the .md file (default: 10)")
    add("--measure", type=int, default=MEASURED, help="held-out questions before and after, 0 = none (default: 500)")
    add("--lora_name", help="train an adapter of this name, which out_dir/lora holds, and leave the weights alone")
    add("--lora_rank", type=int, default=32, help="of the adapter (default: 32)")
    return add


def check_rollout_flags(args: argparse.Namespace) -> None:
    """UsageError for what cannot be."""
    lowest = {"group_size": 2, "max_new_tokens": 1, "refills": 0, "enough": 0, "updates_per_rollout": 1, "rows": 1}
    for name, low in (lowest | {"beta": 0, "sample_interval": 0, "measure": 0, "lora_rank": 1}).items():
        if not vars(args)[name] >= low:
            raise UsageError(f"--{name} {vars(args)[name]}: must be at least {low}")
    if not 0 <= args.start_share < 1:
        raise UsageError(f"--start_share {args.start_share}: must be at least 0 and below 1")
    if args.eval_tasks:
        raise UsageError("--eval_tasks: not with reinforcement learning; scripts/evaluate.py asks its weights")
    if args.accumulation_steps != 1:
        raise UsageError("--accumulation_steps: rollouts are cut into batches by --rows; leave it out")
    if args.from_weight == "none":
        raise UsageError("--from_weight none: random weights never answer right, so there is nothing to learn from")
    if args.max_new_tokens >= args.max_seq_len:
        raise UsageError(f"--max_new_tokens {args.max_new_tokens} leaves no room in --max_seq_len {args.max_seq_len}")
    if args.lora_name and not re.fullmatch(r"[\w-]+", args.lora_name):
        raise UsageError(f"--lora_name {args.lora_name}: it names a file; use letters, digits, _ and -")


def add_adapter(run: Run) -> Callable:
    """What Run.finish() saves with; with --lora_name the model gets an adapter, which alone is trained."""
    args, name = run.args, run.args.lora_name
    if not name:
        return checkpoint.save
    torch.manual_seed(args.seed)  # the same on all processes
    add_lora(run.model, name, LoRAConfig(args.lora_rank, args.lora_rank))

    def save(path, model, meta, tokenizer):
        save_adapter(path, model, name, meta, tokenizer)

    return save


def start_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights as they are, for Run.average_with(). Of an adapter's update B A it has B alone, which
    begins at 0: then the mean of the two updates is (1 - share) B A."""
    return {name: w for name, w in copy.deepcopy(model).cpu().state_dict().items() if ".lora_A_" not in name}


def fitting(questions: Questions, play: OneTurn, args: argparse.Namespace, quiet: bool) -> Questions:
    """Those whose prompt leaves room for an answer of --max_new_tokens; the others are counted in one line. DataError
    if that leaves none."""
    room = args.max_seq_len - args.max_new_tokens
    fit = Questions(question for question in questions if len(play.begin(question, 0, 0).ids) <= room)
    fit.sha256 = questions.sha256
    remedy = f"raise --max_seq_len {args.max_seq_len} or lower --max_new_tokens {args.max_new_tokens}"
    if not fit:
        raise DataError(f"no question leaves room for an answer: {remedy}")
    if len(fit) < len(questions) and not quiet:
        print(f"{len(questions) - len(fit)} questions left out, too long for an answer; {remedy}", file=sys.stderr)
    return fit


# ------------------------------------------------------------------------------------------------ what people look at


class Figures:
    """Measures before, during and after the training, gathers what a step tells, writes samples and curves.

    held_out: questions, None for no measuring. play: as collect()'s, with the true reward. tiers: what is measured
    before and after, by name (default: held_out and other_tiers())."""

    def __init__(self, run: Run, held_out: Questions | None, play: OneTurn, tiers: dict[str, list] | None = None):
        self.run, self.play, self.args = run, play, run.args
        self.held_out = held_out or []
        self.tiers = (
            {"held-out": self.held_out[: run.args.measure], **other_tiers(run.args)} if tiers is None else tiers
        )
        self.of_step: dict[str, float] = {}
        self.sums, self.gap, self.clock = {}, 0.0, 0.0
        self.before = self._measure_all()  # of the weights that the run began with, a resumed one too

    def validate(self) -> None:
        """Some of the held-out questions, once greedy and once at temperature 1."""
        found = self._measure(self.held_out[:FOLLOWED], samples=1)
        self.run.log_validation({"val_accuracy": found["greedy"], "val_sampled": found["sampled"]} if found else {})

    def collected(self, collected: Collected) -> None:
        """What the rollouts of this step tell."""
        self.of_step, self.gap = dict(collected.figures), 0.0
        self.clock = time.perf_counter()
        interval = self.args.sample_interval
        if interval and self.run.progress.step // max(self.args.updates_per_rollout, 1) % interval == 0:
            append_samples(self.run.path(".md"), self.run.progress.step, collected.samples, self.run.processes.is_main)

    def batch(self, metrics: dict, log_probs: Tensor, batch: dict, first: bool) -> None:
        """What a batch of an update tells; first: it is the first update of its rollouts."""
        for name, value in metrics.items():
            if name == "expert_load":
                self.of_step[name] = value
            else:
                total, tokens = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + float(value) * batch["tokens"], tokens + batch["tokens"]
        if first and len(log_probs):
            gap = (log_probs - batch["engine_log_probs"]).abs().nan_to_num(0.0)
            self.gap = max(self.gap, float(gap.max()))

    def of_update(self) -> dict:
        """For Run.update(): means over the tokens of this process' batches."""
        means = {name: total / max(tokens, 1) for name, (total, tokens) in self.sums.items()}
        figures = self.of_step | means | {"engine_gap": self.gap}
        figures["training_seconds"] = round(time.perf_counter() - self.clock, 3)
        self.sums, self.clock = {}, time.perf_counter()
        self.of_step.pop("rollout_seconds", None)  # the next update has the same rollouts
        return figures

    def finish(self) -> None:
        """Measure again, print the table, draw the curves."""
        after = self._measure_all()
        run = self.run
        if not run.processes.is_main:
            return
        print_table(self.before, after)
        figures = {
            f"val_{name}_{what}{when}": found[name][what]
            for when, found in (("_before", self.before), ("", after))
            for name in found
            for what in SHOWN
        }
        run.log_validation({"val_accuracy": next(iter(after.values()))["greedy"]} | figures if after else {})

    def _measure_all(self) -> dict[str, dict]:
        found = {}
        for name, questions in self.tiers.items():
            if questions and self.args.measure:
                found[name] = self._measure(questions, samples=4)
        return found

    def _measure(self, questions: list[Question], samples: int) -> dict[str, float]:
        """By all processes together, each its share."""
        run, args = self.run, self.args
        mine = questions[run.processes.rank :: run.processes.count]
        if not questions:
            return {}
        what = f"asking {len(questions)} held-out questions"
        with Generator(policy_of(run), run.tokenizer, run.dtype, args.max_seq_len, seed=0) as generator:
            with shown(what, len(mine) * samples, not run.processes.is_main) as show:
                found = measure(generator, mine, self.play, samples, show)
        total = run.processes.total
        n = found.pop("n")
        return {name: total(value * n) / len(questions) for name, value in found.items()} | {"n": len(questions)}


SHOWN = {"greedy": "greedy pass@1", "sampled": "pass@1 at T = 1", "pass_at_k": "pass@4 at T = 1"}


def print_table(before: dict[str, dict], after: dict[str, dict]) -> None:
    if not after:
        return
    print(f"{'questions':<27}{'':<18}{'before':>16}{'after':>16}")
    for name, found in after.items():
        for what, title in SHOWN.items():
            shares = [of[name][what] for of in (before, after)]
            cells = [f"{share:.1%} \u00b1 {interval(share, found['n']):.1%}" for share in shares]
            print(f"{name + ', ' + str(found['n']):<27}{title:<18}{cells[0]:>16}{cells[1]:>16}")


def other_tiers(args: argparse.Namespace) -> dict[str, list[Question]]:
    """The starter corpus's easier problems, which must not be forgotten; none beside your own --data_path."""
    if args.data_path is not None or not args.measure:
        return {}
    from dataset.starter.corpus import ensure_starter

    return {"tier of train_reason": read_heldout(ensure_starter() / "reason_heldout.jsonl")}


def append_samples(path: Path, step: int, rollouts: list[Rollout], is_main: bool) -> None:
    """Some rollouts as Markdown, after those of the steps before; those of later steps, which a resumed run does again,
    are taken out."""
    if not is_main:
        return
    old = path.read_text(encoding="utf-8") if path.exists() and step else ""
    parts = [part for part in re.split(r"(?m)^(?=## step )", old) if part]
    kept = [part for part in parts if int(re.match(r"## step (\d+)", part)[1]) < step]
    text = [f"## step {step}\n\n"]
    for rollout in rollouts:
        text.append(f"reward {rollout.reward:g}, {rollout.sampled} tokens{', cut off' * rollout.truncated}\n\n")
        for message in rollout.messages:
            parts = [message.get("reasoning_content"), message["content"]]
            parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or []]
            said = "\n\n".join(part for part in parts if part)
            text.append(f"{message['role']}:\n\n" + "".join(f"    {line}\n" for line in said.splitlines()) + "\n")
    write_bytes(path, "".join([*kept, *text]).encode())


CURVES = (
    ("reward", ("reward",)), ("held-out pass@1", ("val_accuracy", "val_sampled")), ("entropy (nats)", ("entropy",)),
    ("KL to the start", ("kl",)), ("clipped share", ("clipped",)), ("tokens of an answer", ("length",)),
    ("cut off, no variance", ("truncated", "no_variance")), ("seconds", ("rollout_seconds", "training_seconds")),
)  # fmt: skip


def draw_rl_curves(run: Run) -> None:
    """All that a run of reinforcement learning tells, over its steps, in place of the picture of its loss, which tells
    nothing here. Nothing without matplotlib."""
    plt, log_path = pyplot(), run.path(".jsonl")
    if plt is None or not run.processes.is_main or not log_path.exists():
        return
    rows = list(read_log(log_path))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), dpi=110)
    for ax, (title, names) in zip(axes.flat, CURVES, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                ax.plot(*zip(*points, strict=True), label=name.removeprefix("val_"), linewidth=1)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        if len(names) > 1 and ax.lines:
            ax.legend(fontsize=8)
    figure.suptitle(log_path.stem)
    figure.tight_layout()
    figure.savefig(run.path(".png"))
    plt.close(figure)
