"""Reading JSONL strictly and in flat memory: the one reader of training, inspection and tokenizer training.

for number, row, fault in read_jsonl("dataset/starter_data/pretrain.jsonl"): ...
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.chat import json_type
from dataset.checks import Fault
from dataset.files import MAX_LINE, DataError, DataFile, runs_out

__all__ = ["DataError", "parse_line", "read_jsonl", "read_lines"]

ICONV = "such as iconv -f GB18030 -t UTF-8 FILE > NEW.jsonl (Chinese), or -f CP1252 (Western Europe)"
FETCH = "download or copy the file again"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, bytes with the line end), as DataFile.lines() does."""
    yield from DataFile(path).lines()


def parse_line(number: int, line: bytes) -> tuple[dict | None, Fault | None]:
    """One line -> (object, None), or (None, error). Strict JSON: no NaN, no key twice, no half of a surrogate pair."""
    if len(line) == MAX_LINE and not line.endswith(b"\n"):
        return None, Fault("error", f"line too long: over {MAX_LINE >> 20} MB")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    ended = line.endswith(b"\n")
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = line.decode("utf-8")
        if not text.strip():
            return None, Fault("error", "line of blanks only" if text else "empty line")
        row = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        if SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        if not ended and error.reason == "unexpected end of data":
            return None, Fault("error", f"cut off: the file ends in the midst of a character; {FETCH}")
        found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        return None, Fault("error", f"not UTF-8: {found}; convert the file from what it is in, {ICONV}")
    except UnicodeEncodeError as error:
        return None, Fault("error", f"lone surrogate: \\u{ord(error.object[error.start]):04x} is half a character")
    except json.JSONDecodeError as error:
        if not ended and runs_out(error):
            return None, Fault("error", f"cut off: the file ends in the midst of it, at column {len(text)}; {FETCH}")
        return None, Fault("error", f"invalid JSON: {error.msg} at column {error.colno}{_json_hint(text, error)}")
    except _DuplicateKey as error:
        return None, Fault("error", f"duplicate JSON key: {error} stands twice in one object")
    except (ValueError, RecursionError) as error:
        return None, Fault("error", f"invalid JSON: {error}")
    if not isinstance(row, dict):
        return None, Fault("error", f"not an object: the top level is {json_type(row)}; {_row_hint(row)}")
    return row, None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict | None, Fault | None]]:
    """Yields (line number, object or None, fault or None) for every line; memory does not grow with the file."""
    for number, line in read_lines(path):
        yield number, *parse_line(number, line)


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    """What the writer of the line may have meant."""
    start = text.lstrip()
    if start.startswith(("{'", "[{'")):
        return "; looks like Python, not JSON: write rows with json.dumps"
    if error.msg == "Extra data":
        if text[error.pos :].strip() == ",":
            return "; a comma ends the line: remove it, or put the rows into brackets [...], as an array"
        return "; give each object a line of its own"
    if error.msg.startswith("Invalid control character"):
        return r"; write a line end or a tab in a string as \n or \t"
    if start.startswith(("<<<<<<<", "=======", ">>>>>>>")):
        return "; a mark of a merge conflict: settle it in the file"
    if start.startswith(("//", "/*", "#")):
        return "; JSON has no comments: remove them"
    rest = text[error.pos :].lstrip(", \t")
    if rest.startswith(("}", "]")) and "," in text[max(error.pos - 2, 0) : error.pos + 1]:
        return "; a comma before a closing bracket: remove it"
    if rest.startswith(tuple("\u201c\u201d\u2018\u2019")):
        return "; an office program's quotes: JSON takes the straight one alone"
    if error.msg.startswith("Expecting property name"):
        return '; a key must stand in double quotes: {"text": ...}'
    return ""


def _row_hint(row: Any) -> str:
    """How a row that is no object becomes one."""
    if isinstance(row, str):
        return "if it is the text: jq -c '{text: .}' FILE > NEW.jsonl"
    if isinstance(row, list) and row and all(isinstance(part, dict) and {"role", "from"} & part.keys() for part in row):
        return "if it is a conversation: jq -c '{conversations: .}' FILE > NEW.jsonl"
    return "each row must be an object {...}"


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
