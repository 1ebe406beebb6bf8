"""The starter corpus' skills on lists: sorting, counting aloud, picking by category, rewriting.

Same contract as skills.py: one function a skill, (rng, lang, held) -> Item.
"""

import random

from dataset.starter.facts import an, load_table
from dataset.starter.skills import Item, in_other_words, people, person
from dataset.starter.words import WEEKDAYS

# Difficulty, as in skills.py.
SORT_MAX = (12, 20)  # numbers to sort: one of these is the largest there can be
SORT_LENGTHS = (3, 4)
WORDS_LENGTH = 3  # words to sort
REVERSE_LENGTH = 3
COUNT_LENGTHS = (3, 4)  # items in a list to be counted
ECHOED = 0.5  # share of the trained rewriting that is repeating names
PICK_LENGTH = 3  # items to pick a category from

LIST_WORDS = {
    "zh": list("猫狗鸟鱼牛羊花树山雨书茶球车"),
    "en": "cat dog bird fish tree sun moon book pen tea ball hat cup car".split(),
}
ALPHABET = "apple ball cat dog fish moon sun tree".split()
JOIN = {"zh": "、", "en": ", "}


def to_sort(rng: random.Random) -> list[int]:
    """Numbers, in no order."""
    return rng.sample(range(1, rng.choice(SORT_MAX) + 1), rng.choice(SORT_LENGTHS))


def sorting(rng: random.Random, lang: str, held: bool) -> Item:
    """Numbers up or down, words by the alphabet (English) or weekdays in order (Chinese)."""
    kind = rng.random()
    join = JOIN["en"]
    if kind < 0.75:
        items = to_sort(rng)
        down = kind < 0.25
        answer = join.join(str(n) for n in sorted(items, reverse=down))
        listed = join.join(str(n) for n in items)
        if lang == "zh":
            question = rng.choice(
                ["把这些数从大到小排列：{}", "从大到小排序：{}"]
                if down
                else ["把这些数从小到大排列：{}", "从小到大排序：{}"]
            )
        else:
            question = rng.choice(
                ["Sort from large to small: {}", "Sort these numbers from high to low: {}"]
                if down
                else ["Sort from small to large: {}", "Sort these numbers: {}", "Put in order: {}"]
            )
        question = in_other_words(
            rng, held, lang, question.format(listed), "sort_down" if down else "sort_up", list=listed
        )
        return Item(question, answer, f"sort|{down}|{listed}", about=("sort_down" if down else "sort_up", listed))
    order = WEEKDAYS["zh"] if lang == "zh" else ALPHABET
    items = rng.sample(order, WORDS_LENGTH)
    listed, answer = (JOIN[lang].join(words) for words in (items, sorted(items, key=order.index)))
    if lang == "zh":
        question = rng.choice(["把这几天按先后排好：{}", "按星期的顺序排列：{}"])
    else:
        question = rng.choice(["Sort by the alphabet: {}", "Put these words in alphabetical order: {}"])
    kind = "sort_days" if lang == "zh" else "sort_alphabet"
    question = in_other_words(rng, held, lang, question.format(listed), kind, list=listed)
    return Item(question, answer, f"sort|{listed}", about=(kind, listed))


def counting(rng: random.Random, lang: str, held: bool) -> Item:
    """Counts aloud: the words of a list, or letters."""
    size, kind = rng.randint(*COUNT_LENGTHS), rng.random()
    words, join = LIST_WORDS[lang], JOIN[lang]
    if kind < 0.6:
        items = [rng.choice(words) for _ in range(size)]
        aloud = join.join(f"{i} {word}" for i, word in enumerate(items, 1))
        listed = join.join(items)
        if lang == "zh":
            question = rng.choice(["数一数有几个词：{}", "这里有几个词：{}"])
        else:
            question = rng.choice(["How many words are here: {}", "Count the words: {}"])
        question = in_other_words(rng, held, lang, question.format(listed), "count_words", list=listed)
        return Item(question, counted(aloud, size, lang), f"count|{listed}", about=("count", listed))
    letters = [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(size)]
    listed, aloud = " ".join(letters), ", ".join(f"{i} {letter}" for i, letter in enumerate(letters, 1))
    if lang == "zh":
        question = rng.choice(["这里有几个字母：{}", "数一数字母：{}"])
    else:
        question = rng.choice(["How many letters are here: {}", "Count the letters: {}"])
    question = in_other_words(rng, held, lang, question.format(listed), "count_letters", list=listed)
    return Item(question, counted(aloud, size, lang), f"count|{listed}", about=("count", listed))


def counted(aloud: str, size: int, lang: str) -> str:
    return f"{aloud}。一共 {size} 个。" if lang == "zh" else f"{aloud}. That makes {size}."


def members(category: str, lang: str) -> list[str]:
    """The words of a category; animals come from their own table."""
    if category == "animal":
        return [row[lang] for row in load_table("animals")]
    return [row[lang] for row in load_table("things") if row["category_en"] == category]


def category(rng: random.Random, lang: str, held: bool) -> Item:
    """Pick the fruit of a list."""
    chosen = rng.sample(load_table("categories"), PICK_LENGTH)
    items = [rng.choice(members(row["id"], lang)) for row in chosen]
    target, answer = chosen[0], items[0]
    rng.shuffle(items)
    listed = JOIN[lang].join(items)
    if lang == "zh":
        question = rng.choice(["哪个是{1}：{0}？", "下面哪个是{1}：{0}", "从里面选出{1}：{0}", "{0}，哪个是{1}？"])
    else:
        question = rng.choice(
            ["Which one is {1}: {0}?", "Pick the {2}: {0}", "Find the {2}: {0}", "{0}: which one is {1}?"]
        )
    noun = target["zh"] if lang == "zh" else an(target["en"])
    key = f"pick|{target['id']}|{listed}"
    question = question.format(listed, noun, target["en"])
    return Item(in_other_words(rng, held, lang, question, "category", list=listed, noun=noun), answer, key)


UPPER_WORDS = "cat dog sun moon tea hat cup car red big yes no".split()


ECHO = {
    "zh": ["跟我读：{}", "照着说一遍：{}", "重复一遍：{}", "原样写出来：{}", "跟着念：{}", "复读：{}"],
    "en": ["Repeat after me: {}", "Say exactly this: {}", "Write this again: {}", "echo: {}", "Copy: {}", "say: {}"],
}


def echoed(rng: random.Random, lang: str) -> Item:
    """Names in a row, given back as they are. Only trained on: to copy what it has not seen is what a model needs that
    calls people by their names."""
    names = people(rng, lang, 1, 6)
    row = rng.choice([JOIN[lang], " "]).join(names)
    return Item(rng.choice(ECHO[lang]).format(row), row)


def rewriting(rng: random.Random, lang: str, held: bool) -> Item:
    """Reverse, repeat, first and last of a list, upper case; names as they are."""
    if not held and rng.random() < ECHOED:
        return echoed(rng, lang)
    kind, words, join = rng.random(), LIST_WORDS[lang], JOIN[lang]
    if kind < 0.45:
        letters = rng.random() < 0.35
        pool = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ" if rng.random() < 0.5 else "123456789") if letters else words
        items = rng.sample(pool, REVERSE_LENGTH)
        glue = " " if letters else join
        listed = glue.join(items)
        question = rng.choice(
            {
                "zh": ["把它倒过来：{}", "倒着说：{}", "反过来写：{}"],
                "en": ["Reverse: {}", "Reverse the order: {}", "Say it backwards: {}"],
            }[lang]
        )
        question = in_other_words(rng, held, lang, question.format(listed), "reverse", list=listed)
        return Item(question, glue.join(items[::-1]), f"reverse|{listed}", about=("reverse", listed))
    if kind < 0.6:
        word = rng.choice(words + members("fruit", lang))
        if not held and rng.random() < 0.5:
            word = person(rng, lang)
        index = rng.randrange(4)
        question = {
            "zh": ["把“{}”说三遍。", "“{}”重复三次。", "请说三次“{}”。", "说三遍：{}"],
            "en": [
                'Say "{}" three times.',
                'Repeat "{}" three times.',
                "Say {} three times.",
                "Repeat three times: {}",
            ],
        }[lang][index]
        question = in_other_words(rng, held, lang, question.format(word), "repeat", word=word)
        return Item(question, join.join([word] * 3), f"repeat|{index}|{word}", about=("repeat", word))
    if kind < 0.8 or lang == "zh":
        items = rng.sample(words, rng.randint(3, 4))
        listed, first = join.join(items), rng.random() < 0.5
        if lang == "zh":
            question = rng.choice(["{1}的{0}一个词是什么？", "{0}一个词是哪个：{1}"]).format(
                "第" if first else "最后", listed
            )
        else:
            question = rng.choice(["What is the {} word of: {}?", "Give me the {} word: {}"])
            question = question.format("first" if first else "last", listed)
        kind = "first" if first else "last"
        question = in_other_words(rng, held, lang, question, kind, list=listed)
        return Item(question, items[0] if first else items[-1], f"ends|{first}|{listed}", about=(kind, listed))
    text = " ".join(rng.sample(UPPER_WORDS, rng.randint(2, 3)))
    question = rng.choice(["Write in upper case: {}", "In capital letters: {}", "UPPER CASE please: {}"])
    question = in_other_words(rng, held, lang, question.format(text), "upper", text=text)
    return Item(question, text.upper(), f"upper|{text}")
