"""Appends a measurement to a Markdown file, with what it takes to repeat it: machine, commit, torch, command."""

import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from _path import ROOT

from trainer.record import cpu


def append_markdown(path: Path, title: str, figures: dict) -> None:
    """One section more at the end of the file: the circumstances, and a table of the figures."""
    rows = [("machine", machine()), ("commit", commit()), ("torch", torch.__version__), ("command", f"`{command()}`")]
    rows += [(name, value) for name, value in flat(figures).items() if name != "torch"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = "\n" if path.exists() and path.stat().st_size else ""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{before}### {title}, {date.today()}\n\n| | |\n| --- | --- |\n{table}\n")


def flat(figures: dict, prefix: str = "") -> dict:
    """{"int8": {"megabytes": 3}} -> {"int8 megabytes": 3}, without what was not measured."""
    result = {}
    for name, value in figures.items():
        result |= flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {prefix + name: value}
    return {name: value for name, value in result.items() if value is not None}


def machine() -> str:
    """The CPU with the arithmetic it has for low precision, and the GPUs that torch sees."""
    parts = [f"{cpu()}, {torch.get_num_threads()} threads"]
    return "; ".join(parts + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])


def commit() -> str:
    """The commit of the code, marked where files differ from it; "unknown" outside a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def command() -> str:
    """The command line, with the script as it is called from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return shlex.join(["python", str(script), *sys.argv[1:]])
