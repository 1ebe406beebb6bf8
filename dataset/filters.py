"""Rules by which rows are taken out, each with its thresholds by language and where these come from.

for index, rule, why in failures(texts, units, languages, settings): ...    # clean_data.py --rules prints the table

Published rules are for web pages. Floors of length are low here, because the rows of small models' data are short;
shares of repetition are looked at only in texts long enough for them (LONG).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dataset.cleaning import is_code, mojibake_in
from dataset.ngrams import CHINESE, FOREIGN, NUMBER, SINGLE, WORD, Units, mix, ngrams

LANGUAGES = ("zh", "en", "code")
GOPHER = "Gopher (Rae et al. 2021, table A1)"
FINEWEB2 = "FineWeb-2, cmn_Hani"
C4 = "C4 (Raffel et al. 2020)"
LONG = {"zh": 100, "en": 50, "code": 50}  # units from which shares of a text say something
A_WORD = {"zh": 2, "en": 1, "code": 1}  # units in a word: FineWeb-2 counts the words of Chinese, and not characters


class Rule(NamedTuple):
    """Why a row is taken out. limits: by language; one that is absent has no such rule."""

    name: str
    what: str
    limits: dict[str, float]
    kinds: str  # of rows that it is for: "pretrain", "sft" (conversations and pairs), "all"
    source: str


RULES = {
    rule.name: rule
    for rule in (
        Rule("language", "letters of another language than those of --languages: at most this share",
             {"zh": 0.3, "en": 0.3}, "all", "EvalWeb asks for 30 % of Chinese"),
        Rule("mojibake", "characters of a broken encoding that nothing mends: at most this many",
             {"zh": 0, "en": 0, "code": 0}, "all", "own"),
        Rule("replacement", "U+FFFD, a character that was lost: at most this share of the characters",
             {"zh": 0.001, "en": 0.001, "code": 0.001}, "all", "own"),
        Rule("urls", "characters in addresses of pages: at most this share", {"zh": 0.5, "en": 0.5}, "pretrain", "own"),
        Rule("short", "at least this many characters of Chinese, or words", {"zh": 10, "en": 5, "code": 20}, "pretrain",
             "own; Gopher has 50 words, EvalWeb 200 characters"),
        Rule("long", "at most this many characters", {"zh": 100_000, "en": 500_000, "code": 500_000}, "pretrain",
             f"{GOPHER}: 100,000 words"),
        Rule("long_chat", "at most this many characters in all messages", {"zh": 20_000, "en": 20_000, "code": 20_000},
             "sft", "own: twenty times MiniMind's longest row"),
        Rule("messages", "at most this many messages", {"zh": 100, "en": 100, "code": 100}, "sft", "own"),
        Rule("unbroken", "characters of ASCII without a blank: at most this many",
             {"zh": 1000, "en": 1000, "code": 1000}, "all", f"{C4}, as mC4 has it"),
        Rule("word_length", "mean letters of a word: at least this many", {"en": 3}, "pretrain", GOPHER),
        Rule("word_length_max", "mean letters of a word: at most this many", {"en": 10}, "pretrain", GOPHER),
        Rule("letters", "words that are no numbers: at least this share", {"zh": 0.735, "en": 0.8}, "pretrain",
             f"{GOPHER}; {FINEWEB2}"),
        Rule("alphanumeric", "letters and digits: at least this share of the characters", {"zh": 0.1, "en": 0.1}, "sft",
             "Data-Juicer, alpaca-cot"),
        Rule("symbols", "# and ellipses for each word: at most this many", {"zh": 0.1, "en": 0.1}, "pretrain", GOPHER),
        Rule("bullets", "lines that begin with a bullet: at most this share, from five lines on",
             {"zh": 0.9, "en": 0.9}, "pretrain", GOPHER),
        Rule("ellipsis_lines", "lines that end in an ellipsis: at most this share, from five lines on",
             {"zh": 0.3, "en": 0.3}, "pretrain", GOPHER),
        Rule("line_punctuation", "lines that end in punctuation: at least this share, from five lines on",
             {"zh": 0.106, "en": 0.12}, "pretrain", f"FineWeb; {FINEWEB2}"),
        Rule("short_lines", "lines of 30 characters or less: at most this share, from five lines on", {"en": 0.67},
             "pretrain", "FineWeb; off in FineWeb-2 for Chinese"),
        Rule("duplicate_lines", "lines that were there before: at most this share", {"zh": 0.287, "en": 0.3},
             "pretrain", f"{GOPHER}; {FINEWEB2}"),
        Rule("top_2gram", "letters in the commonest run of two words: at most this share", {"zh": 0.256, "en": 0.2},
             "pretrain", f"{GOPHER}; {FINEWEB2}"),
        Rule("top_3gram", "the same of three words", {"zh": 0.201, "en": 0.18}, "pretrain", f"{GOPHER}; {FINEWEB2}"),
        Rule("top_4gram", "the same of four words", {"zh": 0.171, "en": 0.16}, "pretrain", f"{GOPHER}; {FINEWEB2}"),
        *(Rule(f"repeated_{n}gram", f"letters in runs of {n} words that were there before: at most this share",
               {"zh": zh, "en": en}, "pretrain", f"{GOPHER}; {FINEWEB2}")
          for n, zh, en in ((5, 0.198, 0.15), (6, 0.182, 0.14), (7, 0.167, 0.13), (8, 0.154, 0.12), (9, 0.14, 0.11),
                            (10, 0.127, 0.1))),
        Rule("repetition", "letters in runs of 5 words (10 characters) that were there before: at most this share",
             {"zh": 0.6, "en": 0.6, "code": 0.6}, "sft", "Data-Juicer, alpaca-cot"),
        Rule("stop_words", "of the commonest words (the, be, to, of, and ...; 的, 年, 人 ...): at least this many",
             {"zh": 2, "en": 2}, "pretrain", f"{GOPHER}; {FINEWEB2}"),
        Rule("lorem_ipsum", "times that lorem ipsum is there: at most", {"zh": 0, "en": 0}, "pretrain", C4),
        Rule("blocked", "words of --blocked in a line, on average: at most", {"zh": 0.5, "en": 0.5, "code": 0.5}, "all",
             "EvalWeb"),
    )
}  # fmt: skip

STOP_EN = frozenset("the be to of and that have with".split())
STOP_ZH = frozenset("的年在月是和日了於为為有被人中他与與後也而由")
ENDS = tuple(".!?。！？…;；:：\"'”’」』）)】》")
URL = re.compile(r"(?:https?://|www\.)[!-~]+")
UNBROKEN = re.compile(r"[!-~]+")
BULLETS = ("•", "-", "*", "·", "●", "‣", "▪", "○")


@dataclass
class Settings:
    """Which rules are on, and their limits."""

    kind: str  # pretrain, sft or preference
    languages: Collection[str] = LANGUAGES
    off: Collection[str] = ()
    limits: Mapping[str, float] = field(default_factory=dict)  # by rule, for all languages, instead of the table's
    blocked: re.Pattern | None = None

    def limit(self, name: str, language: str) -> float | None:
        """None: there is no such rule for this language and kind of row, or it is off."""
        rule = RULES[name]
        wanted = rule.kinds == "all" or (rule.kinds == "pretrain") == (self.kind == "pretrain")
        if not wanted or name in self.off or language not in rule.limits:
            return None
        return self.limits.get(name, rule.limits[language])


def blocked_pattern(words: Sequence[str]) -> re.Pattern | None:
    """Finds any of the words: of Latin letters whole words in either case, of Chinese wherever it stands."""
    parts = [rf"\b{re.escape(word)}\b" if word.isascii() else re.escape(word) for word in words if word]
    return re.compile("|".join(parts), re.IGNORECASE) if parts else None


def languages_of(texts: Sequence[str], units: Units) -> list[str]:
    """zh, en (any Latin letters), code or other for each text."""
    chinese, foreign = units.share(CHINESE), units.share(FOREIGN)
    symbols, latin = units.share(SINGLE), units.share(WORD, NUMBER)
    result = []
    for n, text in enumerate(texts):
        if symbols[n] + latin[n] > 0.6 and symbols[n] > 0.02 and is_code(text):
            result.append("code")
        elif foreign[n] > max(chinese[n], 0.3):
            result.append("other")
        else:
            result.append("zh" if chinese[n] >= 0.3 else "en")
    return result


class _Shares:
    """Figures of all texts at once, which single rules look at."""

    def __init__(self, texts: Sequence[str], units: Units, languages: Sequence[str]):
        self.units, self.counts = units, units.counts()
        self.letters = np.maximum(np.bincount(units.text, units.lengths, len(texts)), 1)
        self.size = np.array([A_WORD.get(language, 1) for language in languages])
        self.of_five: np.ndarray | None = None
        self.long = self.counts >= np.array([LONG.get(language, 50) for language in languages])

    def _grams(self, n: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """(hashes, first unit, units in each) of runs of n words in some texts that are there more than once."""
        for size in (1, 2):
            these = wanted & (self.size == size)
            if these.any():
                hashes, first = ngrams(self.units, n * size)
                text = self.units.text[first]
                keep = these[text]
                hashes, first = mix(hashes[keep] + text[keep].astype(np.uint64)), first[keep]
                again = _not_single(hashes)
                yield hashes[again], first[again], n * size

    def top(self, n: int) -> np.ndarray:
        """(texts,) share of the letters that are in the commonest run of n words, if it is there twice."""
        result = np.zeros(len(self.counts))
        for hashes, first, size in self._grams(n, self.long):
            _, where, times = np.unique(hashes, return_index=True, return_counts=True)
            where = first[where]
            letters = times * sum(self.units.lengths[where + place] for place in range(size))
            np.maximum.at(result, self.units.text[where], letters)
        return np.minimum(result / self.letters, 1)

    def repeated(self, n: int) -> np.ndarray:
        """(texts,) share of the letters in runs of n words that were there before. Of more than five words it is
        computed where there is much of five: more it cannot be."""
        if n == 5 and self.of_five is not None:
            return self.of_five
        wanted = self.long if n == 5 else self.long & (self.repeated(5) > 0.05)
        covered = np.zeros(len(self.units.hashes) + 1, np.int32)
        for hashes, first, size in self._grams(n, wanted):
            order = np.argsort(hashes, kind="stable")
            again = first[order[1:][hashes[order[1:]] == hashes[order[:-1]]]]
            np.add.at(covered, again, 1)
            np.add.at(covered, again + size, -1)
        inside = np.cumsum(covered[:-1]) > 0
        shares = np.bincount(self.units.text, self.units.lengths * inside, len(self.counts)) / self.letters
        self.of_five = shares if n == 5 else self.of_five
        return shares


def _not_single(hashes: np.ndarray) -> np.ndarray:
    """Where hashes stand that are there more than once. Sorting them is several times as fast as argsort."""
    ordered = np.sort(hashes)
    several = ordered[1:][ordered[1:] == ordered[:-1]]
    known = np.zeros(1 << 16, bool)
    known[several >> np.uint64(48)] = True
    maybe = np.flatnonzero(known[hashes >> np.uint64(48)])
    return maybe[np.isin(hashes[maybe], several)]


def failures(
    texts: Sequence[str], units: Units, languages: Sequence[str], settings: Settings, messages: Sequence[int] = ()
) -> Iterator[tuple[int, str, str]]:
    """(which text, the first rule that it fails, why) of each text that fails one."""
    shares = _Shares(texts, units, languages)
    by_text = {name: _figure(name, shares, settings) for name in RULES}
    foreign = units.share(FOREIGN)
    for n, (text, language) in enumerate(zip(texts, languages, strict=True)):
        if language not in settings.languages and "language" not in settings.off:
            yield n, "language", f"{language}: {foreign[n]:.0%} of the words are in other scripts"
            continue
        language = language if language in LANGUAGES else "en"
        known = {name: figures[n] for name, figures in by_text.items() if figures is not None}
        known |= {"language": foreign[n], "messages": messages[n] if messages else 0}
        if fault := _first_failure(text, language, settings, known, bool(shares.long[n])):
            yield n, *fault


def _figure(name: str, shares: _Shares, settings: Settings) -> np.ndarray | None:
    """What is computed for all texts at once, if a rule asks for it."""
    if all(settings.limit(name, language) is None for language in LANGUAGES):
        return None
    units = shares.units
    if name == "short":
        return shares.counts
    if name == "letters":
        words, numbers = units.share(WORD, CHINESE, FOREIGN), units.share(NUMBER)
        return words / np.maximum(words + numbers, 1e-9)
    if name.startswith("word_length"):
        words = units.kinds == WORD
        return np.bincount(units.text, units.lengths * words, units.texts) / np.maximum(
            np.bincount(units.text, words, units.texts), 1
        )
    if name.startswith("top_"):
        return shares.top(int(name[4]))
    if name == "repetition" or name.startswith("repeated_"):
        return shares.repeated(int(re.sub(r"\D", "", name) or 5))
    return None


def _first_failure(
    text: str, language: str, settings: Settings, known: Mapping[str, float], long: bool
) -> tuple[str, str] | None:
    lines: list[str] = []
    for name, rule in RULES.items():
        if (limit := settings.limit(name, language)) is None or (name in ONLY_LONG and not long):
            continue
        if name in known:
            value = known[name]
        else:
            lines = lines or [line for line in (part.strip() for part in text.split("\n")) if line]
            value = _measure(name, text, language, lines, settings)
        if value is None:
            continue
        least = "at least" in rule.what
        if value < limit if least else value > limit:
            return name, f"{value:.4g}, {'at least' if least else 'at most'} {limit:g}"
    return None


ONLY_LONG = {"word_length", "word_length_max", "stop_words"}


def _measure(name: str, text: str, language: str, lines: Sequence[str], settings: Settings) -> float | None:
    """The figure that a rule looks at, of one text; None: the text is none that it is for."""
    match name:
        case "mojibake":
            return 0 if text.isascii() else any(word in text for word in BROKEN) + bool(mojibake_in(text))
        case "replacement":
            return text.count("\ufffd") / max(len(text), 1)
        case "long" | "long_chat":
            return len(text)
        case "unbroken":
            return max(map(len, UNBROKEN.findall(text)), default=0) if len(text) > 1000 else 0
        case "alphanumeric":
            return sum(map(str.isalnum, text)) / len(text) if text else None
        case "symbols":
            words = len(text) / 2 if language == "zh" else len(text.split())
            return (text.count("#") + text.count("...") + text.count("…")) / max(words, 1)
        case "urls":
            return sum(map(len, URL.findall(text))) / max(len(text), 1) if "://" in text or "www." in text else 0
        case "bullets":
            return sum(line.startswith(BULLETS) for line in lines) / len(lines) if len(lines) >= 5 else None
        case "ellipsis_lines":
            return sum(line.endswith(("...", "…")) for line in lines) / len(lines) if len(lines) >= 5 else None
        case "line_punctuation":
            return sum(line.endswith(ENDS) for line in lines) / len(lines) if len(lines) >= 5 else None
        case "short_lines":
            return sum(len(line) <= 30 for line in lines) / len(lines) if len(lines) >= 5 else None
        case "stop_words":
            chinese = len(STOP_ZH.intersection(text)) if language == "zh" else 0
            return chinese + len(STOP_EN.intersection(text.lower().split()))
        case "duplicate_lines":
            return 1 - len(set(lines)) / max(len(lines), 1)
        case "lorem_ipsum":
            return text.lower().count("lorem ipsum")
        case "blocked" if settings.blocked:
            return len(settings.blocked.findall(text)) / max(len(lines), 1)
    return None


BROKEN = ("锟斤拷", "烫烫烫", "屯屯屯")  # what is left of bytes that some program gave up on
