"""The record of a run, NAME.run.json beside its weights: all that it takes to say what was run, on what, and what came
out. scripts/compare_runs.py reads it.

record = RunRecord(path, facts_of(run)); record.write("running", figures); record.write("finished", figures)

It is written when the training begins and when it ends, by the main process alone. A run that was killed says "running"
and its metrics log how far it came; one that goes on adds itself to the earlier parts of the same run.
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import CheckpointError
from model.files import to_json, write_bytes

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "tokenizers", "datasets", "pyarrow", "safetensors", "deepspeed")
ARITHMETIC = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")  # what decides how fast matrices are multiplied


class RunRecord:
    """facts: plain values; those of this process are added."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.facts = {"command": command(), "processes": int(os.environ.get("WORLD_SIZE", "1"))}
        self.facts |= {"code": code(), "packages": packages(), "machine": machine(), "started": now()} | facts

    def goes_on(self) -> "RunRecord":
        """The parts of the run before this one, from the record that is there."""
        try:
            was = json.loads(self.path.read_text(encoding="utf-8"))
            part = {name: was.get(name) for name in ("command", "code", "machine", "started", "written", "state")}
            self.facts["earlier_parts"] = [*was.get("earlier_parts", []), part]
        except (OSError, ValueError, AttributeError):
            self.facts["earlier_parts"] = []
        return self

    def write(self, state: str, figures: dict[str, Any]) -> str | None:
        """state: "running", "interrupted" or "finished". Returns what went wrong, for a run is not lost for this."""
        self.facts |= {"state": state, "written": now(), "figures": figures, "peak": peak_memory()}
        try:
            write_bytes(self.path, to_json(self.facts))
        except CheckpointError as error:
            return str(error)
        return None


def facts_of(run: Any) -> dict[str, Any]:
    """What a Run knows of itself when its training begins."""
    args, model, sizes = vars(run.args), run.config.to_dict(), run.reporter.sizes._asdict()
    computing = {"device": run.device.type, "dtype": str(run.dtype).removeprefix("torch."), "compiled": run.compiled}
    facts = {"stage": run.stage, "method": run.method, "arguments": args, "computing": computing}
    return facts | {"model": model, "parameters": sizes, "data": run.data, "inputs": run.inputs}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command() -> str:
    """As it was given, with what launched it."""
    launcher = "python"
    if "RANK" in os.environ:
        launcher = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', os.environ.get('WORLD_SIZE', '1'))}"
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        launcher += f" --nnodes {nodes}" if nodes != "1" else ""
    return f"{launcher} {shlex.join(sys.argv)}"


def code() -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout, None where it is none. dirty: files of it were changed."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "dirty": None if head is None else bool(changes)}


def _git(*words: str) -> str | None:
    command = ["git", "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def packages() -> dict[str, str]:
    """Versions of those that are installed, and Python's."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """CPU, memory in GB, GPUs; no name of it."""
    facts = {"system": platform.platform(), "cpu": cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    try:
        facts["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # Windows
        pass
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def cpu() -> str:
    """Its model, with the arithmetic it has for low precision."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)", text, re.MULTILINE)
    has = [flag for flag in ARITHMETIC if flags and flag in flags[1].split()]
    return (model[1] if model else platform.processor() or platform.machine()) + (f" ({', '.join(has)})" * bool(has))


def peak_memory() -> dict[str, float]:
    """MB that this process has used at most, resident and on its GPU."""
    figures = {}
    try:
        import resource  # Windows has none

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures["memory_mb"] = round(most / (1e6 if sys.platform == "darwin" else 1e6 / 1024), 1)
    except ImportError:
        pass
    if torch.cuda.is_available():
        figures["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return figures
