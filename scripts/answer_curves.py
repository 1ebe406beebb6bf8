"""Accuracy and bits per byte of the right answers over training, as one picture.

python train_pretrain.py --eval_tasks evaluation/questions/everyday.jsonl
python scripts/answer_curves.py out/pretrain_256.jsonl --questions evaluation/questions/everyday.jsonl

Several logs, such as those of pretraining and SFT, are drawn one after the other.
"""

import argparse
from pathlib import Path

import _path

import cli
from dataset.choices import read_choices
from dataset.jsonl import DataError
from evaluation.statistics import wilson
from model.export.optional import need
from trainer.report import read_log


def points(logs: list[Path]) -> tuple[list[tuple[float, float, float]], list[tuple[float, str]]]:
    """(tokens in millions, accuracy, bits per byte) of all logs, and where each of them begins with its name."""
    found, begins, before = [], [], 0.0
    for log in logs:
        rows = [row for row in read_log(log) if "val_answer_bpb" in row]
        if not rows:
            raise DataError(f"{log}: no val_answer_bpb in it; train with --eval_tasks")
        begins.append((before, log.stem))
        found += [(before + row["tokens"] / 1e6, row["val_answer_accuracy"], row["val_answer_bpb"]) for row in rows]
        before = found[-1][0]
    return found, begins


def draw(found: list, begins: list, n: int, chance: float, picture: Path) -> None:
    need("matplotlib", "a picture")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens, accuracy, bits = zip(*found, strict=True)
    low, high = zip(*(wilson(value * n, n) for value in accuracy), strict=True)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), dpi=120, sharex=True)
    top.fill_between(tokens, [100 * v for v in low], [100 * v for v in high], color="tab:blue", alpha=0.2)
    top.plot(tokens, [100 * v for v in accuracy], color="tab:blue", marker="o", markersize=3)
    top.axhline(100 * chance, color="gray", linestyle="--")
    top.annotate("chance", (0, 100 * chance), xytext=(-6, -30), textcoords="offset points", color="gray")
    top.set_ylim(0, max(60, 110 * max(high)))
    top.set_ylabel(f"accuracy, cloze, %\n(95 % interval, n = {n})")
    bottom.plot(tokens, bits, color="tab:orange", marker="o", markersize=3)
    bottom.set_ylim(0, 1.1 * max(bits))
    bottom.set_ylabel("bits per byte\nof the right answers")
    bottom.set_xlabel("tokens trained on, millions")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        for at, name in begins:
            axes.axvline(at, color="black", alpha=0.3)
            axes.annotate(name, (at, axes.get_ylim()[1]), xytext=(3, -12), textcoords="offset points", fontsize=8)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="metrics logs of runs with --eval_tasks")
    parser.add_argument("--questions", required=True, metavar="FILE", help="the questions that were asked")
    picture = _path.ROOT / "out" / "answers.png"
    parser.add_argument("--out", type=Path, default=picture, help="the picture (default: out/answers.png)")
    args: argparse.Namespace = parser.parse_args()
    questions = read_choices(args.questions)
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    draw(*points(args.logs), len(questions), chance, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
