"""The starter corpus' exact skills: facts, numbers, lists, words. One function a skill: (rng, lang, held) -> Item.

What may be trained on is decided by is_held_out(item.key) alone: the writers in corpus.py draw items again until
the key falls on the side they want. Chat skills (identity, system prompts, several turns) are in chat.py.
"""

import hashlib
import random
import re
from dataclasses import dataclass, field

from dataset.starter.facts import NEW_WORDINGS, RELATIONS, WORDINGS, Relation, an, cap, load_json, load_table

# Difficulty. Small ranges that are learnt in minutes beat impressive ones that fail.
ADD_MAX = 50  # operands of additions and subtractions
SMALL_SHARE = 0.35  # of the trained sums have operands up to ten only
WORD_MAX = 20  # operands of arithmetic in words
TIMES_MAX = 9  # multiplication table
COMPARE_MAX = (12, 99)  # of numbers to compare: half are up to the first, half up to the second
IN_SHORT = 0.2  # share of the facts that are asked for in a word or two
OTHERWISE = 0.4  # share of the trained questions in the wordings of tables/wordings.json
HELD_OUT_ONE_IN = 10  # share of the keys kept for the held-out file

NAMES = {
    "zh": ["小明", "小红", "小华", "小丽", "乐乐", "豆豆"],
    "en": ["Tom", "Lily", "Ben", "Anna", "Mia", "Sam"],
}


PEOPLE = load_json("names")


def person(rng: random.Random, lang: str) -> str:
    """The first name of somebody: in English one of two hundred or, now and then, one that nobody has; in Chinese made
    of usual characters. So many that to call somebody by it is to copy it."""
    if lang == "zh":
        surname, a, b = rng.choice(PEOPLE["zh"]["surnames"]), *rng.sample(PEOPLE["zh"]["given"], 2)
        return rng.choice([f"小{a}", f"阿{a}", f"老{surname}", a + a, a + b, surname + a, surname + a + b])
    if rng.random() < 0.75:
        return rng.choice(PEOPLE["en"].split())
    return cap("".join(rng.choice("bdfgjklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))))


def people(rng: random.Random, lang: str, fewest: int, most: int) -> list[str]:
    """The first names of several, now and then without capitals."""
    names = [person(rng, lang) for _ in range(rng.randint(fewest, most))]
    return [name.lower() for name in names] if rng.random() < 0.4 else names


@dataclass
class Item:
    """One exchange. `key` says what is unseen when it is held out; an empty key is always trained on."""

    question: str
    answer: str
    key: str = ""
    system: str | None = None
    history: list[tuple[str, str]] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)  # further answers that count as right
    must_contain: list[str] = field(default_factory=list)
    declines: bool = False  # right is to say that it does not know
    about: tuple[str, ...] = ()  # the task and what it is done with, where 'And X?' can ask the same of another
    reasoning: str = ""  # the steps, where they are written apart from the answer


def is_held_out(key: str) -> bool:
    """True for one key in HELD_OUT_ONE_IN, the same in every process; keys that open with 'new|' always."""
    if not key or key.startswith("new|"):
        return bool(key)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % HELD_OUT_ONE_IN == 0


def trainable(make, *args) -> Item:
    """make(*args) again and again until the Item may be trained on: for exchanges inside a longer conversation."""
    while is_held_out((item := make(*args)).key):
        pass
    return item


def pick_wording(rng: random.Random, wordings: list[str], held: bool) -> tuple[str, str]:
    """(wording, key): trained wordings are all but the last NEW_WORDINGS, which one held-out question in four uses."""
    if held and rng.random() < 0.25:
        index = len(wordings) - 1 - rng.randrange(NEW_WORDINGS)
        return wordings[index], f"new|{index}"
    index = rng.randrange(len(wordings) - NEW_WORDINGS)
    return wordings[index], str(index)


def in_other_words(rng: random.Random, held: bool, lang: str, question: str, kind: str, **parts: object) -> str:
    """The question as it is, or, to train on, as people ask it."""
    if held or rng.random() > OTHERWISE:
        return question
    return rng.choice(WORDINGS[kind][lang]).format(**parts)


# --- facts ---------------------------------------------------------------------------------------------------------


def ask_fact(rng: random.Random, lang: str, held: bool, relation: Relation, row: dict[str, str]) -> Item:
    """One fact; unseen when held out: this wording with this entity."""
    answer = relation.fill(relation.answer[lang], row)
    if not held and rng.random() < IN_SHORT:
        question = relation.ask_in_short(rng, lang, row)
        return Item(question, answer, f"short|{question}")
    if not held and lang in relation.otherwise and rng.random() < OTHERWISE:
        question = relation.ask_otherwise(rng, lang, row)
        return Item(question, answer, f"otherwise|{question}")
    wording, key = pick_wording(rng, relation.questions[lang], held)
    return Item(relation.fill(wording, row), answer, f"{key}|{relation.name}|{lang}|{row['k']}")


def fact_item(rng: random.Random, lang: str, held: bool, relations: list[Relation]) -> Item:
    """A fact from one of the relations; small tables get more than their share."""
    relations = [relation for relation in relations if lang in relation.rows]
    relation = rng.choices(relations, [8 + len(relation.rows[lang]) for relation in relations])[0]
    return ask_fact(rng, lang, held, relation, rng.choice(relation.rows[lang]))


def facts_of(skill: str):
    relations = [relation for relation in RELATIONS if relation.skill == skill]
    return lambda rng, lang, held: fact_item(rng, lang, held, relations)


# --- numbers -------------------------------------------------------------------------------------------------------

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_word(n: int, lang: str) -> str:
    """0..99 in words: 'twenty-three', '二十三'."""
    if lang == "en":
        return ONES[n] if n < 20 else TENS[n // 10] + ("-" + ONES[n % 10] if n % 10 else "")
    digits = "零一二三四五六七八九"
    if n < 10:
        return digits[n]
    return (digits[n // 10] if n >= 20 else "") + "十" + (digits[n % 10] if n % 10 else "")


def quantity_word(n: int, lang: str) -> str:
    """The number's word before things that are counted: '两' in place of '二'."""
    return "两" if lang == "zh" and n == 2 else number_word(n, lang)


def pair_key(a: int, b: int) -> str:
    """One key for a + b, b + a, a - b and b - a, in every wording. Pairs with a round ten, and of a digit with a number
    below 20, are always trained on: they are the tables from which the held-out pairs must be worked out."""
    easy = a % 10 == 0 or b % 10 == 0 or (min(a, b) < 10 and max(a, b) < 20)
    return "" if easy else f"pair|{min(a, b)}|{max(a, b)}"


def worked_sum(a: int, b: int) -> str:
    """'7 + 8 = 15, 10 + 20 = 30, 30 + 15 = 45' for 17 + 28: ones, tens, both. Each step is a small sum by itself."""
    ones, tens = a % 10 + b % 10, a - a % 10 + b - b % 10
    steps = [f"{a % 10} + {b % 10} = {ones}"] if a % 10 and b % 10 else []
    steps += [f"{a - a % 10} + {b - b % 10} = {tens}"] if a >= 10 and b >= 10 else []
    steps += [f"{tens} + {ones} = {a + b}"] if tens and ones else []
    return ", ".join(steps) if a and b else f"{a} + {b} = {a + b}"


def worked_difference(a: int, b: int) -> str:
    """'13 - 7 = 6, 30 - 10 = 20, 20 + 6 = 26' for 43 - 17: where the ones do not suffice, they borrow a ten."""
    a_ones, a_tens = a % 10, a - a % 10
    if a_ones < b % 10:
        a_ones, a_tens = a_ones + 10, a_tens - 10
    if b == 0 or a % 10 == b % 10 == 0 or (a_tens == 0 and b < 10):
        return f"{a} - {b} = {a - b}"
    ones, tens = a_ones - b % 10, a_tens - (b - b % 10)
    steps = [f"{a_ones} - {b % 10} = {ones}"] if b % 10 else []
    steps += [f"{a_tens} - {b - b % 10} = {tens}"] if b >= 10 else []
    return ", ".join([*steps, f"{tens} + {ones} = {a - b}"])


PLUS = {
    "zh": ["{} + {} = ?", "{} + {} 等于多少？", "{} 加 {} 等于几？", "算一算：{} + {}", "{} + {}"],
    "en": ["What is {} + {}?", "{} + {} = ?", "Calculate {} + {}.", "How much is {} plus {}?", "{} + {}"],
}
MINUS = {
    "zh": ["{} - {} = ?", "{} - {} 等于多少？", "{} 减 {} 等于几？", "算一算：{} - {}", "{} - {}"],
    "en": ["What is {} - {}?", "{} - {} = ?", "Calculate {} - {}.", "How much is {} minus {}?", "{} - {}"],
}
TIMES = {
    "zh": [
        "{} × {} = ?",
        "{} × {} 等于多少？",
        "{} 乘 {} 等于几？",
        "算一算：{} × {}",
        "{} × {}",
        "{} 乘以 {} 是多少？",
    ],
    "en": [
        "What is {} × {}?",
        "{} × {} = ?",
        "Calculate {} × {}.",
        "How much is {} times {}?",
        "{} × {}",
        "Work out {} × {}.",
    ],
}
TIMES_IN_WORDS = {
    "zh": ["{}乘{}", "{}乘以{}等于几？", "{}{}得几？", "{}乘{}是多少？"],
    "en": ["{} times {}", "What is {} times {}?"],
}
MORE = {
    "zh": [
        "{n}有 {a} {m}{t}，又买了 {b} {m}。现在一共有几{m}？",
        "{n}有 {a} {m}{t}，妈妈又给了 {b} {m}，一共有多少{m}？",
    ],
    "en": [
        "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
        "{n} has {a} {t}. Mother gives {n} {b} more. How many {t} are there now?",
    ],
}
FEWER = {
    "zh": ["{n}有 {a} {m}{t}，送出了 {b} {m}。还剩几{m}？", "{n}有 {a} {m}{t}，送给朋友 {b} {m}，还剩多少{m}？"],
    "en": [
        "{n} has {a} {t} and gives away {b}. How many {t} are left?",
        "{n} has {a} {t} and loses {b}. How many {t} are left?",
    ],
}


def countable(rng: random.Random, lang: str) -> tuple[str, str]:
    """(plural in English or the bare noun in Chinese, Chinese measure word) of something one can have many of."""
    row = rng.choice(
        [
            r
            for r in load_table("things")
            if r["category_en"] in ("fruit", "tool", "clothing") and r["plural"] != r["en"]
        ]
    )
    return (row["zh"], row["measure"]) if lang == "zh" else (row["plural"], "")


def both(lang: str, a: int, b: int) -> str:
    return f"{a}和{b}" if lang == "zh" else f"{a} and {b}"


def sum_in_words(rng: random.Random, lang: str, held: bool, a: int, b: int, minus: bool) -> str:
    """'What is three plus four?', for numbers up to WORD_MAX; answered in digits, whose sums it knows."""
    x, y = (number_word(n, lang) for n in (a, b))
    if lang == "zh":
        question = rng.choice(["{}等于几？", "{}等于几？", "{}", "{}得多少？", "{}是多少？"])
        question = question.format(f"{x}{'减' if minus else '加'}{y}")
    else:
        question = rng.choice(["What is {}?", "What is {}?", "{}", "How much is {}?"])
        question = question.format(f"{x} {'minus' if minus else 'plus'} {y}")
    return in_other_words(rng, held, lang, question, "minus_words" if minus else "plus_words", a=x, b=y)


def arithmetic(rng: random.Random, lang: str, held: bool) -> Item:
    """Sums and differences in digits, in words and as one-step stories; the answer shows the steps."""
    most = ADD_MAX if held or rng.random() > SMALL_SHARE else 10
    a, b = rng.randrange(most + 1), rng.randrange(most + 1)
    minus = rng.random() < 0.45
    if minus and a < b:
        a, b = b, a
    answer = (worked_difference if minus else worked_sum)(a, b)
    short = [f"{a} {'-' if minus else '+'} {b} = {a - b if minus else a + b}", str(a - b if minus else a + b)]
    kind = rng.random()
    if max(a, b) <= WORD_MAX and kind < 0.3:
        question = sum_in_words(rng, lang, held, a, b, minus)
    elif kind < 0.75 or a < 2 or b < 2:  # "1 apples" would be wrong
        question = rng.choice((MINUS if minus else PLUS)[lang]).format(a, b)
        question = in_other_words(rng, held, lang, question, "minus" if minus else "plus", a=a, b=b)
    else:
        thing, measure = countable(rng, lang)
        question = rng.choice((FEWER if minus else MORE)[lang])
        spell = not held and max(a, b) <= WORD_MAX
        x, y = (quantity_word(n, lang) if spell and rng.random() < 0.3 else n for n in (a, b))
        parts = dict(n=rng.choice(NAMES[lang]), a=x, b=y, t=thing, m=measure)
        question = in_other_words(rng, held, lang, question.format(**parts), "fewer" if minus else "more", **parts)
        question = re.sub(r" ?([一二两三四五六七八九十]) ?", r"\1", question)
    about = ("minus" if minus else "plus", both(lang, a, b))
    return Item(question, answer, pair_key(a, b), accepted=short, about=about)


def times_table(rng: random.Random, lang: str, held: bool) -> Item:
    """The multiplication table is learnt by heart, like a fact: unseen when held out is this wording of this pair."""
    a, b = rng.randint(1, TIMES_MAX), rng.randint(1, TIMES_MAX)
    question = rng.choice(TIMES[lang]).format(a, b)
    if not held and rng.random() < 0.2:
        question = rng.choice(TIMES_IN_WORDS[lang]).format(number_word(a, lang), number_word(b, lang))
    key = f"times|{question}"
    question = in_other_words(rng, held, lang, question, "times", a=a, b=b)
    return Item(question, f"{a} × {b} = {a * b}", key, about=("times", f"{a} × {b}"))


SIZES = ["ant", "mouse", "cat", "sheep", "horse", "elephant"]  # a strict order that nobody doubts
ZH = {row["id"]: row["zh"] for row in load_table("animals")}


def comparing_animals(rng: random.Random, lang: str, held: bool) -> Item:
    i, j = rng.sample(range(len(SIZES)), 2)
    bigger = rng.random() < 0.5
    first, second = SIZES[i], SIZES[j]
    winner, loser = (first, second) if (i > j) == bigger else (second, first)
    key = f"size|{lang}|{first}|{second}|{bigger}"
    if lang == "zh":
        word = "大" if bigger else "小"
        ways = [
            "{0}和{1}哪个更{2}？",
            "{0}{2}还是{1}{2}？",
            "{0}和{1}谁{2}？",
            "{0}比{1}{2}吗？",
            "{0}跟{1}比哪个{2}？",
        ]
        question = (ways[0] if held else rng.choice(ways)).format(ZH[first], ZH[second], word)
        return Item(question, f"{ZH[winner]}比{ZH[loser]}{word}。", key)
    word = "bigger" if bigger else "smaller"
    ways = [
        "Which is {2}, {0} or {1}?",
        "Is {0} or {1} {2}?",
        "Who is {2}: {0} or {1}?",
        "{0} vs {1}, which is {2}?",
    ]
    question = (ways[0] if held else rng.choice(ways)).format(an(first), an(second), word)
    return Item(question, cap(f"{an(winner)} is {word} than {an(loser)}."), key)


def to_compare(rng: random.Random) -> list[int]:
    """Two numbers, in no order."""
    while (a := rng.randint(1, rng.choice(COMPARE_MAX))) == (b := rng.randint(1, rng.choice(COMPARE_MAX))):
        pass
    return [a, b]


def in_order(a: int, b: int) -> str:
    """As they were asked: a decision of its own, before the one that the question wants."""
    return f"{a} {'<' if a < b else '>'} {b}"


def compared_number(lang: str, a: int, b: int, larger: bool) -> str:
    x = max(a, b) if larger else min(a, b)
    if lang == "zh":
        return f"{in_order(a, b)}，{x} 更{'大' if larger else '小'}。"
    return f"{in_order(a, b)}, so {x} is {'larger' if larger else 'smaller'}."


def comparing(rng: random.Random, lang: str, held: bool) -> Item:
    """Two numbers, two heights, two ages or two animals."""
    kind = rng.random()
    if kind < 0.1:
        return comparing_animals(rng, lang, held)
    a, b = to_compare(rng)
    key = f"compare|{min(a, b)}|{max(a, b)}"
    if kind < 0.7:
        larger = rng.random() < 0.5
        asked = "larger" if larger else "smaller"
        if lang == "zh":
            word = "大" if larger else "小"
            ways = [f"{a} 和 {b} 哪个更{word}？", f"{a} 和 {b}，哪个{word}？", f"哪个数更{word}，{a} 还是 {b}？"]
        else:
            ways = [
                f"Which is {asked}, {a} or {b}?",
                f"Which number is {asked}: {a} or {b}?",
                f"{a} or {b}, which is {asked}?",
            ]
        question = in_other_words(rng, held, lang, rng.choice(ways), asked, a=a, b=b)
        return Item(question, compared_number(lang, a, b, larger), key, about=(asked, both(lang, a, b)))
    older = rng.random() < 0.5
    n, m = rng.sample(NAMES[lang], 2)
    winner = n if a > b else m
    if lang == "zh":
        said = "{}今年 {} 岁" if older else "{}堆的积木有 {} 块"
        question = f"{said.format(n, a)}，{said.format(m, b)}。谁的{'年纪更大' if older else '积木更高'}？"
        answer = f"{in_order(a, b)}，{winner}的{'年纪更大' if older else '积木更高'}。"
    else:
        said = "{} is {} years old" if older else "{}'s tower has {} bricks"
        question = (
            f"{said.format(n, a)} and {said.format(m, b)}. Who {'is older' if older else 'has the taller tower'}?"
        )
        answer = f"{in_order(a, b)}, so {winner} {'is older' if older else 'has the taller tower'}."
    if older:
        question = in_other_words(rng, held, lang, question, "older", n=n, m=m, a=a, b=b)
    return Item(question, answer, key)
