"""Overlap with benchmark questions: the n-grams are those of a plain loop, and a question is found where it stands."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dataset.chat import load_tokenizer
from dataset.files import DataError
from dataset.lm_dataset import pretrain_dataset, sft_dataset
from dataset.ngrams import CHINESE, ngrams, units_of
from dataset.overlap import N, QuestionGrams, overlap
from tests.samples import passages, real_texts


def plain_units(text: str) -> list[str]:
    """Words, and characters where no blanks part words, by a pattern instead of arrays."""
    return re.findall(
        r"[^\W_\u2e80-\U0010ffff]+|[\u2e80-\ud7ff\uf900-\ufaff\uff10-\uff5a\U00010000-\U0010ffff]", text.lower()
    )


def test_units_are_words_and_chinese_characters():
    text = "The cat's 3 小猫 sat,on café 𠮷 3-2=1"
    units = units_of(["", text, "  ", "猫"])
    words = ["the", "cat", "s", "3", "小", "猫", "sat", "on", "café", "𠮷", "3", "-", "2", "=", "1"]
    assert units.text.tolist() == [1] * len(words) + [3] and units.lengths.tolist() == [*map(len, words), 1]
    alone = [int(units_of([word]).hashes[0]) for word in words]
    assert units.hashes[:-1].tolist() == alone and units.hashes[-1] == alone[5]
    assert len(set(alone)) == len(set(words))
    assert (units.kinds == CHINESE).tolist() == [word in "小猫𠮷" for word in [*words, "猫"]]


def test_ngrams_lie_within_a_text_and_are_equal_only_if_their_words_are():
    texts = real_texts()[:20]
    units = units_of(texts)
    for n in (1, 3, 13):
        hashes, first = ngrams(units, n)
        assert len(hashes) == sum(max(count - n + 1, 0) for count in units.counts())
        assert (units.text[first] == units.text[first + n - 1]).all()
        spelled = [tuple(units.hashes[at : at + n].tolist()) for at in first]
        assert len(set(spelled)) == len(np.unique(hashes)) == len(set(zip(spelled, hashes.tolist(), strict=True)))


def questions_in(texts: list[str]) -> list[str]:
    """One question from the middle of each text, in other case and punctuation."""
    return [text[40:160].upper().replace(",", " ;") for text in texts]


def test_questions_are_found_where_they_stand_and_nowhere_else(tmp_path):
    texts = [text for text in passages() if len(text) > 200]
    path = tmp_path / "data.jsonl"
    rows = [{"text": text} for text in texts[::2]]
    rows.append({"conversations": [{"role": "user", "content": texts[1]}]})
    path.write_text("not a row\n" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = overlap([*questions_in(texts), "too short"], [path])
    assert found.per_question == [n % 2 == 0 or n == 1 for n in range(len(texts))] + [False]
    assert found.checked == len(texts)
    assert found.share == sum(found.per_question) / len(texts)


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_questions_are_found_in_the_token_cache(tmp_path, kind):
    texts = [text for text in passages() if len(text) > 200]
    rows = [{"text": text} for text in texts[::2]]
    if kind == "sft":
        turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": row["text"]}] for row in rows]
        rows = [{"conversations": turn} for turn in turns]
    data, cache, tokenizer = tmp_path / "data.jsonl", tmp_path / "cache", load_tokenizer()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    {"pretrain": pretrain_dataset, "sft": sft_dataset}[kind](data, tokenizer, 4096, cache_dir=cache, quiet=True)
    questions = questions_in(texts)
    assert overlap(questions, [cache], tokenizer) == overlap(questions, [data])
    (entry,) = filter(Path.is_dir, cache.iterdir())
    assert overlap(questions, [entry], tokenizer) == overlap(questions, [data])
    (entry / "summary.json").rename(entry / "kept")
    figures = {"figures": json.loads((entry / "kept").read_text(encoding="utf-8"))}
    (entry / "shard-00000.json").write_text(json.dumps(figures), encoding="utf-8")  # as of shards not yet complete
    assert overlap(questions, [cache], tokenizer) == overlap(questions, [data])
    for folder, own in ((tmp_path / "cache" / "none", tokenizer), (cache, SimpleNamespace(chat_hash="another"))):
        folder.mkdir(exist_ok=True)
        with pytest.raises(DataError, match="no rows of tokens made with the tokenizer"):
            overlap(questions, [folder], own)


def test_equal_to_comparing_every_13_gram():
    texts = real_texts()
    questions = [text[i : i + 150] for i, text in enumerate(texts) if len(text) > 400]

    def grams(text: str) -> set[tuple[str, ...]]:
        words = plain_units(re.sub(r"[-*/%^&@#\\$+<=>^`|~°©®´¨]", " ", text))
        return {tuple(words[i : i + N]) for i in range(len(words) - N + 1)}

    clean = [re.sub(r"[-*/%^&@#\\$+<=>^`|~°©®´¨]", " ", text) for text in (*texts, *questions)]
    texts, questions = clean[: len(texts)], clean[len(texts) :]
    expected = {
        (t, q)
        for t, text in enumerate(map(grams, texts))
        for q, question in enumerate(map(grams, questions))
        if text & question
    }
    assert set(QuestionGrams(questions).hits(texts)) == expected and len(expected) >= len(questions)


def test_a_short_question_counts_as_a_whole_and_boilerplate_not_at_all():
    short = "中国最长的河是长江"  # 9 characters
    asked = "Which of the following statements about it is the one that experts hold to be true: "
    questions = [short, *(f"{asked}{word}" for word in "abcdefghijklm")]
    hits = set(QuestionGrams(questions).hits([f"谁都知道，{short}。", "中国最长的河是黄河吗？是长江", f"{asked}z"]))
    assert hits == {(0, 0)}
