"""Where the rows made of data files are kept, and by what they are found: the content of the file, not its path.

folder = default_cache_dir(); key = content_hash("data.jsonl", folder); trim(folder)
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from dataset.files import UNREADABLE, DataError, unpacked

ROOT = Path(__file__).resolve().parent.parent
KNOWN = "hashes.json"  # hashes of large files, beside the rows made of them
SMALL = 32 << 20  # bytes; a file up to this size is hashed anew each time
ENTRY = re.compile(r"[a-z]+-[0-9]+-[0-9a-f]{16}(\.building)?")  # a folder that the cache made: people keep others there
SETTLED = 10**10  # ns; a file that was changed more recently may change again without another time on it


# ------------------------------------------------------------------------------------------------ the place


def default_cache_dir(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Path:
    """MINIMIND_CACHE if it is set; else the first of these that can be written: out/cache of the repository, minimind
    in XDG_CACHE_HOME or ~/.cache, a temporary folder. Leaves nothing behind."""
    if given := environ.get("MINIMIND_CACHE"):
        return Path(given)
    places = [root / "out" / "cache"]
    if cache := environ.get("XDG_CACHE_HOME"):
        places.append(Path(cache) / "minimind")
    if home := environ.get("HOME") or environ.get("USERPROFILE"):
        places.append(Path(home) / ".cache" / "minimind")
    return next(filter(_can_write, places), None) or temporary_cache_dir()


def temporary_cache_dir() -> Path:
    """The last resort of default_cache_dir(): a folder of this user's in the system's one for temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"minimind-cache-{user}"


def _can_write(folder: Path) -> bool:
    """Whether the folder is there, or can be made, and files in it too. Its name must be Unicode for Arrow's sake."""
    try:
        str(folder).encode("utf-8")
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):  # to ask for the permission is not enough on every file system
            return True
    except (OSError, UnicodeEncodeError):
        return False


def make_cache_dir(folder: Path) -> None:
    """Makes the folder. DataError if it cannot be used."""
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{folder}: the folder of the token cache needs a name in UTF-8; give another one") from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700 if folder == temporary_cache_dir() else 0o777)
    if folder == temporary_cache_dir() and hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder}: the folder belongs to another user; set MINIMIND_CACHE to one of yours")


# ------------------------------------------------------------------------------------------------ the content


def content_hash(path: str | Path, cache_dir: str | Path | None = None, quiet: bool = False) -> str:
    """SHA-256 of the file's bytes, unpacked if it is compressed, in hex. That of a large file is kept in cache_dir
    (default: default_cache_dir()) and holds as long as the file system says that nothing was written to the file.
    DataError if it cannot be read."""
    path, folder = Path(path), Path(cache_dir or default_cache_dir())
    try:
        with open(path, "rb") as file:
            stamp = _stamp(file.fileno())
            if stamp is not None and (known := _known(folder).get(stamp)):
                return known
            digest = _hash(file, path.name, quiet)
            if stamp is not None and stamp == _stamp(file.fileno()):
                _remember(folder, stamp, digest)
            return digest
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path") from None


def _stamp(handle: int) -> str | None:
    """What changes with each change of a file; None if the file is small, or nothing does so surely. A program can set
    the time of a file's data back, but not that of its last change (on Windows there is none)."""
    stat = os.fstat(handle)
    if stat.st_size <= SMALL or os.name == "nt" or time.time_ns() - stat.st_ctime_ns < SETTLED:
        return None
    return f"{stat.st_dev}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


def _hash(file, name: str, quiet: bool) -> str:
    """Of what the file holds; of its own bytes if that cannot be unpacked: who reads its rows says what is wrong."""
    try:
        return _hash_of(unpacked(file), file, name, quiet)
    except UNREADABLE:
        file.seek(0)
        return _hash_of(file, file, name, quiet)


def _hash_of(stream, file, name: str, quiet: bool) -> str:
    """stream: the file, or what unpacks it."""
    digest, total, due = hashlib.sha256(), os.fstat(file.fileno()).st_size, time.monotonic() + 2
    while block := stream.read(1 << 22):
        digest.update(block)
        if not quiet and time.monotonic() > due:
            due = time.monotonic() + 10
            print(f"{name}: comparing its content, {file.tell() / total:.0%}", file=sys.stderr, flush=True)
    return digest.hexdigest()


def _known(folder: Path) -> dict[str, str]:
    try:
        known = json.loads((folder / KNOWN).read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _remember(folder: Path, stamp: str, digest: str) -> None:
    """Adds a hash; where that fails, the file is hashed again the next time."""
    known = dict(list(_known(folder).items())[-999:]) | {stamp: digest}
    beside = folder / f"{KNOWN}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(known), encoding="utf-8")
        os.replace(beside, folder / KNOWN)
    except OSError:
        beside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ the size


def largest_cache() -> int:
    """Bytes that the cache may hold: MINIMIND_CACHE_GB, or 20 GB."""
    try:
        return int(float(os.environ.get("MINIMIND_CACHE_GB", 20)) * 1e9)
    except (ValueError, OverflowError):
        raise DataError("MINIMIND_CACHE_GB is no number: set it to gigabytes, such as 20") from None


def shard_bytes() -> int:
    """Bytes of text in a shard of a large source: MINIMIND_SHARD_MB, or 64 MiB."""
    try:
        return max(int(float(os.environ.get("MINIMIND_SHARD_MB", 64)) * (1 << 20)), 1)
    except (ValueError, OverflowError):
        raise DataError("MINIMIND_SHARD_MB is no number: set it to megabytes, such as 64") from None


def trim(folder: Path, keep: Path | Collection[Path], most: int) -> tuple[int, list[int]]:
    """Removes the entries that were used longest ago until all together are at most `most` bytes, `keep` never, nor
    what has no name of an entry. Returns (bytes that are left, bytes of each removed one)."""
    entries, kept = [], {keep} if isinstance(keep, Path) else set(keep)
    for entry in folder.iterdir():
        if not ENTRY.fullmatch(entry.name) or not entry.is_dir():
            continue
        try:
            entries.append((entry.stat().st_mtime, folder_size(entry), entry))
        except FileNotFoundError:
            continue  # another process has just removed it
    total, removed = sum(size for _, size, _ in entries), []
    for _, size, entry in sorted(entries):
        if total > most and entry not in kept and _remove(entry):
            total -= size
            removed.append(size)
    return total, removed


def folder_size(folder: Path) -> int:
    """Bytes of all files in it."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue  # another process has just removed it
    return total


def _remove(entry: Path) -> bool:
    """Removes a whole entry, unless a process is making or opening it."""
    lock = FileLock(f"{entry}".removesuffix(".building") + ".lock")
    try:
        with lock.acquire(timeout=0):
            shutil.rmtree(entry)
    except (OSError, Timeout):
        return False
    return True
