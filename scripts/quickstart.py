"""From nothing to a model that chats, in some ten minutes on two CPU cores, with no more than Python installed.

python scripts/quickstart.py                 # or python3, or py, as Python is called; or bash scripts/quickstart.sh
python scripts/quickstart.py --minutes 30    # a larger model, trained for longer
python scripts/quickstart.py --real my_text.jsonl my_chats.jsonl --minutes 30      # on your own text and conversations

Interrupted and run again, it goes on where it was.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time

import environment

MINUTES = (1.5, 5.0, 2.3)  # of pretraining, of fine-tuning in rows of 256 tokens, and then of 1,024
LARGER_FROM = 20  # minutes of training in all from which the model is a larger one
# One schedule in two runs of 4,096 tokens a step: the learning rate stays up in the first, and falls in the second.
SHORT_CHATS = ["--save_weight", "sft_short", "--decay", "0"]
LONG_CHATS = ["--from_weight", "sft_short", "--max_seq_len", "1024", "--batch_size", "4", "--decay", "1"]
LONG_CHATS += ["--data_path", "dataset/starter_data/long.jsonl", "--val_path", "dataset/starter_data/long_val.jsonl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out_dir", default=os.environ.get("OUT") or "out", help="where the weights go (default: OUT, or out)")
    add("--minutes", type=float, help=f"of training (default: {sum(MINUTES):g}); from {LARGER_FROM} a larger model")
    add("--seed", type=int, help="of training: another run of the same lessons (default: 42)")
    add("--real", nargs="+", metavar="FILE", help="your own text and conversations, in place of the built-in world")
    args = parser.parse_args()
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        parser.error(f"--minutes {args.minutes:g}: must be above 0")
    if args.real and args.seed is not None:
        parser.error("--seed: not with --real")
    if args.real:
        minutes = [] if args.minutes is None else ["--minutes", f"{args.minutes:g}"]
        files = [os.path.abspath(file) for file in args.real]
        own = ["--out_dir", os.path.join(args.out_dir, "real"), *minutes]
        sys.exit(environment.run([environment.ready("core"), "scripts/real_life.py", *files, *own]))
    out = ["--out_dir", args.out_dir]
    train = [*out, "--from_resume", "1", *([] if args.seed is None else ["--seed", str(args.seed)])]
    factor = 1 if args.minutes is None else args.minutes / sum(MINUTES)
    pretrain, sft, long = (["--minutes", f"{minutes * factor:g}"] for minutes in MINUTES)
    preset, width = ("micro", "384") if args.minutes is not None and args.minutes >= LARGER_FROM else ("pico", "192")
    own_size = ["--hidden_size", width]  # the folder may hold the weights of the other one
    began = time.monotonic()
    python = environment.ready("core")
    held_out = "dataset/starter_data/heldout.jsonl"
    typed, turns = "evaluation/typed_unseen.jsonl", "evaluation/turns_unseen.jsonl"
    chat = ["eval_model.py", "--model_mode", "1", *own_size, *out]

    def stage(title: str, *command: str, answers: str | None = None) -> None:
        """Its time so far, and what it prints; `answers` is what it reads."""
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"\n== {title}  ({minutes}:{seconds:02d})", flush=True)
        if command and (code := environment.run([python, *command], answers)):
            sys.exit(code)

    stage("1/6 starter corpus: a small bilingual world, written by a program", "-m", "dataset.starter")
    stage("2/6 pretraining: from random weights to a model of text",
          "train_pretrain.py", "--batch_size", "8", *train, *pretrain, "--preset", preset)  # fmt: skip
    stage("3/6 supervised fine-tuning: the model learns to answer",
          "train_full_sft.py", *train, *sft, *own_size, *SHORT_CHATS)  # fmt: skip
    stage("4/6 long chats: it learns to answer when much stands before the question",
          "train_full_sft.py", *train, *long, *own_size, *LONG_CHATS)  # fmt: skip
    stage("5/6 scoreboard: held-out questions, exact answers", *chat, "--score", held_out)
    stage("    and what people type, by somebody who did not see the lessons", *chat, "--score", typed)
    stage("    and what they say next, when it hangs on what was said before", *chat, "--score", turns)
    stage("6/6 a short conversation", *chat, answers="0\n")
    stage("done")
    own = "python" if os.environ.get("VIRTUAL_ENV") else os.path.relpath(python)
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    print(f"Chat with it:  {join([own, *chat])}")


if __name__ == "__main__":
    main()
