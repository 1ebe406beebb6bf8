"""Reading JSONL strictly and in flat memory: the one reader of training, inspection and tokenizer training.

for number, row, fault in read_jsonl("dataset/starter_data/pretrain.jsonl"): ...
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.chat import Fault, validate_messages

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


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def text_fault(row: dict) -> Fault | None:
    """Why a pretraining row cannot be used, or None."""
    if "text" not in row:
        return _missing("text", row)
    text = row["text"]
    if not isinstance(text, str):
        return Fault("error", f'"text" is not a string: it is {json_type(text)}')
    if not text.strip():
        return Fault("error", "text of blanks only" if text else "empty text")
    return None


def conversation_faults(row: dict) -> list[Fault]:
    """All faults of an SFT row; the row is used if none of them is an error."""
    if "conversations" not in row:
        return [_missing("conversations", row)]
    return validate_messages(row["conversations"])


def preference_faults(row: dict) -> list[Fault]:
    """All faults of a DPO row; the row is used if none of them is an error."""
    if missing := [_missing(key, row) for key in ("chosen", "rejected") if key not in row]:
        return missing
    chosen, rejected = row["chosen"], row["rejected"]
    faults = [Fault(level, f"chosen: {text}") for level, text in validate_messages(chosen)]
    faults += [Fault(level, f"rejected: {text}") for level, text in validate_messages(rejected)]
    if not any(fault.level == "error" for fault in faults):
        if chosen[:-1] != rejected[:-1]:
            faults.append(Fault("error", "different prompts: chosen and rejected differ before the last message"))
        elif chosen == rejected:
            faults.append(Fault("error", "nothing to prefer: chosen and rejected are the same"))
    return faults


def _missing(key: str, row: dict) -> Fault:
    if other := next((other for other in row if other.strip().lower() == key), None):
        return Fault("error", f'key in the wrong case: {json.dumps(other)} instead of "{key}"')
    keys = ", ".join(json.dumps(other, ensure_ascii=False) for other in itertools.islice(row, 5))
    return Fault("error", f'no "{key}" key: {"the keys are " + keys if row else "the object is empty"}')


def kind_of(fault: str) -> str:
    """A fault's text without its details (message number, quoted value, count): what faults are grouped by."""
    match = re.match(r"(chosen: |rejected: |)message \d+: (.*)", fault, re.DOTALL)
    if not match:
        return fault.split(":")[0].split(";")[0]
    text = re.sub(r'"(?:\\.|[^"\\])*"', '"..."', match[1] + match[2].split(";")[0])
    return re.sub(r"literal .*", "literal markers", re.sub(r"\d+", "N", re.sub(r" \(.*", "", text)))
