"""The starter corpus' talk: who it is, greetings, "I don't know", system prompts, stories on request.

Same contract as skills.py: one function a skill, (rng, lang, held) -> Item.
"""

import random

from dataset.starter.facts import NEW_WORDINGS, RELATIONS, an, load_json, load_table
from dataset.starter.lists import UPPER_WORDS
from dataset.starter.skills import (
    ADD_MAX,
    IN_SHORT,
    OTHERWISE,
    TIMES_MAX,
    Item,
    fact_item,
    in_other_words,
    person,
    pick_wording,
    trainable,
)
from dataset.starter.stories import STORIES, requested_story

TALK = load_json("talk")  # intents with their wordings (the last two are never trained on), jokes, system messages
IDENTITY, GREETINGS, SYSTEMS = TALK["identity"], TALK["small_talk"], TALK["systems"]


def who_it_is(rng: random.Random, lang: str, held: bool) -> Item:
    """Who it is, who made it, what it can do."""
    intent = rng.choices(IDENTITY[lang], [4, 2, 1, 1, 1, 1, 1, 1])[0]
    wording, key = pick_wording(rng, intent["otherwise"] + intent["questions"], held)
    return Item(wording, intent["answers"][0], f"{key}|identity|{wording}" if key.startswith("new") else "")


def greeting(rng: random.Random, lang: str, held: bool) -> Item:
    """Small talk; jokes are only trained on. An intent with a `share` comes that many times as often as one without."""
    if not held and rng.random() < 0.2:
        question = in_other_words(rng, held, lang, rng.choice(TALK["joke_requests"][lang]), "joke")
        return Item(question, rng.choice(TALK["jokes"][lang]))
    (intent,) = rng.choices(GREETINGS[lang], [intent.get("share", 1) for intent in GREETINGS[lang]])
    wording, key = pick_wording(rng, intent["otherwise"] + intent["questions"], held)
    return Item(
        wording,
        rng.choice(intent["answers"]),
        f"{key}|greeting|{wording}" if key.startswith("new") else "",
        accepted=intent["answers"],
    )


# --- I don't know ----------------------------------------------------------------------------------------------------

FACES = list("😀😂😍😭😡🐶🐱🎉🚀🔥👍❤")
OUTSIDE = load_json("outside")  # topics with forms of questions and things to put into them; requests; ways to decline
SYLLABLES = {
    "zh": (
        ["布", "多", "卡", "米", "索", "塔", "维", "佐", "拉", "古"],
        ["鲁", "贝", "兰", "多", "比", "加", "洛", "姆"],
        ["国", "亚", "尼亚", "斯坦"],
    ),
    "en": (
        ["Zor", "Blen", "Krol", "Vam", "Dri", "Quan", "Mip", "Fro", "Tul", "Gor"],
        ["ba", "do", "li", "mu", "ze", "vo"],
        ["nia", "land", "stan", "ria"],
    ),
}
# Topics of OUTSIDE whose things are of the kind of a table's, and are not in it.
STRANGERS = {
    "countries": {"zh": "不认识的国家", "en": "countries not known"},
    "animals": {"zh": "不认识的动物", "en": "animals not known"},
    "elements": {"zh": "不认识的元素", "en": "elements not known"},
    "jobs": {"zh": "不认识的职业", "en": "jobs not known"},
    "people": {"zh": "不认识的发明", "en": "inventions not known"},
    "festivals": {"zh": "不认识的节日节气", "en": "holidays not known"},
}
MADE_UP = {  # how a made-up name ends; a country's with a syllable
    "zh": {"countries": "", "animals": "兽", "elements": "素"},
    "en": {"countries": "", "animals": "k", "elements": "xium"},
}
ABOUT_STRANGERS = [r for r in RELATIONS if r.table in STRANGERS and r.name not in ("capital_of", "who_does")]
# What is asked from outside of the world, and how often.
UNKNOWN = {"requests": 40, "topics": 24, "strangers": 20, "sums": 8, "private": 5, "noise": 3}


def unknown(rng: random.Random, lang: str, held: bool) -> Item:
    """What lies outside of the world: topics of all kinds, requests, private matters that nobody told the model, and
    things that it could know by their kind but does not. Unseen when held out: the topic, the request, the thing."""
    outside, private = OUTSIDE[lang], TALK["private"][lang]
    (kind,) = rng.choices(list(UNKNOWN), list(UNKNOWN.values()))
    key = ""
    if kind == "topics":
        topic = rng.choice(outside["topics"])
        question = rng.choice(topic["forms"]).format(rng.choice(topic["things"]))
        key = topic["name"]
    elif kind == "requests":
        question = rng.choice(outside["requests"])
    elif kind == "sums":
        question = rng.choice(outside["sums"]).format(**too_large(rng))
    elif kind == "noise":
        question = noise(rng, lang)
    elif kind == "private":
        question = rng.choice(private["questions"]).format(rng.choice(private["people"]))
    else:
        question, key = about_a_stranger(rng, lang)
    return Item(question, rng.choice(outside["declines"]), f"{kind}|{key or question}", declines=True)


def too_large(rng: random.Random) -> dict[str, int]:
    """Numbers for sums that are not learnt: a and b are too large to add, e is to multiply."""
    a, b = (rng.randint(ADD_MAX + 1, rng.choice([99, 999, 9999])) for _ in range(2))
    return dict(a=max(a, b), b=min(a, b), c=rng.randint(3, 99), d=rng.randint(2, 30), e=rng.randint(TIMES_MAX + 2, 50))


def noise(rng: random.Random, lang: str) -> str:
    """Keys hit at random, faces, signs."""
    if rng.random() < 0.3:
        some = rng.choice([FACES, [".", "?", "!", "…", "~", "<|", "|>", "</", ">", "[end]"]])
        return rng.choice(["", " "]).join(rng.choices(some, k=rng.randint(1, 4)))
    if lang == "zh" and rng.random() < 0.5:
        said = "".join(rng.sample("啊哦嗯哈呃的了吗呢吧嘛不一是这那去有", rng.randint(1, 4)))
        return said * rng.randint(1, 3)
    letters = rng.choice(["asdfghjkl", "qwertyuiop", "zxcvbnm", "abcdefghijklmnopqrstuvwxyz", "0123456789", "?!.,;#"])
    return " ".join("".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(rng.choice([1, 1, 2])))


def about_a_stranger(rng: random.Random, lang: str) -> tuple[str, str]:
    """A question in the words of a fact, and the thing it asks about, which is in no table: a real one or a made-up
    name. So it is the thing that tells whether the answer is known, not the words around it."""
    relation = rng.choice([relation for relation in ABOUT_STRANGERS if lang in relation.questions])
    table, (first, middle, last) = relation.table, (rng.choice(part) for part in SYLLABLES[lang])
    if table in MADE_UP[lang] and rng.random() < 0.4:
        name = first + middle + MADE_UP[lang][table]
        thing = name + last if table == "countries" else name.lower()
    else:
        (topic,) = (topic for topic in OUTSIDE[lang]["topics"] if topic["name"] == STRANGERS[table][lang])
        thing = rng.choice(topic["things"])
    verb = {"zh": "发明", "en": "invented"}[lang]
    row = {"id": "", "k": thing, "ak": an(thing), "v": "", "av": "", "verb": verb}
    if rng.random() < IN_SHORT:
        return relation.ask_in_short(rng, lang, row), thing
    if rng.random() < OTHERWISE:
        return relation.ask_otherwise(rng, lang, row), thing
    return relation.fill(rng.choice(relation.questions[lang][:-NEW_WORDINGS]), row), thing


# --- system prompts --------------------------------------------------------------------------------------------------

ASSISTANT_NAMES = {
    "zh": ["阿福", "小星", "豆包子", "小云", "团团", "小鱼", "米米", "小风"],
    "en": ["Robo", "Luna", "Max", "Nova", "Pixel", "Sunny", "Coco", "Bobo"],
}
EASY_FACTS = [
    relation for relation in RELATIONS if relation.name in ("capital", "language", "class", "legs", "food", "date")
]


def other_language(rng: random.Random, lang: str) -> tuple[str, str, str]:
    """A fact asked in `lang` and answered in the other language: (question, answer, key)."""
    relation = rng.choice([r for r in EASY_FACTS if r.name in ("capital", "class")])
    i = rng.randrange(min(len(rows) for rows in relation.rows.values()))
    other = "en" if lang == "zh" else "zh"
    question = relation.fill(relation.questions[lang][0], relation.rows[lang][i])
    return question, relation.fill(relation.answer[other], relation.rows[other][i]), f"{relation.name}|{lang}|{i}"


def system_prompt(rng: random.Random, lang: str, held: bool) -> Item:
    """A system message that changes the answer; unseen when held out: this system message with this question."""
    kinds = (
        ["meow_zh", "boss_zh", "english", "name_zh"]
        if lang == "zh"
        else ["meow_en", "captain", "chinese", "name_en", "upper"]
    )
    kind = rng.choice(kinds)
    index = rng.randrange(len(SYSTEMS[kind]))
    system = SYSTEMS[kind][index]
    if kind in ("english", "chinese"):
        question, answer, key = other_language(rng, lang)
    elif kind in ("name_zh", "name_en"):
        name = rng.choice(ASSISTANT_NAMES[lang]) if held or rng.random() < 0.5 else person(rng, lang)
        system = system.format(name)
        question = rng.choice(IDENTITY[lang][0]["questions"][: 4 if lang == "zh" else 3])
        answer, key = (f"我叫{name}。" if lang == "zh" else f"My name is {name}."), f"{name}|{question}"
    elif kind == "upper":
        text = " ".join(rng.sample(UPPER_WORDS, rng.randint(2, 3)))
        question, answer, key = f"Say: {text}", text.upper(), text
    else:
        item = trainable(fact_item, rng, lang, False, EASY_FACTS)
        question, answer = item.question, item.answer
        key = item.key
        if kind.startswith("meow"):
            answer += "喵" if lang == "zh" else " Meow."
        else:
            first, rest = answer.split(" ", 1) if lang == "en" else ("", answer)
            first = first.lower() + " " if first in ("A", "An", "The", "People") else first + " " * bool(first)
            answer = f"Captain, {first}{rest}" if lang == "en" else f"队长，{answer}"
    return Item(question, answer, f"system|{kind}{index}|{key}", system=system)


# --- stories ---------------------------------------------------------------------------------------------------------

STORY_REQUESTS = {
    "zh": [
        "讲一个{}和{}的故事。",
        "给我讲个关于{}和{}的小故事。",
        "写一个短故事，里面有{}和{}。",
        "我想听{}和{}的故事。",
        "编一个{}和{}的小故事吧。",
        "来个故事，要有{}和{}。",
    ],
    "en": [
        "Tell me a story about {} and {}.",
        "Write a short story about {} and {}.",
        "A short story with {} and {}, please.",
        "I want a story about {} and {}.",
        "Make up a bedtime story about {} and {}.",
        "A story please, {} and {}.",
    ],
}


ABOUT_ONE = {  # of the hero alone, or of nobody: the plot finds the thing
    "zh": ["讲一个{}的故事。", "给我讲个关于{}的短故事。", "说个{}的故事吧", "写个{}的小故事", "我想听{}的故事"],
    "en": [
        "Tell me a short story about {}.",
        "Tell me a story about {}",
        "a story about {} please",
        "Write a little story about {}.",
        "i want to hear a story about {}",
    ],
}
ABOUT_NOBODY = {
    "zh": ["讲个故事。", "给我讲一个小故事吧", "来个故事", "我想听故事", "睡前故事", "说个短故事听听"],
    "en": ["Tell me a story.", "tell me a short story", "a story please", "bedtime story!", "Can you tell a story?"],
}


def any_hero(rng: random.Random, lang: str) -> str:
    """Somebody of any name, or an animal of the tables."""
    animal = rng.choice(load_table("animals"))[lang]
    return rng.choice([person(rng, lang), an(animal) if lang == "en" else rng.choice(["小", ""]) + animal])


def any_thing(rng: random.Random, lang: str) -> str | list[str]:
    """Something of the tables that can be lost, given and found; in English one that takes 'a', as in the plots, in
    Chinese with its measure word."""
    kept = ("fruit", "vegetable", "tool", "clothing", "instrument", "furniture")
    rows = [row for row in load_table("things") if row["category_en"] in kept and an(row["en"]).startswith("a ")]
    row = rng.choice(rows)
    return [row["zh"], row["measure"]] if lang == "zh" else row["en"]


def story(rng: random.Random, lang: str, held: bool) -> Item:
    """A story about a hero and a thing, or, to train on, about the hero alone or nobody by name; unseen when held out:
    this hero with this thing."""
    hero, thing = rng.choice(STORIES["heroes"][lang]), rng.choice(STORIES["things"][lang])
    if not held and rng.random() < 0.5:
        hero, thing = any_hero(rng, lang), any_thing(rng, lang)
    text = requested_story(rng, lang, hero, thing)
    if not held and rng.random() < 0.3:
        return Item(rng.choice(ABOUT_ONE[lang] * 2 + ABOUT_NOBODY[lang]).format(hero), text)
    thing, shown = (thing[0], thing[0]) if lang == "zh" else (thing, "a " + thing)
    question = in_other_words(
        rng, held, lang, rng.choice(STORY_REQUESTS[lang]).format(hero, shown), "story", a=hero, b=shown
    )
    return Item(
        question,
        text,
        f"story|{hero}|{thing}",
        must_contain=[hero.removeprefix("a "), thing],
    )
