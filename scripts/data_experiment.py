"""What cleaning is worth: good text made messy by a program, cleaned, and a model trained on each at equal tokens.

python scripts/data_experiment.py --text pretrain.jsonl --val held_out.jsonl --seeds 1 2 3
python scripts/data_experiment.py --text pretrain.jsonl --raw FOLDER --documents 11000

The second form only writes the messy rows, as files in three encodings. Runs that are done are not done again, so it
can be stopped.
"""

import gzip
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import _report
import environment
from _path import ROOT

import cli
from cli import ArgumentParser
from dataset.overlap import texts_of_file
from trainer.report import read_log

ARMS = {"raw": None, "cleaned": ["--off", "exact,normalised,near"], "deduplicated": []}
TITLES = {"raw": "raw", "cleaned": "cleaned, duplicates left in", "deduplicated": "cleaned and deduplicated"}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="good text, JSONL")
    parser.add_argument("--val", type=Path, help="held-out text, JSONL")
    parser.add_argument("--raw", type=Path, metavar="FOLDER", help="only write the messy rows there")
    parser.add_argument("--documents", type=int, default=1500, help="good ones, that the messy data is made of")
    parser.add_argument("--steps", type=int, default=100, help="of 4,096 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "data_experiment")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="for the table (default: in --out_dir)")
    args = parser.parse_args()
    for name in ("text", "val", "out_dir"):  # the stages run elsewhere
        vars(args)[name] = vars(args)[name] and vars(args)[name].resolve()
    if args.val is None and args.raw is None:
        parser.error("--val is missing: the text that the models are compared on")
    if args.val is not None and not args.val.exists():
        parser.error(f"--val {args.val}: no such file")
    texts = [text for text in texts_of_file(args.text) if len(text) > 100]
    random.Random(0).shuffle(texts)
    rows, planted = messy(texts[: args.documents], random.Random(0))
    if args.raw is not None:
        write_encodings(args.raw, rows)
        return
    args.out_dir.mkdir(parents=True, exist_ok=True)
    said = json.dumps({name: str(vars(args)[name]) for name in ("text", "documents", "val", "steps")})
    began = args.out_dir / "arguments.json"
    if began.exists() and began.read_text(encoding="utf-8") != said:
        parser.error(f"--out_dir {args.out_dir}: was begun with other files or sizes; give another folder")
    began.write_text(said, encoding="utf-8")
    (args.out_dir / "raw.jsonl").write_bytes(b"".join(rows))
    for arm, flags in ARMS.items():
        if flags is not None and not (args.out_dir / f"{arm}.report.md").exists():
            run("clean_data.py", [args.out_dir / "raw.jsonl", "--out", args.out_dir / f"{arm}.jsonl", *flags])
    for seed in args.seeds:
        for arm in args.arms:
            train(args, arm, seed)
    write_table(args, planted)


def messy(texts: Sequence[str], rng: random.Random) -> tuple[list[bytes], dict[str, int]]:
    """Lines of JSON, of the texts and of what is found among such, and how many of each kind there are. A quarter of
    the texts is spoilt in a way that can be mended; for 100 texts there come 60 copies and 45 rows of no use."""
    rows, planted = [], dict.fromkeys((*SPOIL, *USELESS, "copies", "near copies", "broken lines"), 0)

    def add(text: str, kind: str = "") -> None:
        rows.append((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode("utf-8"))
        if kind:
            planted[kind] += 1

    for text in texts:
        kind = rng.choice(list(SPOIL)) if rng.random() < 0.25 else ""
        add(SPOIL[kind](text) if kind else text, kind)
        if rng.random() < 0.15:
            for _ in range(rng.randint(2, 6)):
                near = rng.random() < 0.5
                add(near_copy(text, rng) if near else text, "near copies" if near else "copies")
        if rng.random() < 0.45:
            kind = rng.choice(list(USELESS))
            add(USELESS[kind](text, rng), kind)
        if rng.random() < 0.02:
            rows.append(rows[-1][: len(rows[-1]) // 2].rstrip(b"\n") + b"\n")
            planted["broken lines"] += 1
    rng.shuffle(rows)
    return rows, planted


def write_encodings(folder: Path, rows: Sequence[bytes]) -> None:
    """A third of the rows each as UTF-8, compressed; as GB18030; as UTF-16."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [b"".join(rows[i::3]) for i in range(3)]
    (folder / "utf8.jsonl.gz").write_bytes(gzip.compress(parts[0], mtime=0))
    for part, encoding in zip(parts[1:], ("gb18030", "utf-16"), strict=True):
        (folder / f"{encoding}.jsonl").write_bytes(part.decode("utf-8", "ignore").encode(encoding))
    print(f"{len(rows):,} lines in {folder}: utf8.jsonl.gz, gb18030.jsonl, utf-16.jsonl")


def near_copy(text: str, rng: random.Random) -> str:
    """The text with one piece of 2 characters of Chinese, or one word, another one."""
    words = text.split(" ") if text.isascii() or text.count(" ") > len(text) / 12 else list(text)
    words[rng.randrange(len(words))] = rng.choice(("altered", "改动"))
    return ("" if len(words) > len(text) * 0.9 else " ").join(words)


SPOIL = {
    "HTML": lambda text: "<div class='post'><p>" + text.replace("\n", "</p><p>") + "</p><br/>&nbsp;</div>",
    "zero-width characters": lambda text: "\u200b".join(text[i : i + 7] for i in range(0, len(text), 7)),
    "control characters": lambda text: text.replace(" ", "\u00a0").replace("\n", "\r\n\x07"),
    "full-width letters": lambda text: "".join(
        chr(ord(c) + 0xFEE0) if c.isascii() and c.isalnum() else c for c in text
    ),
}
USELESS = {
    "repetition": lambda text, rng: text[:30] * 40,
    "mojibake": lambda text, rng: text.encode("utf-8").decode("gb18030", "ignore"),
    "unbroken runs": lambda text, rng: "".join(rng.choices("ABCDEFabcdef0123456789+/", k=1500)),
    "lists of links": lambda text, rng: " ".join(f"https://example.org/{rng.random()}" for _ in range(30)),
}


def run(script: str, arguments: list) -> None:
    where = ROOT / "scripts" / script if script == "clean_data.py" else ROOT / script
    if code := environment.run([sys.executable, *map(str, [where, *arguments])], cwd=ROOT):
        sys.exit(code)


def log_of(args, arm: str, seed: int) -> list[dict]:
    found = list((args.out_dir / f"{arm}_{seed}").glob("pretrain_*.jsonl"))
    return [row for row in read_log(found[0]) if "val_bpb" in row] if found else []


def train(args, arm: str, seed: int) -> None:
    if (args.out_dir / f"{arm}_{seed}" / "done").exists():
        return
    data = ["--data_path", args.out_dir / f"{arm}.jsonl", "--val_path", args.val]
    size = ["--preset", "nano", "--max_seq_len", 512, "--batch_size", 8, "--steps", args.steps]
    place = ["--out_dir", args.out_dir / f"{arm}_{seed}", "--from_resume", 1]
    run("train_pretrain.py", [*data, *size, "--seed", seed, *place])
    (args.out_dir / f"{arm}_{seed}" / "done").touch()


def write_table(args, planted: dict[str, int]) -> None:
    """The table: held-out bits per byte by arm, over the seeds that all of its runs are done of."""
    reports = {
        arm: json.loads((args.out_dir / f"{arm}.report.json").read_text()) for arm in ARMS if ARMS[arm] is not None
    }
    lines = ["# Raw, cleaned, deduplicated\n", f"{planted_words(args, planted)}\n"]
    lines += [
        "| data | rows | MB | seeds | held-out bits per byte | against raw |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    finals = {arm: [log[-1]["val_bpb"] for seed in args.seeds if (log := log_of(args, arm, seed))] for arm in ARMS}
    for arm, values in finals.items():
        (output,) = (
            reports[arm]["output"].values()
            if arm in reports
            else [
                {
                    "rows": sum(1 for _ in open(args.out_dir / "raw.jsonl", "rb")),
                    "bytes": (args.out_dir / "raw.jsonl").stat().st_size,
                }
            ]
        )
        if values:
            spread = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
            change = statistics.mean(values) - statistics.mean(finals["raw"] or values)
            lines.append(f"| {TITLES[arm]} | {output['rows']:,} | {output['bytes'] / 1e6:.2f} | {len(values)} "
                         f"| {statistics.mean(values):.4f}{spread} | {change:+.4f} |")  # fmt: skip
    counts = {rule: entry["rows"] for rule, entry in reports["deduplicated"]["removed"].items()}
    lines.append("\nRemoved: " + ", ".join(f"{rule} {count:,}" for rule, count in counts.items()) + ".")
    repaired = reports["deduplicated"]["repaired"]
    lines.append("Repaired: " + ", ".join(f"{name} {count:,}" for name, count in repaired.items()) + ".\n")
    lines.append(f"nano, {args.steps} steps of 4,096 tokens; machine: {_report.machine()}; commit {_report.commit()}; "
                 f"`{_report.command()}`")  # fmt: skip
    path = args.markdown or args.out_dir / "table.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def planted_words(args, planted: dict[str, int]) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in planted.items())
    return f"{args.documents:,} good texts, a quarter of them spoilt, and what is found among such: {kinds}."


if __name__ == "__main__":
    cli.run(main)
