"""Mends what is broken in a text or a conversation and can be mended without a guess; says what it did.

text, names = repair_text("<p>caf\u00e9</p>", TEXT_REPAIRS); row, names = repair_row("sft", row, ROW_REPAIRS)
"""

import functools
import html
import importlib.util
import json
import re
import unicodedata
from collections.abc import Callable, Collection
from typing import Any

from dataset.chat import ROLES
from dataset.cleaning import EVERYWHERE, LATIN_MOJIBAKE, PLAIN_TEXT, TAGS, is_code, read_as_gbk

# name -> what it does, in the order in which they are done
TEXT_REPAIRS = {
    "mojibake": "UTF-8 that was read as Windows-1252 or its like (by ftfy), or as GBK, decoded again",
    "control": "control characters, terminal colours, zero-width and bidi marks, soft hyphens, byte order marks, "
    "private-use characters and noncharacters taken out",
    "html": "of HTML the text: tags, scripts, styles and comments out, entities decoded",
    "markdown": "pictures out, links to their text",
    "nfc": "Unicode form NFC; radicals and variants as the characters they stand for",
    "width": "full-width Latin letters and digits to ASCII",
    "blanks": "line ends, no-break spaces, blanks at the ends of lines, more than two empty lines",
    "simplify": "traditional Chinese to simplified (by OpenCC)",
}
ROW_REPAIRS = {
    "keys": "keys in the wrong case, conversations as a JSON string or as the row itself, contents in parts",
    "thinking": "<think>...</think> before an answer to reasoning_content",
    "tools": "tools and calls as the JSON strings that training reads; empty ones out",
    "turns": "doubled turns: the same again out, two questions joined; what stands before the first question and after "
    "the last answer out",
}
OPTIONAL = ("simplify",)  # only if asked for

CONTROL = re.compile(
    r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\u00ad\ufeff]|"
    + "|".join(EVERYWHERE[name].pattern for name in ("bidi marks", "zero-width characters"))
    + "|"
    + EVERYWHERE["private-use characters or noncharacters"].pattern
)
# One quick look for all that control, width and blanks change inside a line. Characters beyond the basic plane are
# apart, for re is several times as fast without them.
DIRT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u2069\ufeff０-９Ａ-Ｚａ-ｚ"
    "\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff]"
)
ASCII_DIRT = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
BEYOND = re.compile("[\U00010000-\U0010ffff]")
LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029]")
SPACES = re.compile("[\u00a0\u202f]")
EMPTY_LINES = re.compile("\n{4,}")
SCRIPT = re.compile(r"<(script|style)\b[^>]*>.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)|<!DOCTYPE[^>]*>", re.I | re.S)
BREAK = re.compile(r"</?(?:br|p|div|li|tr|h[1-6]|ul|ol|table|section|article|blockquote|pre|hr)\b[^<>]*(?:>|\Z)", re.I)
CELL = re.compile(r"</?(?:td|th)\b[^<>]*(?:>|\Z)", re.I)
# No tag is what a comparison may look like: a < b and c > d. One that the text's end cuts off has an attribute.
TAG = re.compile(rf"</?(?:{TAGS})(?:\s*/?>|\s[^<>]*=[^<>]*>|\s[^<>]{{0,200}}=[^<>]{{0,200}}\Z)", re.I)
PICTURE = re.compile(r"!\[[^\]\n]*\]\([^)\s]+\)")
LINK = re.compile(r"\[([^\]\n]*)\]\([^)\s]+\)")
WIDE = {code: code - 0xFEE0 for first, last in ("０９", "ＡＺ", "ａｚ") for code in range(ord(first), ord(last) + 1)}
THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.S)


def has_ftfy() -> bool:
    return importlib.util.find_spec("ftfy") is not None


@functools.cache
def _converter() -> Callable[[str], str]:
    import opencc

    return opencc.OpenCC("t2s").convert


def repair_text(text: str, repairs: Collection[str], chat: bool = False) -> tuple[str, list[str]]:
    """The text mended, and the names of the repairs that changed it. In a message of a `chat` HTML and Markdown stay:
    they may be what it is about."""
    done, dirty = [], is_dirty(text)
    for name in TEXT_REPAIRS:
        if name in ("control", "width") and not dirty:
            continue
        if name in repairs and not (chat and name in ("html", "markdown")):
            before, text = text, _TEXT[name](text)
            if text != before:
                done.append(name)
    return text, done


def is_dirty(text: str) -> bool:
    """Whether it may hold what control, width and blanks take out of lines."""
    if text.isascii():
        return bool(ASCII_DIRT.search(text))
    return bool(DIRT.search(text) or BEYOND.search(text))


def _mojibake(text: str) -> str:
    if text.isascii():
        return text
    if LATIN_MOJIBAKE.search(text) and has_ftfy():
        import ftfy

        text = ftfy.fix_encoding(text)
    if read_as_gbk(text):
        try:
            return text.encode("gb18030").decode("utf-8")
        except UnicodeError:
            pass  # bytes are lost for good
    return text


def _control(text: str) -> str:
    return CONTROL.sub("", text)


def _html(text: str) -> str:
    for _ in range(2):  # tags may be written as entities themselves
        if ("<" not in text and "&" not in text) or not PLAIN_TEXT["HTML"].search(text) or is_code(text):
            break
        if "<" in text:
            text = SCRIPT.sub("", text)
            text = CELL.sub(" ", BREAK.sub("\n", text))
            text = TAG.sub("", text)
        text = html.unescape(text)
    return text


def _markdown(text: str) -> str:
    return LINK.sub(r"\1", PICTURE.sub("", text)) if "](" in text else text


def _nfc(text: str) -> str:
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text)
    pattern = EVERYWHERE["compatibility ideographs, radicals or variation selectors"]
    return pattern.sub(_compatible, text) if pattern.search(text) else text


def _compatible(match: re.Match) -> str:
    code = ord(match[0])
    if 0xFE00 <= code <= 0xFE0F or code >= 0xE0100:
        return ""
    return unicodedata.normalize("NFKC", match[0])


def _width(text: str) -> str:
    return text.translate(WIDE) if EVERYWHERE["full-width letters or digits"].search(text) else text


def _blanks(text: str) -> str:
    if is_dirty(text):
        text = LINE_ENDS.sub("\n", SPACES.sub(" ", text))
    text = "\n".join(map(str.rstrip, text.split("\n"))).strip()
    return EMPTY_LINES.sub("\n\n", text) if "\n\n\n\n" in text else text


def _simplify(text: str) -> str:
    return text if text.isascii() else _converter()(text)


_TEXT = {
    "mojibake": _mojibake,
    "control": _control,
    "html": _html,
    "markdown": _markdown,
    "nfc": _nfc,
    "width": _width,
    "blanks": _blanks,
    "simplify": _simplify,
}


# ------------------------------------------------------------------------------------------------ rows

KEYS = ("text", "conversations", "messages", "chosen", "rejected", "instruction", "input", "output")


def repair_row(kind: str, value: Any) -> tuple[Any, bool]:
    """What is JSON but not quite a row of this kind -> (the row, whether it was changed); other things as they are."""
    if kind == "pretrain" and isinstance(value, str):
        return {"text": value}, True
    if kind != "pretrain" and _is_messages(value):
        return {"conversations": value}, True
    if not isinstance(value, dict):
        return value, False
    row = {key.strip().lower() if key.strip().lower() in KEYS and key.strip().lower() not in value else key: part
           for key, part in value.items()}  # fmt: skip
    text = row.get("text")
    if kind == "pretrain" and isinstance(text, list) and text and all(isinstance(part, str) for part in text):
        row["text"] = "\n".join(text)
    for key in ("conversations", "messages", "chosen", "rejected"):
        if isinstance(row.get(key), str) and row[key].lstrip().startswith("["):
            try:
                parsed = json.loads(row[key])
            except (ValueError, RecursionError):
                continue
            row[key] = parsed if _is_messages(parsed) else row[key]
        if isinstance(row.get(key), list):
            row[key] = [_one_text(message) for message in row[key]]
    return row, row != value


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(part, dict) and {"role", "from"} & part.keys() for part in value
    )  # fmt: skip


def _one_text(message: Any) -> Any:
    """A message whose content is a list of texts (OpenAI's form), with these joined."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return message


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def repair_messages(messages: list[dict], repairs: Collection[str]) -> tuple[list[dict], list[str]]:
    """A conversation with our keys and roles, mended, and the names of the repairs that changed it."""
    done = []
    for name, repair in (("thinking", _thinking), ("tools", _tools), ("turns", _turns)):
        if name in repairs:
            before, messages = messages, repair(messages)
            if messages != before:
                done.append(name)
    return messages, done


def _thinking(messages: list[dict]) -> list[dict]:
    result = []
    for message in messages:
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str) and not message.get("reasoning_content"):
            if (match := THINK.match(content)) and "<think>" not in match[1]:
                rest = {**message, "content": content[match.end() :]}
                message = {**rest, "reasoning_content": match[1].strip()} if match[1].strip() else rest
        result.append(message)
    return result


def _tools(messages: list[dict]) -> list[dict]:
    result = []
    for message in messages:
        message = dict(message)
        for key in ("tools", "tool_calls"):
            value = message.get(key)
            if key == "tool_calls":
                value = _calls(value)
            if value in (None, "", [], {}) or (isinstance(value, str) and value.strip() in ("", "[]", "null")):
                message.pop(key, None)
            else:
                message[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        result.append(message)
    return result


def _calls(value: Any) -> Any:
    """Calls as a list of objects with arguments as objects, in JSON; as they are where they are that, or cannot be."""
    try:
        calls = json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        return value
    if isinstance(calls, dict):
        calls, value = [calls], None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return value
    ours = []
    for call in calls:
        if isinstance(arguments := call.get("arguments"), str):
            try:
                call = {**call, "arguments": json.loads(arguments)}
            except (ValueError, RecursionError):
                return value
        ours.append(call)
    return value if ours == calls and isinstance(value, str) else ours


def _turns(messages: list[dict]) -> list[dict]:
    result: list[dict] = []
    for message in messages:
        last = result[-1] if result else {}
        if message.get("role") == last.get("role") and (joined := _joined(last, message)) is not None:
            result[-1] = joined
        else:
            result.append(message)
    roles = [message.get("role") for message in result]
    if "user" not in roles or "assistant" not in roles or not all(role in ROLES for role in roles):
        return result
    last = len(roles) - 1 - roles[::-1].index("assistant")
    first = roles.index("user")
    if roles.index("assistant") < first < last and "tool" not in roles[:first]:
        result = [*(message for message in result[:first] if message["role"] == "system"), *result[first : last + 1]]
    elif first < last:
        result = result[: last + 1]
    return result


def _joined(a: dict, b: dict) -> dict | None:
    """Two turns of one role in a row as one; None if that would be a guess: two different answers."""
    first, second = a.get("content"), b.get("content")
    if set(a) - {"role", "content"} or set(b) - {"role", "content"} or a["role"] == "tool":
        return a if a == b and a.get("role") != "tool" else None
    if not isinstance(first, str) or not isinstance(second, str):
        return None
    if first.strip() == second.strip() or first.strip().startswith(second.strip()):
        return a
    if second.strip().startswith(first.strip()):
        return b
    return {"role": a["role"], "content": f"{first}\n{second}"} if a["role"] in ("user", "system") else None
