"""The starter corpus' skills on words: opposites, translation, units of measure, days, months and seasons.

Same contract as skills.py: one function a skill, (rng, lang, held) -> Item.
"""

import random

from dataset.starter.facts import cap, load_json, load_table
from dataset.starter.skills import Item, in_other_words, pick_wording


def opposites(rng: random.Random, lang: str, held: bool) -> Item:
    row = rng.choice(load_table(f"opposites_{lang}"))
    word, other = (row["a"], row["b"]) if rng.random() < 0.5 else (row["b"], row["a"])
    wording, key = pick_wording(rng, load_json("talk")["opposite_questions"][lang], held)
    answer = f"{word}的反义词是{other}。" if lang == "zh" else f"The opposite of {word} is {other}."
    question = in_other_words(rng, held, lang, cap(wording.format(word)), "opposite", x=word)
    return Item(question, answer, f"{key}|opposite|{lang}|{word}", about=("opposite", word))


UNITS = [  # (how many, small unit zh/en, of one big unit zh/en)
    (60, "分钟", "minutes", "小时", "hour"),
    (60, "秒", "seconds", "分钟", "minute"),
    (24, "小时", "hours", "天", "day"),
    (7, "天", "days", "个星期", "week"),
    (12, "个月", "months", "年", "year"),
    (100, "厘米", "centimetres", "米", "metre"),
    (1000, "米", "metres", "公里", "kilometre"),
    (1000, "克", "grams", "公斤", "kilogram"),
    (10, "毫米", "millimetres", "厘米", "centimetre"),
]
UNIT_QUESTIONS = {
    "zh": ["{n} {b}是多少{s}？", "{n} {b}等于多少{s}？", "{n} {b}有多少{s}？", "{n} {b}有几{s}？"],
    "en": [
        "How many {s} are in {n} {b}?",
        "How many {s} are there in {n} {b}?",
        "{n} {b} is how many {s}?",
        "How many {s} make {n} {b}?",
    ],
}


def spelled(rng: random.Random, n: int, lang: str) -> str:
    """The number, or now and then its word: 'two', '两'; one is 'a' in half of these."""
    if rng.random() < 0.65:
        return str(n)
    words = (
        ["", "a" if rng.random() < 0.5 else "one", "two", "three", "four", "five"] if lang == "en" else " 一两三四五"
    )
    return words[n]


WEEKDAYS = {
    "zh": ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"],
    "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
}
MONTHS = {
    "zh": ["一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月", "十一月", "十二月"],
    "en": [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ],
}
SEASONS = {"zh": ["冬天", "春天", "夏天", "秋天"], "en": ["winter", "spring", "summer", "autumn"]}


def units_dates(rng: random.Random, lang: str, held: bool) -> Item:
    """Units of time, length and weight; days and months before and after; seasons of the northern year."""
    kind = rng.random()
    if kind < 0.4:
        size, small_zh, small_en, big_zh, big_en = rng.choice(UNITS)
        n, index = rng.randint(1, 5), rng.randrange(4)
        if lang == "zh":
            small, big, answer = small_zh, big_zh, f"{n} {big_zh}是 {n * size} {small_zh}。"
            small = small_zh.removeprefix("个") if index < 3 and small_zh != "个月" else small_zh
        else:
            small, big = small_en, big_en + ("s" if n > 1 else "")
            answer = f"{n} {big} {'are' if n > 1 else 'is'} {n * size} {small}."
        said = spelled(rng, n, lang) if not held else str(n)
        question = UNIT_QUESTIONS[lang][index].format(n=said, b=big, s=small)
        question = in_other_words(rng, held, lang, question, "unit", n=said, b=big, s=small)
        return Item(question, answer, f"unit|{lang}|{index}|{small_en}|{n}", about=(f"unit {small_en}", f"{n} {big}"))
    if kind < 0.9:
        days = kind < 0.7
        ring = (WEEKDAYS if days else MONTHS)[lang]
        step = rng.choice([1, -1])
        i, index = rng.randrange(len(ring)), rng.randrange(3)
        here, there = ring[i], ring[(i + step) % len(ring)]
        if lang == "zh":
            when = {1: "的后一天" if days else "的下一个月", -1: "的前一天" if days else "的上一个月"}[step]
            question = ["{0}{1}是{2}？", "{0}{1}是哪{3}？", "请问{0}{1}是什么？"][index]
            question = question.format(here, when, "星期几" if days else "几月", "天" if days else "个月")
            answer = f"{here}{when}是{there}。"
        else:
            unit = "day" if days else "month"
            when = f"the {unit} {'after' if step > 0 else 'before'}"
            question = [
                f"What is {when} {here}?",
                f"Which {unit} is {when} {here}?",
                f"Tell me {when} {here}.",
            ][index]
            answer = cap(f"{when} {here} is {there}.")
        kind = f"{'next' if step > 0 else 'previous'}_{'day' if days else 'month'}"
        question = in_other_words(rng, held, lang, question, kind, x=here)
        return Item(question, answer, f"ring|{lang}|{index}|{here}|{step}", about=(kind, here))
    i, index = rng.randrange(12), rng.randrange(3)
    month, season = MONTHS[lang][i], SEASONS[lang][(i + 1) % 12 // 3]
    if lang == "zh":
        question = [f"{month}是什么季节？", f"{month}在哪个季节？", f"在北京，{month}是什么季节？"][index]
        answer = f"在北方，{month}是{season}。"
    else:
        question = [f"What season is {month}?", f"In which season is {month}?", f"Which season is {month} in?"][index]
        answer = f"In the north {month} is in {season}."
    question = in_other_words(rng, held, lang, question, "season", x=month)
    return Item(question, answer, f"season|{lang}|{index}|{month}", about=("season", month))


SUBJECTS = [
    ("我", "I", ""),
    ("你", "You", ""),
    ("我们", "We", ""),
    ("他们", "They", ""),
    ("他", "He", "s"),
    ("她", "She", "s"),
    ("妈妈", "Mother", "s"),
    ("老师", "The teacher", "s"),
]
VERBS = [
    ("喜欢", "like"),
    ("看见", "see"),
    ("想要", "want"),
    ("需要", "need"),
    ("画", "draw"),
    ("买", "buy"),
    ("卖", "sell"),
]
ADJECTIVES = [("红色的", "red"), ("绿色的", "green"), ("大", "big"), ("小", "small"), ("新", "new"), ("旧", "old")]
OBJECTS = [
    ("苹果", "apples"),
    ("梨", "pears"),
    ("桃子", "peaches"),
    ("花", "flowers"),
    ("书", "books"),
    ("球", "balls"),
    ("帽子", "hats"),
    ("汽车", "cars"),
    ("杯子", "cups"),
    ("桌子", "tables"),
    ("风筝", "kites"),
    ("盒子", "boxes"),
]


def sentence_pair(rng: random.Random) -> tuple[str, str]:
    """(Chinese, English) of one sentence of a tiny grammar: subject, verb, perhaps an adjective, object."""
    (zh_s, en_s, s), (zh_v, en_v), (zh_o, en_o) = (rng.choice(t) for t in (SUBJECTS, VERBS, OBJECTS))
    zh_a, en_a = rng.choice(ADJECTIVES) if rng.random() < 0.4 else ("", "")
    return f"{zh_s}{zh_v}{zh_a}{zh_o}。", " ".join(w for w in (en_s, en_v + s, en_a, en_o) if w) + "."


SENTENCE_QUESTIONS = {
    "zh": [
        "翻译成英语：{}",
        "把这句话翻译成英语：{}",
        "用英语怎么说：{}",
        "{} 翻译成英语",
        "{} 这句英语怎么说？",
        "{} 英文",
    ],
    "en": [
        "Translate into Chinese: {}",
        "In Chinese, please: {}",
        "How do you say this in Chinese: {}",
        "{} in Chinese?",
        "{} What is that in Chinese?",
        "chinese for {}",
    ],
}


ACROSS = {  # of a word of the other language
    "zh": ["{}是什么意思？", "{}中文怎么说？", "{} 中文", "{} 用中文说是什么？", "单词 {} 是什么？", "{} 翻译"],
    "en": [
        "What does {} mean?",
        "{} in English?",
        "What is {} in English?",
        "meaning of {}",
        "translate {}",
        "{} means what?",
    ],
}


def word_pairs() -> list[tuple[str, str]]:
    """(Chinese, English): everyday words, and the names of all animals and things of the world."""
    return [(row["zh"], row["en"]) for table in ("words", "animals", "things") for row in load_table(table)]


def word_to_other(rng: random.Random, lang: str, held: bool) -> Item:
    """A word of the question's language into the other one."""
    zh, en = rng.choice(word_pairs())
    source, target = (zh, en) if lang == "zh" else (en, zh)
    wording, key = pick_wording(rng, load_json("talk")["word_questions"][lang], held)
    question = in_other_words(rng, held, lang, cap(wording.format(source)), "to_other", x=source)
    return Item(question, target, f"{key}|word|{lang}|{source}", about=("to_other", source))


def translation(rng: random.Random, lang: str, held: bool) -> Item:
    """Words by heart, sentences from the grammar; the question's language is the source language."""
    kind = rng.random()
    if kind < 0.16 and not held:  # asked in one language for the word of the other
        zh, en = rng.choice(word_pairs())
        source, target = (en, zh) if lang == "zh" else (zh, en)
        question = rng.choice(ACROSS[lang]).format(source)
        return Item(in_other_words(rng, held, lang, question, "from_other", x=source), target, f"across|{lang}|{zh}")
    if kind < 0.55:
        return word_to_other(rng, lang, held)
    zh, en = sentence_pair(rng)
    source, target = (zh, en) if lang == "zh" else (en, zh)
    question = rng.choice(SENTENCE_QUESTIONS[lang]).format(source)
    return Item(in_other_words(rng, held, lang, question, "sentence", x=source), target, f"sentence|{zh}")
