"""The quickstart's life on your own text and conversations: what each stage makes of them, in a table and in samples.

python scripts/quickstart.py --real my_text.jsonl my_chats.jsonl [--minutes 20]

Files of {"text": ...} are pretrained on, files of {"conversations": [...]} fine-tuned on; other forms are read as by
the training scripts. One row in fifty is kept for validation.
"""

import json
import math
import sys
from pathlib import Path

import environment
from _path import ROOT

import cli
from cli import ArgumentParser, find_device
from dataset.checks import conversation_faults
from dataset.jsonl import read_jsonl
from dataset.mapping import as_ours
from model.inference.chatbot import AnswerSettings, load_chatbot
from model.model import PRESETS
from trainer.report import read_log

KEPT_ONE_IN = 50
LARGER_FROM = 15  # minutes from which the model has 12 M parameters
SAMPLES = 3


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training in all")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "real")
    args = parser.parse_args()
    args.out_dir = args.out_dir.resolve()  # the stages run elsewhere
    texts, chats = sorted_rows(args.files)
    folder = args.out_dir / "data"
    parts = {"pretrain": texts, "sft": chats}
    for name, rows in parts.items():
        write(folder / f"{name}.jsonl", [row for i, row in enumerate(rows) if i % KEPT_ONE_IN])
        write(folder / f"{name}_val.jsonl", rows[::KEPT_ONE_IN])
    stages = [("pretraining", "train_pretrain.py", "pretrain", 0.6 if chats else 1.0)]
    stages += [("fine-tuning", "train_full_sft.py", "sft", 0.4)] * bool(chats)
    preset = "micro" if args.minutes >= LARGER_FROM else "nano"
    lines = [("stage", "rows", "minutes", "bits per byte before", "after")]
    for title, script, part, share in stages:
        minutes = args.minutes * share
        log = train(script, part, folder, args.out_dir, minutes, preset)
        first, *_, last = (row["val_bpb"] for row in log if "val_bpb" in row)
        lines.append((title, f"{len(parts[part]):,}", f"{minutes:g}", f"{first:.3f}", f"{last:.3f}"))
        show(weights_of(args.out_dir, part, preset), part, parts[part][::KEPT_ONE_IN])
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    print("\n" + "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)) for line in lines))
    mode = 1 if chats else 0
    size = PRESETS[preset].hidden_size
    print(f"\nGo on with it:  python eval_model.py --model_mode {mode} --hidden_size {size} --out_dir {args.out_dir}")


def sorted_rows(files: list[Path]) -> tuple[list[dict], list[dict]]:
    """Rows of text and conversations; UsageError for a file with neither, and if there is nothing to begin with."""
    texts, chats = [], []
    for file in files:
        found = 0
        for row in (row for _, row, _ in read_jsonl(file) if row is not None):
            for kind, key, rows in (("pretrain", "text", texts), ("sft", "conversations", chats)):
                try:
                    ours, _ = as_ours(kind, row)
                except ValueError:
                    continue
                if key in ours and (kind != "sft" or all(f.level != "error" for f in conversation_faults(ours))):
                    rows.append(ours)
                    found += 1
                    break
        if not found:
            raise cli.UsageError(f"{file}: no row with a text or a conversation; scripts/inspect_data.py says why")
    if not texts:  # a model needs text before it can chat: that of the conversations
        texts = [{"text": "\n".join(m.get("content") or "" for m in row["conversations"])} for row in chats]
    if len(texts) < 2 * KEPT_ONE_IN or 0 < len(chats) < 2 * KEPT_ONE_IN:
        raise cli.UsageError(f"{len(texts)} texts and {len(chats)} conversations: {2 * KEPT_ONE_IN} or more are needed")
    return texts, chats


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def weights_of(out_dir: Path, part: str, preset: str) -> Path:
    return out_dir / f"{'pretrain' if part == 'pretrain' else 'full_sft'}_{PRESETS[preset].hidden_size}.pth"


def train(script: str, part: str, data: Path, out_dir: Path, minutes: float, preset: str) -> list[dict]:
    """Runs or resumes a stage; its log."""
    paths = ["--data_path", data / f"{part}.jsonl", "--val_path", data / f"{part}_val.jsonl", "--out_dir", out_dir]
    size = ["--max_seq_len", "512", "--batch_size", "4", "--minutes", f"{minutes:g}", "--from_resume", "1"]
    size += ["--preset", preset] if part == "pretrain" else ["--hidden_size", PRESETS[preset].hidden_size]
    print(f"\n== {script}: {minutes:g} minutes", flush=True)
    if code := environment.run([sys.executable, *map(str, [script, *paths, *size])], cwd=ROOT):
        sys.exit(code)
    return list(read_log(weights_of(out_dir, part, preset).with_suffix(".jsonl")))


def show(weights: Path, part: str, kept: list[dict]) -> None:
    """What the model makes of the beginning of a kept text, or answers to a kept question."""
    settings = AnswerSettings(max_new_tokens=60, temperature=0.7)
    bot = load_chatbot(weights, find_device(), None, settings)
    for row in kept[:: max(1, math.ceil(len(kept) / SAMPLES))]:
        prompt = row["text"][:40] if part == "pretrain" else row["conversations"][:-1]
        if not prompt or bot.overflow(prompt):
            continue  # it leaves no room for an answer
        asked = prompt if part == "pretrain" else prompt[-1]["content"][:200]
        answer = "".join(piece.text for piece in bot.stream(prompt, seed=0))
        print(f"\n  {asked!r}\n  → {answer.strip()!r}")


if __name__ == "__main__":
    cli.run(main)
