"""The files of one run, out_dir/NAME.pth and those beside it: nobody else writes them, and none of old is lost.

claim(weights, "--out_dir out", processes)      # before anything is written
copy = keep_earlier(weights)                    # NAME.pth.1, NAME.jsonl.1, NAME.png.1, NAME.run.json.1
"""

import contextlib
import errno
import filecmp
import glob
import os
import re
import shutil
import socket
import sys
from io import TextIOWrapper
from pathlib import Path

import cli
from cli import UsageError
from model import checkpoint
from trainer.parallel import Processes

TAKEN = (errno.EACCES, errno.EAGAIN)
held: dict[Path, TextIOWrapper] = {}  # the locks of this process; a second run in it has the same right to them


# ------------------------------------------------------------------------------------------------ one run at a time


def claim(weights: Path, given: str, processes: Processes) -> None:
    """Make the folder, and keep other runs from these files until this process ends, however that happens. UsageError,
    on all processes, if it cannot be written to or another run has them. `given`: the flag that named the folder."""
    folder = weights.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{given}: cannot be made: {error.strerror}; choose another folder") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{given}: cannot be written to; choose another folder")
    owner = _lock(weights.with_name(f".{weights.stem}.lock")) if processes.is_main else None
    owner = processes.gather(owner)[0]
    if owner:
        raise UsageError(
            f"{weights} is being written by another run ({owner}): choose another --save_weight or --out_dir, or wait "
            "for its end"
        )


def release(weights: Path) -> None:
    """Let other runs have the files."""
    path = weights.with_name(f".{weights.stem}.lock").absolute()
    file = held.pop(path, None)
    if file is None:
        return
    if os.name == "posix":
        path.unlink(missing_ok=True)  # while it is locked: nobody else can have locked this file
        file.close()
    else:
        file.close()
        try:
            path.unlink(missing_ok=True)
        except OSError:  # Windows keeps what another run has just opened
            pass


def _lock(path: Path) -> str:
    """Who has the lock if somebody else has; "" if this process has it now, or the disk knows no locks."""
    path = path.absolute()
    while path not in held:
        file = open(path, "a+", encoding="utf-8")
        try:
            _lock_file(file)
        except OSError as error:
            with file:
                if error.errno in TAKEN:
                    file.seek(0)
                    return file.read(200).strip() or "just starting"
            print(f"note: {path.parent} has no locks ({error.strerror}): keep other runs away", file=sys.stderr)
            return ""
        if os.name == "posix" and not os.fstat(file.fileno()).st_nlink:
            file.close()  # its last owner removed it between our two calls
            continue
        with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        held[path] = file
        cli.at_exit.callback(release, path.with_name(path.name.removeprefix(".").removesuffix("lock") + "pth"))
    return ""


def _lock_file(file: TextIOWrapper) -> None:
    """OSError if another process has it. The lock is the process's: it ends with it, and no child inherits it."""
    if os.name == "posix":
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(1 << 20)  # a byte that nobody wants to read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


# ------------------------------------------------------------------------------------------------ what was there before


def copies(weights: Path) -> list[Path]:
    """The numbered copies of earlier weights of this name, newest first."""
    numbers = [path.suffix[1:] for path in weights.parent.glob(f"{glob.escape(weights.name)}.*")]
    return [
        Path(f"{weights}.{n}") for n in sorted((int(n) for n in numbers if re.fullmatch("[0-9]+", n)), reverse=True)
    ]


def keep_earlier(weights: Path) -> Path | None:
    """Give weights that are there, their log, curve and record a second, numbered name, and return that of the weights;
    the one they have already where there is one. None if there are none."""
    if not weights.exists():
        return None
    earlier = copies(weights)
    for copy in earlier:
        if filecmp.cmp(weights, copy):
            return copy
    number = 1 + int(earlier[0].suffix[1:]) if earlier else 1
    beside = [weights.with_suffix(suffix) for suffix in (".jsonl", ".png", ".run.json")]
    for path in (*beside, weights):  # the weights last: then all is
        if path.exists():
            _copy(path, Path(f"{path}.{number}"), link=path == weights)
    return Path(f"{weights}.{number}")


def keep_others(weights: Path, arguments: dict) -> None:
    """keep_earlier() unless the weights are what a run with these arguments has written: then nothing is lost."""
    try:
        same = weights.exists() and checkpoint.load_meta(weights).get("arguments") == arguments
    except checkpoint.CheckpointError:  # whatever it is, it is not ours to lose
        same = False
    if not same:
        keep_earlier(weights)


def _copy(path: Path, copy: Path, link: bool) -> None:
    """Complete or absent. link: a second name for the same bytes, for a file that is replaced and never written in."""
    if link:
        try:
            os.link(path, copy)
            return
        except OSError:  # the disk has one name for a file
            pass
    half = copy.with_name(f".{copy.name}.tmp")
    shutil.copy2(path, half)
    os.replace(half, copy)
