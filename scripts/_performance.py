"""All figures of speed in one table: `python scripts/benchmark.py all --markdown docs/experiments/performance.md`."""

import json
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from _path import ROOT
from _report import commit, flat, machine

import cli

THIRTY_MILLION = "--preset small --config num_key_value_heads=4 intermediate_size=1664 qk_norm=1"
TRAIN = {
    "small, 8 x 512": "--preset small",
    "small, 8 x 512, AdamW": "--preset small --optimizer adamw",
    "nano, 8 x 256": "--preset nano --seq_len 256",
    "v3, 8 x 512": "--preset v3",
    "v3-moe, 8 x 512": "--preset v3-moe",
}
BATCHES, KINDS = (1, 8, 32), ("bf16", "int8", "int4")
# (table, row): the command that measures it
MEASUREMENTS = {("train", row): f"benchmark.py train {flags} --seconds 15" for row, flags in TRAIN.items()}
MEASUREMENTS |= {
    ("decode", f"30.0 M, {kind}, batch {batch}"): f"benchmark.py decode {THIRTY_MILLION} --batch {batch} "
    f"--quantize {kind} --repeat 1 --compare {int(batch == 1)}"
    for kind in KINDS
    for batch in BATCHES
}
MEASUREMENTS |= {("decode", "nano, fp32, batch 128"): "benchmark.py decode --batch 128 --new_tokens 96 --repeat 1"}
MEASUREMENTS |= {("serve", "nano, 32 streaming clients"): "benchmark_serve.py --seconds 15 -- --model {nano}"}
COLUMNS = {
    "train": ("tokens_per_second", "mfu", "mfu_with_attention", "matmul_peak_gflops", "memory_mb", "compile_seconds"),
    "decode": ("tokens_per_second", "prefill_tokens_per_second", "share_of_bandwidth", "transformers_tokens_per_second",
               "llama_cpp_tokens_per_second", "llama_cpp_prefill_tokens_per_second"),
    "serve": ("tokens_per_second", "one_client_tokens_per_second", "ratio", "slowest_to_median", "errors"),
}  # fmt: skip


def measure(command: str) -> dict:
    """What the last line of a script of this folder says; its process is its own, and so is its memory."""
    script, *flags = shlex.split(command)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *flags], capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise cli.UsageError(f"{command}: {done.stderr.strip().splitlines()[-1]}")
    return flat(json.loads(done.stdout.splitlines()[-1]))


def measure_all(rounds: int, nano: str | None) -> dict[tuple[str, str], list[dict]]:
    """All measurements, `rounds` times one after the other, so that a machine that slows down does so for each.
    nano: the weights that are served; without, nothing is."""
    wanted = {
        key: command.format(nano=nano) for key, command in MEASUREMENTS.items() if nano or "{nano}" not in command
    }
    results: dict[tuple[str, str], list[dict]] = {key: [] for key in wanted}
    begin, total = time.perf_counter(), rounds * len(wanted)
    for round in range(rounds):
        for number, (key, command) in enumerate(wanted.items(), round * len(wanted) + 1):
            print(f"{time.perf_counter() - begin:5.0f} s  {number}/{total}  {command}", file=sys.stderr, flush=True)
            results[key].append(measure(command))
    return results


def cell(figures: list[dict], name: str) -> str:
    """The median of a figure, and its range if it was measured more than once."""
    values = [f[name] for f in figures if f.get(name) is not None]
    if not values:
        return ""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.5g}" + (f" ({low:,.4g} to {high:,.4g})" if high > low else "")


def table(results: dict[tuple[str, str], list[dict]], rounds: int, command: str) -> str:
    """A section of Markdown: the machine, and a table for each kind of measurement."""
    how = f"medians of {rounds}, and their range" if rounds > 1 else "one measurement of each"
    text = f"## {machine()}, {date.today()}\n\nCommit {commit()}, `{command}`: {how}.\n"
    for kind, columns in COLUMNS.items():
        rows = {row: figures for (of, row), figures in results.items() if of == kind}
        columns = [
            name for name in columns if any(f.get(name) is not None for figures in rows.values() for f in figures)
        ]
        if not rows:
            continue
        text += f"\n| {kind} | {' | '.join(name.replace('_', ' ') for name in columns)} |\n"
        text += "| --- " * (1 + len(columns)) + "|\n"
        for row, figures in rows.items():
            text += f"| {row} | {' | '.join(cell(figures, name) for name in columns)} |\n"
    return text


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = "\n" if path.exists() and path.stat().st_size else "# Speed, as measured\n\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(before + text)
