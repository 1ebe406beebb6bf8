"""The starter corpus' running text: stories from a few plots, descriptions, worked examples, dialogues.

corpus.py calls text_document() for the pretraining file; the story skill calls requested_story().
"""

import random
import re

from dataset.starter.facts import RELATIONS, cap, load_json, load_table
from dataset.starter.skills import people

STORIES = load_json("stories")  # heroes, things, places, friends, plots; every plot opens with {hero} and {thing}


def requested_story(rng: random.Random, lang: str, hero: str, thing: str | list[str]) -> str:
    """Three or four short sentences about the hero and the thing (in Chinese: the thing and its measure word)."""
    words = {"hero": hero, "friend": rng.choice(STORIES["friends"][lang])}
    words["thing"], words["measure"] = thing if lang == "zh" else (thing, "")
    for name in ("weather", "place", "feeling"):
        words[name] = rng.choice(STORIES[{"place": "places", "feeling": "feelings"}.get(name, name)][lang])
    for name in ("hero", "friend"):  # English: 'a cat' at first, then 'the cat'
        words[f"the_{name}"] = re.sub("^an? ", "the ", words[name])
        words[f"The_{name}"] = cap(words[f"the_{name}"])
    sentences = [cap(sentence.format(**words)) for sentence in rng.choice(STORIES["plots"][lang])]
    return ("" if lang == "zh" else " ").join(sentences)


def story_text(rng: random.Random, lang: str) -> str:
    """A story for pretraining: one or two episodes and a moral."""
    hero, glue = rng.choice(STORIES["heroes"][lang]), "" if lang == "zh" else " "
    parts = [
        requested_story(rng, lang, hero, rng.choice(STORIES["things"][lang])) for _ in range(rng.choice([1, 1, 2]))
    ]
    if rng.random() < 0.3:
        parts.append(rng.choice(STORIES["morals"][lang]))
    return glue.join(parts)


TABLES = sorted({relation.table for relation in RELATIONS})


def description_text(rng: random.Random, lang: str) -> str:
    """What the tables say about one or two entities, in a random order and in changing words."""
    table = rng.choices(TABLES, [len(load_table(t)) for t in TABLES])[0]
    glue, parts = "" if lang == "zh" else " ", []
    for entity in rng.sample(load_table(table), rng.choice([1, 2])):
        known = []
        for relation in RELATIONS:
            if relation.table == table and lang in relation.rows:
                known += [
                    relation.tell(rng, lang, row) for row in relation.rows[lang] if entity[lang] in (row["k"], row["v"])
                ]
        rng.shuffle(known)
        parts += known[:6]
    return glue.join(dict.fromkeys(parts))


def facts_text(rng: random.Random, lang: str) -> str:
    """The same relation for several entities: 'The capital of France is Paris. The capital of Japan is Tokyo.'"""
    relations = [relation for relation in RELATIONS if lang in relation.rows]
    relation = rng.choices(relations, [len(relation.rows[lang]) for relation in relations])[0]
    rows = rng.sample(relation.rows[lang], min(len(relation.rows[lang]), rng.randint(3, 6)))
    return ("" if lang == "zh" else " ").join(relation.tell(rng, lang, row) for row in rows)


ASIDE = {  # sayings around a question and its answer in a plain-text dialogue
    "zh": [
        "{name}问：“{q}”老师说：“{a}”",
        "“{q}”{name}问。妈妈回答：“{a}”",
        "问：{q}\n答：{a}",
        "{name}：{q}\n老师：{a}",
    ],
    "en": [
        '{name} asked: "{q}" The teacher said: "{a}"',
        '"{q}" asked {name}. Mother said: "{a}"',
        "Question: {q}\nAnswer: {a}",
        "{name}: {q}\nTeacher: {a}",
    ],
}


def dialogue_text(rng: random.Random, lang: str, draw, name: str) -> str:
    """Two to four questions of somebody with answers; draw(rng, lang) gives an Item that may be trained on."""
    form = rng.choice(ASIDE[lang])
    lines = []
    for _ in range(rng.randint(2, 4)):
        item = draw(rng, lang)
        for question, answer in [*item.history, (item.question, item.answer)]:
            lines.append(form.format(name=name, q=question, a=answer))
    return "\n".join(lines)


def plain_text(rng: random.Random, lang: str, draw) -> str:
    """Answers alone, one after another: they are written to be true sentences by themselves."""
    return "\n".join(draw(rng, lang).answer for _ in range(rng.randint(4, 8)))


def repeated_text(rng: random.Random, lang: str) -> str:
    """Names in a row, two to four times over: what can only be foretold by looking up what came before."""
    names = people(rng, lang, 2, 8)
    row = rng.choice([", ", " ", "\n", " - "] if lang == "en" else ["、", "，", " ", "\n"]).join(names)
    return rng.choice(["\n", "\n\n", ". "] if lang == "en" else ["\n", "\n\n", "。"]).join([row] * rng.randint(2, 4))


def translation_text(rng: random.Random, pairs: list[tuple[str, str]], sentence) -> str:
    """Parallel words and sentences; sentence(rng) gives a (Chinese, English) pair that may be trained on."""
    lines = []
    for _ in range(rng.randint(3, 6)):
        zh, en = sentence(rng) if rng.random() < 0.55 else rng.choice(pairs)
        forms = ["{zh} = {en}", "{en} = {zh}", "中文：{zh}\n英语：{en}", "English: {en}\nChinese: {zh}"]
        if zh[-1] != "。":
            forms += [
                "“{zh}”的英文是{en}。",
                '"{en}" in Chinese is {zh}.',
                "{en}的中文是{zh}。",
                '"{zh}" means "{en}".',
            ]
        lines.append(rng.choice(forms).format(zh=zh, en=en))
    return "\n".join(lines)
