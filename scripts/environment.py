"""A Python with the packages that a script needs, by the standard library alone, on Linux, macOS and Windows.

python = environment.ready("core")                                          # in quickstart.py; "dev" in test.py
python scripts/environment.py core scripts/lifecycle.py --out_dir out       # any script in it

core is the first paragraph of requirements.txt, dev all of it and requirements-dev.txt. An active virtual environment
is used as it is; otherwise .venv, which the Python that runs this makes.
"""

from __future__ import annotations  # so that a Python that is too old can say so

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)
TESTED_TORCH, ANY_TORCH = "torch==2.13.0", "torch>=2.11"
HAS_TORCH = """
from importlib.metadata import PackageNotFoundError, version
try:
    raise SystemExit([int(part) for part in version("torch").split(".")[:2]] < [2, 11])
except PackageNotFoundError:
    raise SystemExit(1)
"""


def ready(kind: str) -> str:
    """The interpreter of an environment with these packages, in the repository's root; both are made if need be. Ends
    the process, with one line after the tool's own, if that cannot be."""
    os.chdir(ROOT)
    os.environ.setdefault("PYTHONUTF8", "1")  # what we print is in two languages, and Windows' encoding may lack one
    sys.stdout.reconfigure(errors="backslashreplace")
    folder = Path(os.environ.get("VIRTUAL_ENV") or ROOT / ".venv")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        if os.environ.get("VIRTUAL_ENV"):
            sys.exit(f"error: VIRTUAL_ENV={folder}: there is no {python}; deactivate it, or unset the variable")
        _make(folder)
    _install(str(python), folder, kind)
    os.environ["PATH"] = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"  # for torchrun and its like
    return str(python)


def _make(folder: Path) -> None:
    if sys.version_info < OLDEST:
        found, needed = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST))
        sys.exit(f"error: Python {found} is too old, {needed} or newer is needed: run this script by another")
    print("== making a virtual environment in .venv", flush=True)
    if run([sys.executable, "-m", "venv", str(folder)]):
        shutil.rmtree(folder, ignore_errors=True)  # half of one would be taken for one
        sys.exit(f"error: {sys.executable} -m venv failed; on Debian and Ubuntu: apt install python3-venv")


def _install(python: str, folder: Path, kind: str) -> None:
    """What is listed and not there. A note in the environment says which lists it has."""
    packages, note = _packages(kind), folder / f"minimind-{kind}.txt"
    if note.exists() and note.read_text(encoding="utf-8") == packages:
        return
    print("== installing packages (a few minutes, once)", flush=True)
    wanted = folder / f"minimind-{kind}.new.txt"
    wanted.write_text(packages, encoding="utf-8")
    # The torch of the tests comes first; where this Python has none, any of the range. One that is there stays.
    if run([python, "-c", HAS_TORCH]) and _pip(python, TESTED_TORCH, stderr=subprocess.DEVNULL):
        _pip(python, ANY_TORCH) and _cannot_install(python)
    _pip(python, "-r", str(wanted)) and _cannot_install(python)
    os.replace(wanted, note)


def _packages(kind: str) -> str:
    everything = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    if kind == "core":
        return everything.partition("\n\n")[0] + "\n"
    return everything + (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").replace("-r requirements.txt\n", "")


def _pip(python: str, *what: str, **options) -> int:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    return run(command, env={**os.environ, "DS_BUILD_OPS": "0"}, **options)  # without DeepSpeed's CUDA operators


def _cannot_install(python: str) -> None:
    sys.exit(
        f"error: {python} -m pip cannot install the packages; its message stands above. PyTorch has none for 32-bit "
        "systems, for Macs with an Intel processor, and for a Python that is newer than itself"
    )


def run(command: list[str], answers: str | None = None, **options) -> int:
    """The exit status of a program; `answers` is what it reads. It hears Ctrl-C as we do, and is left to end in its own
    way: subprocess.run() would kill it as it saves its state."""
    child, asked_to_end = None, False

    def pass_on(number, frame) -> None:  # from before the program starts: nobody else would stop it
        nonlocal asked_to_end
        asked_to_end = True
        if child is not None:
            child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        with subprocess.Popen(command, stdin=None if answers is None else subprocess.PIPE, **options) as child:
            if asked_to_end:
                child.terminate()
            if answers is not None:
                child.stdin.write(answers.encode())
                child.stdin.close()
            while True:
                try:
                    return child.wait()
                except KeyboardInterrupt:
                    pass
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(run([ready(sys.argv[1]), *sys.argv[2:]]))
