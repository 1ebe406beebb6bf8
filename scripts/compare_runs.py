"""Finished runs side by side: a Markdown table, their differences with the spread over seeds, and one picture.

python scripts/compare_runs.py out/muon_256.pth out/adamw_256.pth
python scripts/compare_runs.py out/a*_256.run.json out/b*_256.run.json --over seconds --metric val_bpb --picture ab.png

A run is named by its weights, its record (NAME.run.json) or NAME. Runs that differ by their seed alone are one group;
the others are compared with the first group. Benchmark figures are shown where NAME.eval.json lies beside the weights.
"""

import json
import math
import re
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import _path  # noqa: F401

import cli
from cli import ArgumentParser, UsageError
from dataset.files import DataError

AXES = {"tokens": "tokens trained on", "steps": "steps", "seconds": "seconds of training"}
LOG_NAMES = {"tokens": "tokens", "steps": "step", "seconds": "seconds"}
SUFFIXES = (".run.json", ".eval.json", ".jsonl", ".pth", ".png")
# Arguments that make no other experiment: names, places, what is watched. Contents count, by their hash.
APART = {"seed", "save_weight", "out_dir", "cache_dir", "data_path", "val_path", "from_weight", "tokenizer", "teacher"}
APART |= {"from_resume", "save_interval", "val_interval", "log_interval", "keep", "tracker", "use_wandb"}
APART |= {"wandb_project", "local_rank", "num_workers", "preset", "device", "dtype"}
LOWER_IS_BETTER = ("loss", "bpb", "bits_per_byte", "seconds", "memory")
# Student's t: half the width of a 95 % interval in standard errors, by degrees of freedom; 1.96 in the limit.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


@dataclass
class TrainedRun:
    name: str
    record: dict
    log: list[dict]
    tasks: dict[str, dict] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.record["arguments"].get("seed")

    @property
    def experiment(self) -> dict[str, str]:
        """What makes it another one than others, by name: arguments, contents of files, the code, how it computed."""
        arguments = {k: v for k, v in self.record["arguments"].items() if k not in APART}
        code = self.record["code"]["commit"] or "unknown"
        facts = arguments | {f"contents of {k}": (v or "none")[:8] for k, v in self.record["inputs"].items()}
        facts |= {"commit": code[:8] + " (changed)" * bool(self.record["code"]["dirty"])}
        facts |= {name: self.record["computing"][name] for name in ("device", "dtype")}
        facts |= {"processes": self.record["processes"]}
        return {name: str(value) for name, value in facts.items()}

    @property
    def figures(self) -> dict[str, float]:
        """What came out, of training and of benchmarks."""
        figures = {k: v for k, v in self.record["figures"].items() if k.startswith("val_") or k == "loss"}
        for task, found in self.tasks.items():
            for name in ("accuracy", "bits_per_byte"):
                figures[f"{task} {name}"] = found.get(name)
        return {name: value for name, value in figures.items() if isinstance(value, int | float)}


@dataclass
class Group:
    """Runs that differ by their seed alone."""

    name: str
    runs: list[TrainedRun]

    def values(self, metric: str) -> dict[int, float]:
        """By seed."""
        return {run.seed: run.figures[metric] for run in self.runs if metric in run.figures}


class Difference(NamedTuple):
    mean: float
    half_width: float | None  # of its 95 % interval; None: a single seed has no spread
    how: str


# ------------------------------------------------------------------------------------------------ reading


def read_run(given: str) -> TrainedRun:
    """DataError if there is no record, or it is none."""
    path = Path(given)
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), "")
    stem = path.with_name(path.name.removesuffix(suffix))
    record_path, log, results = (stem.with_name(stem.name + s) for s in (".run.json", ".jsonl", ".eval.json"))
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        run = TrainedRun(stem.name, record, list(read_rows(log)))
        _ = run.experiment, run.figures, run.seed
    except FileNotFoundError:
        remedy = "train it with these scripts" if stem.with_name(stem.name + ".pth").exists() else "check the name"
        raise DataError(f"{record_path}: no record of this run is there: {remedy}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{record_path}: it is not the record of a run ({error})") from None
    weights = stem.with_name(stem.name + ".pth")
    if results.exists() and weights.exists() and results.stat().st_mtime < weights.stat().st_mtime:
        print(f"warning: {results} is of earlier weights of that name: left out; evaluate again", file=sys.stderr)
    elif results.exists():
        try:
            tasks = json.loads(results.read_text(encoding="utf-8"))["tasks"]
            run.tasks = {name: found for name, found in tasks.items() if isinstance(found, dict)}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            print(f"warning: {results} is not what scripts/evaluate.py writes: left out", file=sys.stderr)
    if record.get("state") != "finished":
        text = f"{run.name} is {record.get('state')} at step {run.record['figures'].get('steps')}, not finished"
        print(f"warning: {text}: its figures are not final", file=sys.stderr)
    return run


def read_rows(log: Path) -> list[dict]:
    """Of a metrics log, without lines that were cut off."""
    if not log.exists():
        return []
    rows = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def grouped(runs: list[TrainedRun], ignore: list[str]) -> list[Group]:
    """In the order in which they were given. ignore: facts of an experiment that may differ in a group. UsageError for
    the same seed twice in a group."""
    groups: dict[tuple, list[TrainedRun]] = {}
    for run in runs:
        facts = {name: value for name, value in run.experiment.items() if name not in ignore}
        groups.setdefault(tuple(sorted(facts.items())), []).append(run)
    for members in groups.values():
        seeds = [run.seed for run in members]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(run.name for run in members)
            raise UsageError(f"{names} are the same run, with the same seed: give each once")
    return [Group(common_name(members), members) for members in groups.values()]


def common_name(runs: list[TrainedRun]) -> str:
    """What their names have in common at the beginning."""
    if len(runs) == 1:
        return runs[0].name
    first, last = min(run.name for run in runs), max(run.name for run in runs)
    common = next((first[:i] for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), first)
    common = re.sub(r"[_-](s|seed)?[_-]?$", "", common)
    return f"{common or first} × {len(runs)}"


# ------------------------------------------------------------------------------------------------ comparing


def difference(before: dict[int, float], after: dict[int, float]) -> Difference | None:
    """after - before. Of the pairs with the same seed if there are several; else of the means (Welch 1947)."""
    pairs = [after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())]
    if len(pairs) > 1:
        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        return Difference(statistics.mean(pairs), t95(len(pairs) - 1) * error, f"{len(pairs)} pairs of seeds")
    if not before or not after:
        return None
    mean = statistics.mean(after.values()) - statistics.mean(before.values())
    if min(len(before), len(after)) == 1:
        return Difference(mean, None, "one seed: no spread")
    parts = [(statistics.variance(side.values()) / len(side), len(side) - 1) for side in (before, after)]
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / n for part, n in parts) if total else 1
    return Difference(mean, t95(freedom) * math.sqrt(total), f"{len(before)} and {len(after)} seeds")


def t95(freedom: float) -> float:
    """The next lower whole number of degrees of freedom is taken: the interval is rather too wide."""
    freedom = max(int(freedom), 1)
    return T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.5 / freedom


def verdict(found: Difference, metric: str) -> str:
    if found.half_width is None:
        return "?"
    if abs(found.mean) <= found.half_width:
        return "within the noise"
    lower = not metric.endswith("accuracy") and any(word in metric for word in LOWER_IS_BETTER)
    return "better" if (found.mean < 0) == lower else "worse"


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    return number(statistics.mean(values)) + (f" ± {number(statistics.stdev(values))}" if len(values) > 1 else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def report(groups: list[Group]) -> str:
    metrics = list(dict.fromkeys(name for group in groups for run in group.runs for name in run.figures))
    parts = [runs_table(groups), figures_table(groups, metrics)]
    if len(groups) > 1:
        parts += [what_differs(groups), differences_table(groups, metrics)]
    commands = "\n".join(f"{run.name}: {run.record['command']}" for group in groups for run in group.runs)
    return "\n".join([*parts, f"```\n{commands}\n```\n"])


def runs_table(groups: list[Group]) -> str:
    rows = []
    for group in groups:
        records = [run.record for run in group.runs]
        first, machines = records[0], {f"{r['machine']['cpu']}, {r['machine']['threads']} threads" for r in records}
        machines |= {", ".join(r["machine"]["gpus"]) for r in records if r["computing"]["device"] == "cuda"}
        data = first["data"].get("data_path") or {}
        name = f"{Path(data['path']).name} ({data.get('lines', 0):,} rows, {data['sha256'][:8]})" if data else ""
        peaks = [r["peak"].get("gpu_memory_mb") or r["peak"].get("memory_mb") for r in records]
        rows.append([
            group.name, ", ".join(str(run.seed) for run in group.runs), f"{first['parameters']['total'] / 1e6:.2f} M",
            name, *(f"{statistics.mean(r['figures'][key] for r in records):,.0f}" for key in ("tokens", "steps")),
            number(statistics.mean(r["figures"]["seconds"] for r in records) / 60, 1),
            f"{max(filter(None, peaks)):,.0f}" if any(peaks) else "", "; ".join(sorted(filter(None, machines))),
        ])  # fmt: skip
    return table(["run", "seeds", "parameters", "data", "tokens", "steps", "minutes", "peak MB", "machine"], rows)


def figures_table(groups: list[Group], metrics: list[str]) -> str:
    rows = [[metric, *(outcome(group, metric) for group in groups)] for metric in metrics]
    several = any(len(group.runs) > 1 for group in groups)
    note = "\n± is the standard deviation over the seeds.\n" if several else ""
    return table(["figure", *(group.name for group in groups)], rows) + note


def outcome(group: Group, metric: str) -> str:
    """Its figure: the mean and deviation over seeds, or of one run with the interval that the benchmark gave it."""
    text = spread(list(group.values(metric).values()))
    interval = group.runs[0].tasks.get(metric.removesuffix(" accuracy"), {}).get("interval")
    if len(group.runs) == 1 and metric.endswith(" accuracy") and interval:
        text += f" ({number(interval[0])} to {number(interval[1])})"
    return text


def what_differs(groups: list[Group]) -> str:
    facts = [group.runs[0].experiment for group in groups]
    names = [name for name in dict.fromkeys(n for fact in facts for n in fact) if len({f.get(name) for f in facts}) > 1]
    rows = [[name, *(fact.get(name, "") for fact in facts)] for name in names]
    return table(["what differs", *(group.name for group in groups)], rows)


def differences_table(groups: list[Group], metrics: list[str]) -> str:
    base, rows = groups[0], []
    for group in groups[1:]:
        for metric in metrics:
            found = difference(base.values(metric), group.values(metric))
            if found:
                width = "" if found.half_width is None else f" ± {number(found.half_width)}"
                rows.append([group.name, metric, f"{found.mean:+.4f}{width}", verdict(found, metric), found.how])
    head = ["run", "figure", f"against {base.name} (95 % interval)", "", "over"]
    return table(head, rows) + "\nSeveral figures are compared: one in twenty lies outside of its interval by chance.\n"


# ------------------------------------------------------------------------------------------------ the picture


def draw(groups: list[Group], metric: str, over: str, picture: Path) -> bool:
    """The curve of each run, thin, and of each group's mean where its seeds were measured at the same points. False
    without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for i, group in enumerate(groups):
        color, curves = f"C{i}", [curve(run, metric, over) for run in group.runs]
        curves = [points for points in curves if points]
        mean = mean_curve(curves)
        for points in curves:
            width, alpha = (0.8, 0.5) if mean else (1.5, 1)
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, alpha=alpha)
        if mean:
            axes.plot(*zip(*mean, strict=True), color=color, linewidth=2)
        if curves:
            axes.plot([], [], color=color, linewidth=2, label=group.name)
    axes.set_xlabel(AXES[over])
    axes.set_ylabel({"val_bpb": "validation, bits per byte", "loss": "training loss"}.get(metric, metric))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    plt.close(figure)
    return True


def curve(run: TrainedRun, metric: str, over: str) -> list[tuple[float, float]]:
    key = LOG_NAMES[over]
    return [(row[key], row[metric]) for row in run.log if row.get(metric) is not None and row.get(key) is not None]


def mean_curve(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """[] unless there are several, of as many points; over seconds the places are means too."""
    if len(curves) < 2 or len({len(points) for points in curves}) > 1:
        return []
    return [tuple(map(statistics.mean, zip(*points, strict=True))) for points in zip(*curves, strict=True)]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="the weights, the record or out_dir/NAME of a run")
    add("--over", choices=list(AXES), default="tokens", help="what the curves are drawn over (default: tokens)")
    add("--metric", help="what the curves show (default: val_bpb, or the first that the first run has)")
    add("--ignore", nargs="+", default=[], metavar="NAME", help='of "what differs", such as commit: runs that '
        "differ in these and the seed are one group all the same")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="write the Markdown to this file (default: print it)")
    add("--picture", type=Path, metavar="FILE", help="default: compare.png beside the first run")
    args = parser.parse_args()
    runs = [read_run(given) for given in dict.fromkeys(args.runs)]
    groups = grouped(runs, args.ignore)
    measured = [name for run in runs for row in run.log for name in row if name.startswith("val_") or name == "loss"]
    if args.metric and args.metric not in measured:
        known = ", ".join(dict.fromkeys(measured)) or "nothing"
        raise UsageError(f"--metric {args.metric}: it is in no log; in these there is {known}")
    metric = args.metric or next((name for name in ("val_bpb", "val_accuracy", *measured) if name in measured), None)
    text = report(groups)
    picture = args.picture or Path(args.runs[0]).parent / "compare.png"
    if metric and draw(groups, metric, args.over, picture):
        print(f"wrote {picture}", file=sys.stderr)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(f"`{shlex.join(['python', *sys.argv])}`\n\n{text}", encoding="utf-8")
        print(f"wrote {args.out}", file=sys.stderr)
    else:
        print(text)


if __name__ == "__main__":
    cli.run(main)
