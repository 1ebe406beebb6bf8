"""The starter corpus' files for the stages after SFT: two LoRA subjects, preference pairs, problems with worked steps.

Same contract as starter_skills.py, one function a subject, (rng, lang, held) -> Item; starter.py writes the files.
"""

import random

from dataset.starter_chat import IDENTITY
from dataset.starter_facts import RELATIONS, load_json, load_table
from dataset.starter_skills import (
    NAMES,
    Item,
    ask_fact,
    countable,
    pick_wording,
    spoken,
    worked_difference,
    worked_sum,
)
from dataset.starter_words import UNITS, WEEKDAYS

STAGES = load_json("stages")  # who the new identity is, everyday health, kind and unkind replies


# --- LoRA ------------------------------------------------------------------------------------------------------------


def persona(rng: random.Random, lang: str, held: bool) -> Item:
    """The questions about who it is, answered by somebody else. Unseen when held out: the wording."""
    answers = STAGES["persona"][lang]
    intent = rng.choice([intent for intent in IDENTITY[lang] if intent["answers"][0] in answers])
    wording, key = pick_wording(rng, intent["questions"], held)
    answer = answers[intent["answers"][0]]
    return Item(spoken(rng, wording, lang), answer, f"{key}|persona|{wording}" if key.startswith("new") else "")


def health(rng: random.Random, lang: str, held: bool) -> Item:
    """First aid for everyday complaints, and when to see a doctor; unseen when held out: this wording of this case."""
    table = STAGES["health"][lang]
    case, advice, danger = rng.choice(table["cases"])
    wording, key = pick_wording(rng, table["questions"], held)
    return Item(wording.format(case), table["answer"].format(advice, danger), f"{key}|health|{lang}|{case}")


# --- preferences -----------------------------------------------------------------------------------------------------


def preference(rng: random.Random, lang: str, held: bool) -> tuple[Item, str]:
    """(Item with the better answer, the worse answer): kind before unkind, true before false. Unseen when held out:
    this reply to this thing, animal or child; this wording of this fact."""
    if rng.random() < 0.7:
        about, said, kind, unkind = rng.choice(STAGES["manners"][lang])
        if about == "name":
            subject = rng.choice(NAMES[lang])
        else:
            animals, things = load_table("animals"), load_table("things")
            things = [row for row in things if row["plural"] not in ("-", row["en"])]  # what one can have one of
            subject = rng.choice(animals if about == "animal" else things)[lang]
        return Item(said.format(subject), kind.format(subject), f"manners|{said}|{subject}"), unkind.format(subject)
    relation = rng.choice([r for r in RELATIONS if lang in r.rows and "v}" in r.answer[lang]])
    row = rng.choice(relation.rows[lang])
    others = [other for other in relation.rows[lang] if other["v"] != row["v"]]
    if not others:
        return preference(rng, lang, held)
    wrong = rng.choice(others)
    false = relation.fill(relation.answer[lang], row | {"v": wrong["v"], "av": wrong["av"]})
    return ask_fact(rng, lang, held, relation, row), false


# --- reasoning -------------------------------------------------------------------------------------------------------

SHOPPING = {
    "zh": [
        "{n}有 {a} {m}{t}，买了 {b} {m}，又送出 {c} {m}。现在有几{m}？",
        "{n}有 {a} {m}{t}，妈妈给了 {b} {m}，丢了 {c} {m}，还剩多少{m}？",
    ],
    "en": [
        "{n} has {a} {t}, buys {b} more and gives away {c}. How many {t} does {n} have now?",
        "{n} has {a} {t}. Mother brings {b} more, then {c} are lost. How many {t} are left?",
    ],
}


def two_sums(rng: random.Random, lang: str) -> tuple[str, str, str, str]:
    """a + b - c, as a story or in digits."""
    a, b = rng.randint(2, 25), rng.randint(2, 25)
    c = rng.randint(2, a + b - 1)
    steps = f"{worked_sum(a, b)}\n{worked_difference(a + b, c)}"
    if rng.random() < 0.4:
        question = rng.choice(
            ["{} + {} - {} = ?", {"zh": "{} + {} - {} 等于多少？", "en": "What is {} + {} - {}?"}[lang]]
        )
        question = question.format(a, b, c)
    else:
        thing, measure = countable(rng, lang)
        question = rng.choice(SHOPPING[lang]).format(n=rng.choice(NAMES[lang]), a=a, b=b, c=c, t=thing, m=measure)
    return question, steps, str(a + b - c), f"{a}|{b}|{c}"


def days_ahead(rng: random.Random, lang: str) -> tuple[str, str, str, str]:
    """The weekday in three to eight days, counted one by one."""
    ring, start, n = WEEKDAYS[lang], rng.randrange(7), rng.randint(3, 8)
    days = [ring[(start + i) % 7] for i in range(n + 1)]
    steps = ", ".join(f"{i} {day}" for i, day in enumerate(days[1:], 1))
    if lang == "zh":
        wording, index = rng.choice([("今天是{0}，{1} 天后是星期几？", 0), ("{0}再过 {1} 天是星期几？", 1)])
    else:
        wording, index = rng.choice(
            [("Today is {0}. What day is it in {1} days?", 0), ("Which day comes {1} days after {0}?", 1)]
        )
    return wording.format(days[0], n), steps, days[-1], f"{index}|{days[0]}|{n}"


def mixed_units(rng: random.Random, lang: str) -> tuple[str, str, str, str]:
    """2 hours and 15 minutes in minutes."""
    size, small_zh, small_en, big_zh, big_en = rng.choice(UNITS[:7])
    n, rest = rng.randint(1, 4), rng.randint(1, min(size, 50) - 1)
    steps = f"{n} × {size} = {n * size}\n{worked_sum(n * size, rest)}"
    if lang == "zh":
        question = f"{n} {big_zh}零 {rest} {small_zh}一共是多少{small_zh}？"
    else:
        big = big_en + ("s" if n > 1 else "")
        question = f"How many {small_en} are {n} {big} and {rest} {small_en if rest > 1 else small_en[:-1]}?"
    return question, steps, str(n * size + rest), f"{n}|{small_en}|{rest}"


def who_has_more(rng: random.Random, lang: str) -> tuple[str, str, str, str]:
    """Two children, one of them with two amounts to add."""
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    c = rng.choice([other for other in range(3, 16) if other != a + b])
    n, m = rng.sample(NAMES[lang], 2)
    x, y = max(a + b, c), min(a + b, c)
    winner = n if a + b > c else m
    if lang == "zh":
        question = f"{n}有 {a} 个苹果和 {b} 个梨，{m}有 {c} 个桃子。谁的水果多？"
        return question, f"{a} + {b} = {a + b}\n{x} 比 {y} 大", winner, f"{a}|{b}|{c}"
    question = f"{n} has {a} apples and {b} pears, {m} has {c} peaches. Who has more fruit?"
    return question, f"{a} + {b} = {a + b}\n{x} is larger than {y}", winner, f"{a}|{b}|{c}"


PROBLEMS = {  # share, and the function that makes one: (question, steps, answer, key)
    "two_sums": (4, two_sums),
    "days_ahead": (2, days_ahead),
    "mixed_units": (2, mixed_units),
    "who_has_more": (2, who_has_more),
}


def problem_of(kind: str):
    """Problems of several steps; `reasoning` has them. Unseen when held out: these numbers or days."""

    def problem(rng: random.Random, lang: str, held: bool) -> Item:
        question, steps, answer, key = PROBLEMS[kind][1](rng, lang)
        return Item(question, answer, f"{kind}|{lang}|{key}", reasoning=steps)

    return problem
