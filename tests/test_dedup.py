"""Duplicates: recall and precision on planted ones, similarity by a plain count, memory."""

import random

import numpy as np
import pytest

from dataset import dedup
from dataset.ngrams import units_of
from tests.samples import passages, real_texts


def copies(texts: list[str], **options) -> dict[int, dedup.Copy]:
    keys = dedup.ListedKeys()
    for start in range(0, len(texts), 50):  # in parts, as they come
        part = texts[start : start + 50]
        keys.add(dedup.row_keys(part, part, units_of(part)))
    found = list(dedup.find(keys, lambda rows: [texts[row] for row in rows], **options))
    assert len({copy.row for copy in found}) == len(found)
    return {copy.row: copy for copy in found}


def jaccard(a: str, b: str) -> float:
    """Of runs of 3 words or 5 Chinese characters, as sets of tuples."""

    def runs(text: str) -> set[tuple]:
        units = units_of([text])
        n = 5 if units.share(3)[0] >= 0.5 else 3
        hashes = units.hashes.tolist()
        return {tuple(hashes[i : i + n]) for i in range(len(hashes) - n + 1)}

    first, second = runs(a), runs(b)
    return len(first & second) / max(len(first | second), 1)


def test_copies_of_each_kind_are_found_and_named():
    english = "The old man walked along the river every morning and fed the ducks with bread from his own table there."
    chinese = "老人每天早上沿着河边散步，用自己桌上的面包喂鸭子，然后坐在长椅上看报纸，直到太阳升得很高才回家。"
    other = "A young woman ran through the city every evening and sold flowers to the people there."
    changed = [english.replace("own table", "own kitchen"), chinese.replace("回家", "回去")]
    texts = [english, chinese, *changed, english, f" {english.upper()}\n", other, "1 + 1 = 2", "1 - 1 = 2", ""]
    found = copies(texts)
    assert {row: (copy.rule, copy.of) for row, copy in found.items()} == {
        2: ("near", 0), 3: ("near", 1), 4: ("exact", 0), 5: ("normalised", 0)}  # fmt: skip
    assert found[2].similarity == pytest.approx(jaccard(english, changed[0]))
    assert copies(texts, rules=("exact",)).keys() == {4}
    assert 2 not in copies(texts, threshold=0.95)


def spoilt(text: str, share: float, rng: random.Random) -> str:
    """The text with this share of its words, or Chinese characters, replaced."""
    chinese = "的" in text
    parts = list(text) if chinese else text.split(" ")
    for place in rng.sample(range(len(parts)), max(1, round(share * len(parts)))):
        parts[place] = rng.choice("甲乙丙丁戊己庚辛") if chinese else rng.choice(("alpha", "beta", "gamma", "delta"))
    return ("" if chinese else " ").join(parts)


def test_recall_and_precision_on_planted_copies():
    rng = random.Random(0)
    pieces = [part for part in passages() if len(part) > 60]
    made = [" ".join(rng.sample(pieces, 4)) for _ in range(1500)]  # texts that share pieces, but no run of them
    texts = made + [spoilt(text, rng.choice((0.005, 0.01, 0.03, 0.06)), rng) for text in made[:600]]
    found = copies(texts)
    alike = [n for n in range(600) if jaccard(texts[1500 + n], texts[n]) >= dedup.NEAR]
    right = [n for n in alike if 1500 + n in found]
    assert len(alike) > 300 and len(right) >= 0.97 * len(alike)
    # What is found is above the threshold by a plain count: precision is 1 by construction.
    assert all(jaccard(texts[row], texts[copy.of]) >= dedup.NEAR for row, copy in found.items() if copy.rule == "near")


def test_real_texts_are_not_each_others_copies():
    assert not copies(real_texts())


def test_bands_meet_as_often_as_the_formula_says():
    rng = np.random.default_rng(0)
    for similarity in (0.5, 0.7, 0.85):
        met = 0
        for _ in range(60):
            words = [f"w{n}" for n in rng.integers(0, 1 << 30, 400)]
            other = words.copy()
            # A word changed in the middle of others takes 3 runs of both: 400 - 3k are common, of 400 + 3k.
            for place in range(3, 3 + 6 * round(400 * (1 - similarity) / (1 + similarity) / 3), 6):
                other[place] = "changed" + str(place)
            keys = dedup.band_keys(units_of([" ".join(words), " ".join(other)]))
            met += bool((keys[0] == keys[1]).any())
        expected = 1 - (1 - similarity**dedup.ROWS) ** dedup.BANDS
        assert abs(met / 60 - expected) < 0.15, (similarity, met / 60, expected)


def test_store_on_disk_finds_what_the_list_finds(tmp_path):
    texts = [*real_texts(), *(text[:-5] for text in real_texts())]
    keys = dedup.row_keys(texts, texts, units_of(texts))
    store, listed = dedup.KeyStore(tmp_path), dedup.ListedKeys()
    for target in (store, listed):
        target.add(keys)
    store.close()
    results = [list(dedup.find(target, lambda rows: [texts[row] for row in rows])) for target in (store, listed)]
    assert results[0] == results[1] and len(results[0]) > 0.8 * len(real_texts())


def test_memory_of_the_search_is_a_column_and_some(tmp_path):
    import tracemalloc

    rng, rows = np.random.default_rng(0), 200_000
    store = dedup.KeyStore(tmp_path)
    bands = rng.integers(1, 1 << 63, (rows, dedup.BANDS), np.uint64)
    bands[5::10] = bands[4::10]
    exact = rng.integers(1, 1 << 63, rows, np.uint64)
    store.add(dedup.Keys(exact, exact, bands))
    store.close()
    del bands, exact
    tracemalloc.start()
    pairs = dedup.candidates(store, np.ones(rows, bool))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == rows // 10 and most < 60 * rows  # bytes: 600 MB for 10 million rows
