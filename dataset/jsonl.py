"""Reading JSONL strictly and in flat memory: the one reader of training, inspection and tokenizer training.

for number, row, fault in read_jsonl("dataset/starter_data/pretrain.jsonl"): ...
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.chat import json_type
from dataset.checks import Fault

MAX_LINE = 64 << 20  # bytes; a longer line is not a row, and would have to be held in memory whole
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class DataError(Exception):
    """A data file cannot be used; the message names the file, the fault and the remedy. Scripts print it and exit 1."""


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, bytes with the line end). Only byte 0x0A ends a line; a line is cut at MAX_LINE."""
    try:
        with open(path, "rb") as file:
            for number in itertools.count(1):
                line = rest = file.readline(MAX_LINE)
                while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE)
                if not line:
                    return
                yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def parse_line(number: int, line: bytes) -> tuple[dict | None, Fault | None]:
    """One line -> (object, None), or (None, error). Strict JSON: no NaN, no key twice, no half of a surrogate pair."""
    if len(line) == MAX_LINE and not line.endswith(b"\n"):
        return None, Fault("error", f"line too long: over {MAX_LINE >> 20} MB")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = line.decode("utf-8")
        if not text.strip():
            return None, Fault("error", "line of blanks only" if text else "empty line")
        row = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        if SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return None, Fault("error", f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line")
    except UnicodeEncodeError as error:
        return None, Fault("error", f"lone surrogate: \\u{ord(error.object[error.start]):04x} is half a character")
    except json.JSONDecodeError as error:
        return None, Fault("error", f"invalid JSON: {error.msg} at column {error.colno}")
    except _DuplicateKey as error:
        return None, Fault("error", f"duplicate JSON key: {error} stands twice in one object")
    except (ValueError, RecursionError) as error:
        return None, Fault("error", f"invalid JSON: {error}")
    if not isinstance(row, dict):
        return None, Fault("error", f"not an object: the top level is {json_type(row)}")
    return row, None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict | None, Fault | None]]:
    """Yields (line number, object or None, fault or None) for every line; memory does not grow with the file."""
    for number, line in read_lines(path):
        yield number, *parse_line(number, line)


class _DuplicateKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(json.dumps(next(key for key in keys if keys.count(key) > 1)))
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
