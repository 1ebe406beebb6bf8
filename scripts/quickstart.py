"""From nothing to a model that chats, in less than ten minutes on two CPU cores, with no more than Python installed.

python scripts/quickstart.py                 # or python3, or py, as Python is called; or bash scripts/quickstart.sh

Interrupted and run again, it goes on where it was.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time

import environment

MINUTES = (2.1, 3.0, 1.3)  # of pretraining, of fine-tuning in rows of 256 tokens, and then of 1,024
# One schedule in two runs: the learning rate stays up in the first, and falls in the second.
SHORT_CHATS = ["--save_weight", "sft_short", "--decay", "0"]
LONG_CHATS = ["--from_weight", "sft_short", "--max_seq_len", "1024", "--batch_size", "4", "--decay", "1"]
LONG_CHATS += ["--data_path", "dataset/starter_data/long.jsonl", "--val_path", "dataset/starter_data/long_val.jsonl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out_dir", default=os.environ.get("OUT") or "out", help="where the weights go (default: OUT, or out)")
    add("--minutes", type=float, help="of training in all (default: 2.1 before, 3 after, 1.3 of long chats)")
    args = parser.parse_args()
    out = ["--out_dir", args.out_dir]
    factor = 1 if args.minutes is None else args.minutes / sum(MINUTES)
    pretrain, sft, long = (["--minutes", f"{minutes * factor:g}"] for minutes in MINUTES)
    began = time.monotonic()
    python = environment.ready("core")
    scores = ["--score", "dataset/starter_data/heldout.jsonl"]
    chat = ["eval_model.py", "--model_mode", "1", *out]

    def stage(title: str, *command: str, answers: str | None = None) -> None:
        """Its time so far, and what it prints; `answers` is what it reads."""
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"\n== {title}  ({minutes}:{seconds:02d})", flush=True)
        if command and (code := environment.run([python, *command], answers)):
            sys.exit(code)

    stage("1/6 starter corpus: a small bilingual world, written by a program", "-m", "dataset.starter")
    stage("2/6 pretraining: from random weights to a model of text",
          "train_pretrain.py", *out, *pretrain, "--from_resume", "1")  # fmt: skip
    stage("3/6 supervised fine-tuning: the model learns to answer",
          "train_full_sft.py", *out, *sft, *SHORT_CHATS, "--from_resume", "1")  # fmt: skip
    stage("4/6 long chats: it learns to answer when much stands before the question",
          "train_full_sft.py", *out, *long, *LONG_CHATS, "--from_resume", "1")  # fmt: skip
    stage("5/6 scoreboard: held-out questions, exact answers", *chat, *scores)
    stage("6/6 a short conversation", *chat, answers="0\n")
    stage("done")
    own = "python" if os.environ.get("VIRTUAL_ENV") else os.path.relpath(python)
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    print(f"Chat with it:  {join([own, *chat])}")


if __name__ == "__main__":
    main()
