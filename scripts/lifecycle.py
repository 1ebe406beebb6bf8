"""Train each stage after SFT on the starter corpus and print what it changed, in one table.

python scripts/lifecycle.py                 # in the environment of the quickstart; bash scripts/lifecycle.sh finds it
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import environment
from _path import ROOT
from _report import append_markdown

import cli
from cli import ArgumentParser, find_device, seed
from dataset.starter.corpus import ensure_starter
from evaluation.scoreboard import answer_questions, count_right, read_heldout
from model import checkpoint
from model.inference.chatbot import AnswerSettings, load_chatbot
from trainer.report import compare_curves, read_log


@dataclass
class Line:
    """One line of the table."""

    stage: str
    changes: str  # what it should change
    before: str
    after: str
    skills: str = ""  # per cent of the skills' held-out questions that the weights after the stage answer
    minutes: float = 0.0


class Life:
    """Runs the scripts and asks what they made of the model."""

    def __init__(self, out_dir: Path, seed: int):
        self.out, self.data, self.seed = out_dir, ensure_starter(), seed
        (weights,) = out_dir.glob("full_sft_*.pth")
        self.size = weights.stem.removeprefix("full_sft_")

    def train(self, script: str, name: str, *flags: str | Path) -> float:
        """Minutes of training; `name` is that of the weights. What is complete is not trained again."""
        print(f"\n== {script} {' '.join(map(str, flags))}", flush=True)
        command = [script, "--out_dir", self.out, "--from_resume", "1", "--seed", self.seed, *flags]
        if code := environment.run([sys.executable, *map(str, command)], cwd=ROOT):
            sys.exit(code)  # its own message stands above
        return checkpoint.load_meta(self.out / f"{name}.pth")["seconds"] / 60

    def score(
        self, questions: str, weights: str, *, adapter: str | None = None, **settings: bool | int
    ) -> dict[str, float]:
        """Per cent right by skill, and "all", of these questions; settings: of AnswerSettings."""
        file, path = self.data / f"{questions}.jsonl", self.out / f"{weights}_{self.size}.pth"
        adapter_path = self.out / "lora" / f"{adapter}_{self.size}.pth" if adapter else None
        bot = load_chatbot(path, find_device(), None, AnswerSettings(**settings), adapter=adapter_path)
        asked = read_heldout(file)
        totals = count_right(asked, answer_questions(bot, asked, file))
        return {skill: counts["percent"] for skill, counts in totals["skills"].items()} | {"all": totals["percent"]}

    def log(self, name: str) -> list[dict]:
        """The validations of a run."""
        return [row for row in read_log(self.out / f"{name}.jsonl") if "val_loss" in row]


def percent(value: float) -> str:
    return f"{value:.1f} %"


def mean_of_others(scores: dict[str, float]) -> float:
    """Over the skills that a new identity does not concern; all have the same number of questions."""
    others = [value for skill, value in scores.items() if skill not in ("identity", "all")]
    return sum(others) / len(others)


def lora(life: Life, name: str, what: str, *flags: str) -> list[Line]:
    before = life.score(f"{name}_heldout", "full_sft")
    minutes = life.train("train_lora.py", f"lora/{name}_{life.size}", "--lora_name", name, *flags)
    after = life.score(f"{name}_heldout", "full_sft", adapter=name)
    skills = percent(mean_of_others(life.score("heldout", "full_sft", adapter=name)))
    return [Line(f"LoRA {name}", what, percent(before["all"]), percent(after["all"]), skills, minutes)]


def distill(life: Life) -> list[Line]:
    """Two students of one size see the same tokens in the same order: one the labels, the other the teacher."""
    minutes, logs = 0.0, []
    for name, alpha in (("student_labels", "1"), ("student_teacher", "0")):
        flags = ("--hidden_size", "128", "--steps", "45", "--alpha", alpha, "--save_weight", name)
        minutes += life.train("train_distill.py", f"{name}_128", *flags)
        logs.append(life.out / f"{name}_128.jsonl")
    compare_curves(logs, "val_bpb", "validation bits per byte", life.out / "distill.png")
    before, after = (life.log(path.stem)[-1]["val_bpb"] for path in logs)
    return [Line("distillation", "bits per byte: labels, teacher", f"{before:.4f}", f"{after:.4f}", "", minutes)]


def reason(life: Life) -> list[Line]:
    before = life.score("reason_heldout", "full_sft", thinking=True)["all"]
    minutes = life.train("train_reason.py", f"reason_{life.size}")
    after = life.score("reason_heldout", "reason", thinking=True)["all"]
    skills = percent(life.score("heldout", "reason")["all"])
    return [Line("reasoning", "problems solved with thinking", percent(before), percent(after), skills, minutes)]


def reinforced(life: Life, stage: str, begins_at: str, tiers: dict[str, str]) -> list[Line]:
    """A stage of reinforcement learning; tiers: its held-out questions, and what is said of them."""
    minutes = life.train(f"train_{stage}.py", f"{stage}_{life.size}", "--from_weight", begins_at)
    *_, last = read_log(life.out / f"{stage}_{life.size}.jsonl")
    lines = []
    for tier, what in tiers.items():
        before, after = (percent(100 * last[f"val_{tier}_sampled{when}"]) for when in ("_before", ""))
        lines.append(Line("" if lines else stage, f"{what}, one sample", before, after))
    lines[0].skills, lines[0].minutes = percent(life.score("heldout", stage)["all"]), minutes
    return lines


def dpo(life: Life) -> list[Line]:
    minutes = life.train("train_dpo.py", f"dpo_{life.size}", "--from_weight", "agent", "--steps", "32")
    first, *_, last = (row["val_accuracy"] for row in life.log(f"dpo_{life.size}"))
    skills = percent(life.score("heldout", "dpo")["all"])
    return [Line("DPO", "held-out pairs ranked right", percent(100 * first), percent(100 * last), skills, minutes)]


def the_end(life: Life) -> list[Line]:
    """What the one model at the end of its life can do, beside what it could after SFT."""
    lines = []
    for what, questions, skill, settings in (
        ("all skills", "heldout", "all", {}),
        ("problems solved at once", "reason_heldout", "all", {"thinking": False}),
        ("problems solved with thinking", "reason_heldout", "all", {"thinking": True}),
        ("problems beyond those, with thinking", "reason_rl_val", "all", {"thinking": True}),
        ("the right tool is called", "tools_heldout", "call", {}),
        ("its result is used", "tools_heldout", "result", {}),
        ("no tool is called where none is needed", "tools_heldout", "no_call", {}),
        ("who it is, with tools in view", "tools_heldout", "identity", {}),
    ):
        before, after = (percent(life.score(questions, name, **settings)[skill]) for name in ("full_sft", "dpo"))
        lines.append(Line("" if lines else "the last weights", what, before, after))
    return lines


def table(lines: list[Line]) -> str:
    rows = [("stage", "what it should change", "before", "after", "all skills", "minutes")]
    rows += [
        (line.stage, line.changes, line.before, line.after, line.skills, f"{line.minutes:.1f}" if line.minutes else "")
        for line in lines
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out", help="with the weights of the quickstart")
    parser.add_argument("--seed", type=seed, default=42, help="of training (default: 42)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the table to this file")
    args = parser.parse_args()
    out = args.out_dir
    if (n := len(list(out.glob("full_sft_*.pth")))) != 1:
        several = f"; {n} are there: move the others to another folder" if n else ""
        raise cli.UsageError(f"--out_dir {out}: needs one full_sft_*.pth, which scripts/quickstart.py makes{several}")
    begin, life = time.monotonic(), Life(out.resolve(), args.seed)
    lines = lora(life, "lora_identity", "who it is: a new name and maker", "--steps", "300")
    lines += lora(life, "lora_medical", "first aid, in unseen wordings")
    lines += distill(life) + reason(life)
    lines += reinforced(life, "grpo", "reason", {"held-out": "problems beyond those"})
    chains = {"three_calls": "three calls, never shown", "two_calls": "two calls"}
    lines += reinforced(life, "agent", "grpo", chains)
    lines += dpo(life) + the_end(life)
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{table(lines)}\n\n{minutes:.1f} minutes in all; the curves of the two students: {out / 'distill.png'}")
    if args.markdown:
        figures = {
            f"{line.stage}: {line.changes}".removeprefix(": "): f"{line.before} → {line.after}" for line in lines
        }
        append_markdown(args.markdown, "The stages after SFT", figures | {"minutes": round(minutes, 1)})


if __name__ == "__main__":
    cli.run(main)
