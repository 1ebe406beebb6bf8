"""What is odd about a text though a model can be trained on it: web dirt, broken encodings, repetition, duplicates.

Used by scripts/inspect_data.py. Training keeps such rows; whether they should go is the user's decision.
"""

import hashlib
import re
import unicodedata
import zlib

from dataset.checks import Fault

VERY_SHORT, VERY_LONG = 10, 10_000  # characters
NEAR = 0.6  # share of common word triples from which two texts are near duplicates
MOST_NEAR = 200_000  # rows among which near duplicates are searched: the index keeps about 3 kB of each

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
        if mojibake := _mojibake(text):
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


def _mojibake(text: str) -> str:
    """UTF-8 bytes that were decoded as Windows-1252 (sequences that decode back), or as GBK (most of them do)."""
    for match in LATIN_MOJIBAKE.finditer(text):
        try:
            original = bytes(CP1252[char] for char in match[0]).decode("utf-8")
            return f"UTF-8 read as Windows-1252: {match[0]!r} was {original!r}"
        except UnicodeDecodeError:
            continue
    if CJK.search(text):
        data = "".join(CJK.findall(text)).encode("gb18030", "ignore")
        back = CJK_IN_UTF8.findall(data)
        if len(back) >= 4 and len(back) * 3 > 0.4 * len(data):
            return f"UTF-8 read as GBK: the text was {b''.join(back[:10]).decode('utf-8')!r} ..."
    return ""


def cjk_share(text: str) -> float:
    """Share of Chinese characters among the words, where one Chinese character counts as a word."""
    words = WORDS.findall(text)
    return sum(map(len, CJK.findall(text))) / max(len(words), 1)


class Duplicates:
    """Remembers rows (8 bytes for a hash each) and reports those that were there before, in full or nearly."""

    def __init__(self, near: bool = True):
        self.exact: dict[bytes, int] = {}
        self.normal: dict[bytes, int] = {}
        self.index = self.blank = None
        if near:
            try:
                from datasketch import MinHash, MinHashLSH

                self.blank = MinHash(num_perm=128, hashfunc=int)
                self.index = MinHashLSH(threshold=NEAR, num_perm=128, weights=(0.1, 0.9))
                self.signatures: dict = {}
            except ImportError:
                pass

    def check(self, number: int, text: str, same: str | None = None) -> Fault | None:
        """Compares row `number` with those before. `same`: what a full duplicate must have in common, if not `text`."""
        if (first := self._seen(self.exact, same or text, number)) is not None:
            return Fault("warning", f"exact duplicate: of line {first}")
        normal = " ".join(unicodedata.normalize("NFKC", same or text).lower().split())
        if (first := self._seen(self.normal, normal, number)) is not None:
            return Fault("warning", f"same text but for blanks, case or width: of line {first}")
        if self.index is None or len(self.signatures) >= MOST_NEAR:
            return None
        hashes = [zlib.crc32(word.encode("utf-8")) for word in WORDS.findall(text.lower())]
        triples = {
            (a * 1_000_003 ^ b * 8_191 ^ c) & 0xFFFFFFFF
            for a, b, c in zip(hashes, hashes[1:], hashes[2:], strict=False)
        }
        if len(triples) < 8:
            return None
        signature = self.blank.copy()
        signature.update_batch(triples)
        likeness = [(signature.jaccard(self.signatures[other]), -other) for other in self.index.query(signature)]
        self.index.insert(number, signature, check_duplication=False)
        self.signatures[number] = signature
        share, first = max(likeness, default=(0, 0))
        return Fault("warning", f"near duplicate: of line {-first}, about {share:.0%} alike") if share >= NEAR else None

    @staticmethod
    def _seen(table: dict[bytes, int], text: str, number: int) -> int | None:
        key = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
        first = table.setdefault(key, number)
        return None if first == number else first
