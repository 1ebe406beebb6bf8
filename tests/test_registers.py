"""The starter corpus' registers: what a question says survives how it is typed.

pytest tests/test_registers.py
"""

import random
import re
import unicodedata

import pytest

from dataset.starter import registers
from dataset.starter.corpus import LITERAL, SKILLS, draw_item
from dataset.starter.registers import typed

LANGUAGES = ("zh", "en")


def drawn(skill: str, count: int = 300):
    """(the question, how it was typed) of a skill in both languages."""
    rng = random.Random(7)
    for i in range(count):
        lang = LANGUAGES[i % 2]
        question = draw_item(rng, skill, lang).question
        yield question, typed(rng, question, lang, literal=skill in LITERAL)


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+", unicodedata.normalize("NFKC", text))


@pytest.mark.parametrize("skill", SKILLS)
def test_numbers_survive_in_their_order(skill):
    assert all(numbers(question) == numbers(said)[: len(numbers(question))] for question, said in drawn(skill))


@pytest.mark.parametrize("skill", sorted(LITERAL))
def test_what_the_answer_repeats_is_not_touched(skill):
    for question, said in drawn(skill):
        kept = words(re.split("：|: ", question)[-1])
        assert "".join(words(said)).endswith("".join(kept)), (question, said)


def words(text: str) -> list[str]:
    """However they are parted."""
    return re.findall(r"[^\s,，、?？.。]+", text)


def test_a_typo_is_one_letter_and_never_in_a_number():
    rng = random.Random(3)
    for _ in range(500):
        said = registers.misspelt(rng, "What is the capital of France in 1234?", "en")
        assert numbers(said) == ["1234"] and abs(len(said) - 38) <= 1
        assert (
            sum(a != b for a, b in zip(said.split(), "What is the capital of France in 1234?".split(), strict=True))
            <= 1
        )


@pytest.mark.parametrize(
    ("lang", "question", "said"),
    [
        ("en", "What is the capital of France?", {"capital of France", "France capital"}),
        ("zh", "法国的首都是哪里？", {"法国的首都"}),
        ("en", "Which planet is the hottest planet?", {"Which planet is the hottest"}),
    ],
)
def test_in_short(lang, question, said):
    rng = random.Random(0)
    assert {registers.shortened(rng, question, lang) for _ in range(50)} == said


def test_sums_are_typed_in_many_ways():
    rng = random.Random(0)
    said = {registers.calculation(rng, "2 + 3", "en") for _ in range(300)}
    assert {"2+3", "2+3=", "2 plus 3", "2 + 3"} <= said
    assert registers.calculation(rng, "2 + 3 - 4 = ?", "en") == "2 + 3 - 4 = ?"  # more than one sign: another skill
    assert registers.calculation(rng, "2024-05-03", "en") == "2024-05-03"


def test_every_rule_is_used_and_most_questions_change():
    pairs = [pair for skill in SKILLS for pair in drawn(skill, 200)]
    assert 0.5 < sum(question != said for question, said in pairs) / len(pairs) < 0.95
    for mark in ("  ", "？？", "pls", "周", "啥", "whats"):
        assert any(mark in said for _, said in pairs), mark
