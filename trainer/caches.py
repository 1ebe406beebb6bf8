"""Where a run keeps what it can make again: tokens, and what torch.compile has compiled."""

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import torch

from cli import UsageError
from dataset.lm_dataset import default_cache_dir

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
TORCHS_OWN = os.path.join(tempfile.gettempdir(), "torchinductor_")  # what torch writes into the environment itself


def use_cache_dir(given: str | None) -> Path:
    """The folder of --cache_dir, else the default one; torch.compile's caches lie in it from now on, unless the
    environment says where. UsageError if it cannot be written to."""
    folder = Path(given).absolute() if given else default_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"--cache_dir {folder}: cannot be written to; choose another folder")
    for variable, name in VARIABLES.items():
        if os.environ.get(variable, TORCHS_OWN).startswith(TORCHS_OWN):
            os.environ[variable] = str(folder / f"compiled-{_machine()}" / name)
    if not os.access(os.path.expanduser("~"), os.W_OK):  # where it would keep its list of fonts
        os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))
    return folder


def _machine() -> str:
    """A name for all that compiled code depends on: inductor's cache does not tell instruction sets apart."""
    found = [platform.machine(), torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    except OSError:  # not Linux
        pass
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]


def describe_compiled() -> str:
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    return f"compiled code is kept in {folder} ({size_of(folder)}; it can be removed, or put elsewhere by --cache_dir)"


def size_of(folder: str | Path) -> str:
    """Of the files in it, in MB."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(parent, name))
            except OSError:  # another process has just removed it
                continue
    return f"{total / 1e6:,.0f} MB"
