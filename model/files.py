"""Files of weights and settings: written whole or not at all, read without running any code of theirs.

write_file(path, lambda file: torch.save(content, file))
content = read_file(path)                # tensors and plain values; CheckpointError for anything else
"""

import errno
import glob
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from model.device import is_out_of_memory
from model.formats import CheckpointError

LFS_HEAD = b"version https://git-lfs"
LFS_TEXT = "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the file"


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let write(file) fill a temporary file, then put it in the place of `path`, durably and in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a run that was killed while it wrote
            stale.unlink(missing_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save turns the OSError of a full disk into a RuntimeError about positions in the file
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise CheckpointError(
            f"cannot write {path}: {cause.strerror or cause}; what was saved before is kept"
            + (", free some space and go on" if full else "")
        ) from None


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is durable without
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_plain(value: Any, where: str) -> None:
    """TypeError if `value` holds something that could not be read back with weights_only=True."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
    elif value is not None and not isinstance(value, Tensor) and type(value) not in (str, int, float, bool):
        raise TypeError(f"{where} is a {type(value).__name__}: only tensors and plain Python values can be saved")


def read_file(path: Path, mmap: bool = False) -> Any:
    """torch.load of tensors and plain values, nothing else; CheckpointError for any other file."""
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is only the weights: give the folder that holds it and its config.json")
    is_unicode = not any("\ud800" <= letter <= "\udfff" for letter in str(path))  # which mapping needs
    try:
        mmap = mmap and is_unicode and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise missing(path) from None
    except Exception as error:  # unpickling, zip and memory-map faults raise nearly anything
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path} {_looks_like(path, error)}") from None


def _looks_like(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "is empty (0 bytes): copy or train it again"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, which only llama.cpp reads: give the .pth or the Hugging Face folder it was made from"
    if head.startswith(LFS_HEAD):
        return LFS_TEXT
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return f"is cut off ({path.stat().st_size:,} bytes): copy or download it again"
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "is a zip archive, not PyTorch weights: unpack it and give the .pth or the folder inside"
    if "eights_only" in str(error) or "Unsupported" in str(error):
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        return (
            f"holds Python objects{what} that would run code when loaded, so it was refused: "
            "ask its author for a plain state dict of tensors"
        )
    if all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return "looks like text, not PyTorch weights: give a .pth file or a Hugging Face folder"
    first_line = str(error).strip().split("\n")[0][:120]
    return f"is not readable as PyTorch weights ({first_line}): it is damaged or something else"


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path} {LFS_TEXT}") from None
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """CheckpointError if the file is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path} {LFS_TEXT}") from None
        raise CheckpointError(f"{path} is not readable ({error}): it is cut off or damaged") from None


def is_lfs_pointer(path: Path) -> bool:
    """Whether a clone without Git LFS left this in the place of the file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_HEAD)) == LFS_HEAD
    except OSError:
        return False


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """What to say of weights that hold NaN or infinity; None if none does."""
    for name, w in tensors.items():
        bad = int((~w.isfinite()).sum())
        if bad:
            return f"{name} holds NaN or infinity ({bad:,} of {w.numel():,} values)"
    return None


def to_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_bytes(path: Path, content: bytes) -> None:
    write_file(path, lambda file: file.write(content))


def missing(path: Path, *others: Path) -> CheckpointError:
    folder, text = path.parent, " and ".join(map(str, (path, *others)))
    text += " do not exist" if others else " does not exist"
    if not folder.is_dir():
        return CheckpointError(f"{text}, nor does the folder {folder}; check the path")
    here = sorted(folder.glob("*.pth")) + sorted(file.parent for file in folder.glob("*/config.json"))
    near = f"there are {', '.join(p.name for p in here[:8])}" if here else "no weights are there: train some first"
    return CheckpointError(f"{text}; in {folder} {near}")
