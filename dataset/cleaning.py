"""What is odd about a text though a model can be trained on it: web dirt, broken encodings, repetition.

Used by scripts/inspect_data.py, which tells of it, and by repair.py and filters.py, which mend it or take the row out.
"""

import re
import unicodedata
import zlib

from dataset.checks import Fault

VERY_SHORT, VERY_LONG = 10, 10_000  # characters

EMOJI = "\U0001f000-\U0001faff\u2600-\u27bf\u2190-\u21ff\u2b00-\u2bff\ufe0f"
TAGS = (
    "a|abbr|article|b|blockquote|body|br|button|center|code|div|em|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|"
    "img|input|label|li|link|main|meta|nav|ol|option|p|pre|script|section|select|small|span|strong|style|sub|sup|svg|"
    "table|tbody|td|textarea|th|thead|title|tr|u|ul|video"
)
LAST_OF_PLANE = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
# A byte of UTF-8 that was read as Windows-1252 shows up as one of these characters.
CP1252 = {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(0x80, 0x100)}
CP1252_TAIL = re.escape("".join(char for char, byte in CP1252.items() if byte < 0xC0))

# (kind, pattern): reported with the number of matches and the first one
EVERYWHERE = {
    "carriage returns": r"\r",
    "line separators": "[\u0085\u2028\u2029]",
    "bidi marks": "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]",
    "zero-width characters": f"[\u180e\u200b\u200c\u2060-\u2064]|(?<![{EMOJI}])\u200d",
    "soft hyphens": "\u00ad",
    "no-break spaces": "[\u00a0\u202f]",
    "byte order mark in the text": "\ufeff",
    "replacement characters": "\ufffd",
    "private-use characters or noncharacters": f"[\ue000-\uf8ff\ufdd0-\ufdef\U000f0000-\U0010ffff{LAST_OF_PLANE}]",
    "full-width letters or digits": "[０-９Ａ-Ｚａ-ｚ]",
    "compatibility ideographs, radicals or variation selectors": (
        "[\u2e80-\u2fdf\uf900-\ufaff\ufe00-\ufe0e\U0002f800-\U0002fa1f\U000e0100-\U000e01ef]"
    ),
    "markers of other models": r"\[/?INST\]|<</?SYS>>|</?s>|<(?:unk|pad|bos|eos|mask|(?:start|end)_of_turn)>"
    r"|\[(?:CLS|SEP|PAD|MASK|UNK|gMASK)\]",
    "mojibake": r"锟斤拷|(?:烫|屯){3}",
    "unbroken run of letters": r"[A-Za-z0-9+/=_-]{200,}",
    "many newlines": r"(?:\n[^\S\n]*){10,}",
}
PLAIN_TEXT = {  # only in pretraining text: an answer may hold code, and checks.py reports the markers in messages
    "control characters": "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f]",
    "literal chat markers": r"<\|\w*|\w\|>|</?(?:think|tool_call|tool_response)>",
    "HTML": rf"</?(?:{TAGS})\b[^<>]*(?:>|\Z)|<!--|<!DOCTYPE|&(?:[a-z]{{2,8}}|#\d{{1,6}}|#x[0-9a-f]{{1,5}});",
    "markdown": r"(?m)^(?:```|~~~)|^#{1,6} \S|!?\[[^\]\n]*\]\([^)\s]+\)",
}
ONLY = {  # the whole text is nothing but
    "URL only": r"(?:https?://|www\.)\S+",
    "digits only": r"[\d\s.,:;/%+-]*\d[\d\s.,:;/%+-]*",
    "no letters": r"[\W_]+",
}
SCRIPTS = {
    "Japanese": "[\u3040-\u30ff]",
    "Korean": "[\u1100-\u11ff\uac00-\ud7af]",
    "Arabic": "[\u0600-\u06ff]",
    "Cyrillic": "[\u0400-\u04ff]",
    "Hebrew": "[\u0590-\u05ff]",
    "Thai": "[\u0e00-\u0e7f]",
    "Indic": "[\u0900-\u0dff]",
}


def _compiled(patterns: dict[str, str], flags: int = 0) -> dict[str, re.Pattern]:
    return {kind: re.compile(pattern, flags) for kind, pattern in patterns.items()}


# ASCII-only text is common and cannot match the patterns of other characters: those are not even tried on it.
EVERYWHERE, PLAIN_TEXT, ONLY, SCRIPTS = map(_compiled, (EVERYWHERE, PLAIN_TEXT, ONLY, SCRIPTS))
PLAIN_TEXT["HTML"] = re.compile(PLAIN_TEXT["HTML"].pattern, re.IGNORECASE)
ASCII_KINDS = {"carriage returns", "markers of other models", "unbroken run of letters", "many newlines"}
CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
LATIN_MOJIBAKE = re.compile(f"[\u00c2-\u00f4][{CP1252_TAIL}]{{1,3}}")
CJK_IN_UTF8 = re.compile(rb"[\xe4-\xe9][\x80-\xbf]{2}")
# What UTF-8 of Chinese mostly turns into when it is read as GBK: characters that are very rare in Chinese itself.
_OF_GBK = (
    "紝锛殑鐨浠銆浜鍙屽傚鏈傛澶鏄屾杩屼鍏鍒瀹涔鎴備鍦槸竴鐢鍚勫湪灏璇垜勬缁岃鏂傝鏃笉鍔ュ鏉湁簡繖岀鍗骞鍥璁嶅傜ㄥ寮"
)
GBK_MOJIBAKE = re.compile(f"[{_OF_GBK}][^\n]{{0,9}}[{_OF_GBK}]")
CODE_LINE = re.compile(
    r"\s*(?:(?:def|class|import|from|return|if|for|while|else|elif|try|except|with|let|const|var|function|public|private|"
    r"static|void|int|#include|package|use|fn|func|struct|end|SELECT|INSERT)\b.*[:;{}()=,\"']\s*$|[{}()\[\];]+\s*$|"
    r".*[;{}]\s*$|.*\w\(.*\)\s*$|\S+\s*[-+*/]?=\s*\S.*$|```)"
)
WORDS = re.compile(r"[^\W\u2e80-\uffff]+|[\u2e80-\uffff\U00020000-\U000323af]")


def text_warnings(text: str, chat: bool = False) -> list[Fault]:
    """Everything odd about one text; in a chat message, what is normal there (code, short answers) is left out."""
    found = []

    def report(kind: str, detail: str) -> None:
        found.append(Fault("warning", f"{kind}: {detail}"))

    ascii_only = text.isascii()
    for kind, pattern in (EVERYWHERE if chat else EVERYWHERE | PLAIN_TEXT).items():
        if ascii_only and kind not in ASCII_KINDS and kind not in PLAIN_TEXT:
            continue
        if first := pattern.search(text):
            count = len(pattern.findall(text))
            report(kind, f"{count}, the first is {first[0][:20]!r} at character {first.start() + 1}")
    if not ascii_only:
        if not unicodedata.is_normalized("NFC", text):
            report("not in Unicode form NFC", "characters are written in parts, or in an old form")
        if mojibake := mojibake_in(text):
            report("mojibake", mojibake)
        scripts = [name for name, pattern in SCRIPTS.items() if pattern.search(text)]
        if len(scripts) > 1:
            report("several scripts in one text", ", ".join(scripts))
    stripped = text.strip()
    if len(text) > VERY_LONG:
        report("very long", f"{len(text):,} characters")
    if not chat:
        if len(stripped) < VERY_SHORT:
            report("very short", f"{len(stripped)} characters: {stripped!r}")
        for kind, pattern in ONLY.items():
            if pattern.fullmatch(stripped):
                kind = "punctuation only" if kind == "no letters" and not _has_symbols(stripped) else kind
                report(kind, stripped[:40])
                break
    data = text.encode("utf-8")
    if len(data) > 400:
        share = len(zlib.compress(data, 1)) / len(data)
        if share < 0.12:
            report("repetition", f"zlib makes it {1 / share:.0f} times smaller")
    return found


def _has_symbols(text: str) -> bool:
    return any(unicodedata.category(char).startswith("S") and char not in "$+<=>^`|~" for char in text)


def mojibake_in(text: str) -> str:
    """UTF-8 bytes that were decoded as Windows-1252 (sequences that decode back), or as GBK (most of them do)."""
    for match in LATIN_MOJIBAKE.finditer(text):
        try:
            original = bytes(CP1252[char] for char in match[0]).decode("utf-8")
            return f"UTF-8 read as Windows-1252: {match[0]!r} was {original!r}"
        except UnicodeDecodeError:
            continue
    if back := read_as_gbk(text):
        return f"UTF-8 read as GBK: the text was {b''.join(back[:10]).decode('utf-8')!r} ..."
    return ""


def read_as_gbk(text: str) -> list[bytes]:
    """The Chinese characters in UTF-8 that were read as GBK, if the text is made of such."""
    if not GBK_MOJIBAKE.search(text):
        return []
    data = "".join(CJK.findall(text)).encode("gb18030", "ignore")
    back = CJK_IN_UTF8.findall(data)
    return back if len(back) >= 4 and len(back) * 3 > 0.4 * len(data) else []


def is_code(text: str) -> bool:
    """Whether most lines look like those of a program."""
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) > 2 and sum(bool(CODE_LINE.match(line)) for line in lines) > 0.5 * len(lines)


def cjk_share(text: str) -> float:
    """Share of Chinese characters among the words, where one Chinese character counts as a word."""
    words = WORDS.findall(text)
    return sum(map(len, CJK.findall(text))) / max(len(words), 1)
