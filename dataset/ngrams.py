"""Words and their n-grams as 64-bit hashes, of many texts at once: what near duplicates, overlap with benchmarks and
repetition are measured with.

A unit is a word or number in lower case, or one character where words are not parted by blanks (Chinese, Japanese,
Korean), or a symbol such as + and %. Blanks and punctuation are none.
"""

import functools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FROM_CJK = 0x2E80  # from here on a letter is a unit
WORD, SINGLE, CHINESE = 1, 2, 3  # what a character is; 0: it parts words
FOREIGN, NUMBER = 4, 5  # what a unit of another script than Latin and Chinese is, and one that begins with a digit
FROM_FOREIGN = 0x250  # letters below are Latin
SYMBOLS = set("-*/%^&@#\\")  # punctuation to Unicode, but 3 - 2 is not 3 * 2
# Powers of an odd number modulo 2**64: the place of a character in its word, or of a unit in its n-gram, counts.
POWERS = np.array([pow(0x9E3779B97F4A7C15, n + 1, 1 << 64) for n in range(64)], np.uint64)


class Units(NamedTuple):
    """The units of some texts, one after the other."""

    hashes: np.ndarray  # (U,) uint64
    text: np.ndarray  # (U,) int32: the text that a unit is of
    kinds: np.ndarray  # (U,) uint8: WORD, SINGLE, CHINESE, FOREIGN or NUMBER
    lengths: np.ndarray  # (U,) int32, characters
    texts: int  # how many there are

    def share(self, *kinds: int) -> np.ndarray:
        """(texts,) float: how much of a text's units are of these kinds; 0 of a text without units."""
        return np.bincount(self.text, np.isin(self.kinds, kinds), self.texts) / np.maximum(self.counts(), 1)

    def counts(self) -> np.ndarray:
        """(texts,) units of each text."""
        return np.bincount(self.text, minlength=self.texts)


@functools.cache
def _kinds() -> np.ndarray:
    """(65536,) uint8: what each character of the basic plane is."""
    kinds = np.zeros(1 << 16, np.uint8)
    for code in range(1 << 16):
        category = unicodedata.category(chr(code))
        if category[0] in "LNM":
            kinds[code] = WORD if code < FROM_CJK else SINGLE
        elif category[0] == "S" or chr(code) in SYMBOLS:
            kinds[code] = SINGLE
    kinds[0x3400:0x4DC0] = kinds[0x4E00:0xA000] = kinds[0xF900:0xFB00] = CHINESE
    return kinds


def mix(hashes: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, each bit of which depends on all of the input (the finaliser of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def units_of(texts: Sequence[str]) -> Units:
    """The units of texts, in order."""
    lowered = [text.lower() for text in texts]
    codes = np.frombuffer("\n".join(lowered).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[np.minimum(codes, 0xFFFF)]
    kinds[codes > 0xFFFF] = SINGLE
    kinds[(codes >= 0x20000) & (codes < 0x323B0)] = CHINESE
    is_word = kinds == WORD
    begins = kinds > WORD
    begins[:1] |= is_word[:1]
    begins[1:] |= is_word[1:] & ~is_word[:-1]
    starts = np.flatnonzero(begins)
    if not len(starts):
        nothing = np.zeros(0, np.int32)
        return Units(nothing.astype(np.uint64), nothing, nothing.astype(np.uint8), nothing, len(texts))
    # From each unit's first character to before the next one's; what lies between units counts nothing.
    codes, kinds = codes[starts[0] :], kinds[starts[0] :]
    offsets = np.arange(len(codes)) - np.repeat(starts - starts[0], np.diff(starts, append=starts[0] + len(codes)))
    inside = kinds > 0
    values = np.where(inside, codes.astype(np.uint64) * POWERS[offsets & 63], np.uint64(0))
    hashes = mix(np.add.reduceat(values, starts - starts[0]))
    lengths = np.add.reduceat(inside.astype(np.int32), starts - starts[0])
    ends = np.cumsum([len(text) + 1 for text in lowered])
    text = np.searchsorted(ends, starts, "right").astype(np.int32)
    first, of_unit = codes[starts - starts[0]], kinds[starts - starts[0]]
    of_unit[(of_unit == WORD) & (first >= FROM_FOREIGN)] = FOREIGN
    of_unit[(first >= ord("0")) & (first <= ord("9"))] = NUMBER
    of_unit[((first >= 0x3040) & (first < 0x3100)) | ((first >= 0xAC00) & (first < 0xD7B0))] = FOREIGN  # kana, Hangul
    return Units(hashes, text, of_unit, lengths, len(texts))


def ngrams(units: Units, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes (G,) uint64 of the n-grams that lie within a text, (G,) the unit that each begins with)."""
    count = len(units.hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes = units.hashes[:count] * POWERS[0]
    for place in range(1, n):
        hashes += units.hashes[place : place + count] * POWERS[place]
    first = np.flatnonzero(units.text[:count] == units.text[n - 1 :])
    return mix(hashes[first]), first
