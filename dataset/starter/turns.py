"""The starter corpus' follow-ups: questions that can only be understood with what was said before.

Same contract as skills.py: one function a kind, (rng, lang, held) -> Item, whose `history` is what was said. The
wordings are in tables/turns.json; what is held out is asked in the first of them alone.
"""

import random
import re

from dataset.starter import chat, lists, words
from dataset.starter.facts import NEW_WORDINGS, RELATIONS, Relation, cap, load_json
from dataset.starter.registers import TYPED, typed
from dataset.starter.skills import (
    ADD_MAX,
    WORDINGS,
    Item,
    arithmetic,
    ask_fact,
    compared_number,
    comparing,
    fact_item,
    is_held_out,
    pair_key,
    person,
    times_table,
    to_compare,
    trainable,
    worked_difference,
    worked_sum,
)
from dataset.starter.stories import STORIES, requested_story

TURNS, TALK = load_json("turns"), load_json("talk")
ANOTHER, TOLD, AGAIN, NOT_KNOWN_OF = (TURNS[part] for part in ("another", "told", "again", "not_known_of"))
FOLLOW_UPS, SHORT_FORMS = TURNS["follow_ups"], TURNS["short_forms"]  # by a pronoun; around a relation in a word or two
GLUE = {"en": " ", "zh": ""}  # between sentences
HELD = {"facts": 80, "told": 20}  # of the held-out questions

# 'And what about {}?' needs a thing in the question, not a description of one
ABOUT_THINGS = [r for r in RELATIONS if r.name not in ("who_does", "feature", "feature_of", "made")]
# and 'it' a thing with several facts that are asked of it by its name.
OF_ONE_THING = [r for r in RELATIONS if r.key == "{lang}" and r.table != "people" and r.name != "young"]


def multi_turn(rng: random.Random, lang: str, held: bool) -> Item:
    """One of the kinds below."""
    shares = HELD if held else {kind: share for kind, (share, _) in KINDS.items()}
    (kind,) = rng.choices(list(shares), list(shares.values()))
    return KINDS[kind][1](rng, lang, held)


def said(rng: random.Random, lang: str, held: bool, question: str, answer: str) -> tuple[str, str]:
    """The exchange as it stands in a chat, its question as people type it."""
    return (question if held or rng.random() > TYPED else typed(rng, question, lang)), answer


def said_before(rng: random.Random, lang: str, held: bool, make, *args) -> tuple[str, str]:
    item = trainable(make, rng, lang, False, *args)
    return said(rng, lang, held, item.question, item.answer)


def facts(rng: random.Random, lang: str, held: bool) -> Item:
    """A fact, and then the same of another thing ('And Spain?') or another fact of the same thing ('And its
    capital?'), once or up to three times."""
    of_others = held and rng.random() < 0.56
    relations = [
        relation for relation in (ABOUT_THINGS if of_others or not held else OF_ONE_THING) if lang in relation.rows
    ]
    if (held and not of_others) or rng.random() < 0.4:
        relations = [relation for relation in relations if relation.name in FOLLOW_UPS[lang]]
    relation = rng.choice(relations)
    row = rng.choice(relation.rows[lang])
    history = [said_before(rng, lang, held, ask_fact, relation, row)]
    for _ in range(1 if held else rng.choice([1, 1, 1, 2, 3])):
        found = None
        while found is None or (not held and is_held_out(found[-1])):
            same_relation = of_others if held else rng.random() < 0.55
            found = (another if same_relation else other_relation)(rng, lang, held, relation, row)
        relation, row, question, key = found
        history.append(said(rng, lang, held, question, relation.fill(relation.answer[lang], row)))
    *history, (question, answer) = history
    return Item(question, answer, key, history=history)


Step = tuple[Relation, dict[str, str], str, str] | None  # what is asked next of which thing, the question, the key


def another(rng: random.Random, lang: str, held: bool, relation: Relation, row: dict[str, str]) -> Step:
    """The same of another thing: 'And Spain?'"""
    second = rng.choice([other for other in relation.rows[lang] if other is not row])
    article = lang == "en" and "{ak}" in relation.answer["en"] and (held or rng.random() < 0.7)
    shown = second["ak" if article else "k"]
    key = f"another|{lang}|{relation.name}|{row['k']}|{second['k']}"
    return relation, second, rng.choice(ANOTHER[lang][: 3 if held else None]).format(shown), key


def other_relation(rng: random.Random, lang: str, held: bool, relation: Relation, row: dict[str, str]) -> Step:
    """Another fact of the same thing: 'And its capital?'"""
    others = [r for r in OF_ONE_THING if r.table == relation.table and r is not relation and lang in r.rows]
    if held:
        others = [r for r in others if r.name in FOLLOW_UPS[lang]]
    if relation not in OF_ONE_THING or not others:
        return None
    other = rng.choice(others)
    found = [same for same in other.rows[lang] if same["id"] == row["id"]]
    if not found:
        return None
    if held or (other.name in FOLLOW_UPS[lang] and rng.random() < 0.4):
        question = rng.choice(FOLLOW_UPS[lang][other.name])
    elif rng.random() < 0.5:
        question = rng.choice(SHORT_FORMS[lang]).format(rng.choice(other.short[lang]))
    else:
        question = by_pronoun(rng.choice(other.questions[lang][:-NEW_WORDINGS]), lang, other.table)
    return other, found[0], question, f"follow|{lang}|{relation.name}|{other.name}|{row['k']}"


def same_skill(rng: random.Random, lang: str, held: bool) -> Item:
    """The same task with other words or numbers: 'And of big?', 'Now with 8 and 9'."""
    make = rng.choice(SAME_SKILLS)
    first = second = trainable(make, rng, lang, False)
    while second.about[:1] != first.about[:1] or second.about == first.about or not second.about:
        first, second = (trainable(make, rng, lang, False) for _ in range(2))
    question = rng.choice(ANOTHER[lang] + AGAIN[lang]["with"]).format(second.about[1])
    return Item(question, second.answer, history=[said(rng, lang, held, first.question, first.answer)])


def by_pronoun(question: str, lang: str, table: str) -> str:
    """'What does {ak} eat?' as 'What does it eat?', 'How many people live in {k}?' as 'How many people live there?'"""
    if lang == "zh":
        return question.replace("{k}", {"countries": "那里", "festivals": "那天", "jobs": "他"}.get(table, "它"))
    there = {"festivals": "on that day"}.get(table, "there")
    question = re.sub(r"\b(in|on|On|In) \{k\}", lambda match: cap(there) if match[1].istitle() else there, question)
    question = re.sub(r"\{a?k\}'s", "its", question)
    pronoun = "he" if table == "jobs" else "it"
    return cap(re.sub(r"(ripe |baby |young )?\{a?k\}", pronoun, question))


class User:
    """Somebody who tells something about themselves, or several things, and asks for one of them later."""

    def __init__(self, rng: random.Random, lang: str, held: bool = False):
        self.rng, self.lang, self.held = rng, lang, held
        self.known: list[tuple[dict, str]] = []  # what was told: its kind, the thing

    def tell(self) -> tuple[str, str]:
        """Up to three things in one message, none of a kind that was told before, and the reply to each."""
        rng, parts, replies = self.rng, [], []
        for _ in range(1 if self.held else rng.choice([1, 1, 1, 2, 2, 3])):
            kinds = [kind for kind in TOLD[self.lang] if all(kind is not known for known, _ in self.known)]
            kind = rng.choices(kinds, [4 if kind is TOLD[self.lang][0] else 1 for kind in kinds])[0]  # names first
            thing = told_thing(rng, self.lang, kind["things"])
            if not self.held and rng.random() < 0.4:
                thing = thing.lower()  # and is called as they write it
            self.known.append((kind, thing))
            parts.append(rng.choice(kind["said"][: 1 if self.held else None]).format(thing))
            replies.append(cap(kind["reply"].format(thing)))
        glue = rng.choice({"en": [", ", " and ", ". ", " "], "zh": ["，", "。", " "]}[self.lang])
        return glue.join([*(part.rstrip(".。") for part in parts[:-1]), parts[-1]]), GLUE[self.lang].join(replies)

    def ask(self) -> tuple[str, str]:
        kind, thing = self.rng.choice(self.known)
        return self.rng.choice(kind["asked"][: 2 if self.held else None]), kind["answer"].format(thing)


def told_thing(rng: random.Random, lang: str, things: str | list[str]) -> str:
    """One of the list, a name, or an age."""
    if things == "names":
        return person(rng, lang)
    return str(rng.randint(3, 99)) if things == "ages" else rng.choice(things)


def told(rng: random.Random, lang: str, held: bool) -> Item:
    """What the user said about themselves, asked for later."""
    user = User(rng, lang, held)
    opening, reply = user.tell()
    between = [said_before(rng, lang, held, small_exchange) for _ in range(rng.randint(0, 2))]
    if not held and between and rng.random() < 0.3:  # said on the way to a question
        question, answer = between.pop(0)
        opening = f"{opening.rstrip('.。')}{'，' if lang == 'zh' else ', '}{question}"
        reply = answer if rng.random() < 0.5 else reply + GLUE[lang] + answer
    if not held and len(between) < 2 and rng.random() < 0.4:
        between.insert(rng.randint(0, len(between)), user.tell())
    history, (question, answer) = [(opening, reply), *between], user.ask()
    return Item(question, answer, f"told|{history}|{question}", history=history)


def small_exchange(rng: random.Random, lang: str, held: bool) -> Item:
    """Something else, between what was told and what is asked."""
    if rng.random() < 0.4:
        return fact_item(rng, lang, held, RELATIONS)
    return rng.choice([words.opposites, arithmetic])(rng, lang, held)


def again(rng: random.Random, lang: str, held: bool) -> Item:
    """On from an answer: another sum, the list turned round, the next day, one more joke or story."""
    kind = rng.choice([summed_on, turned, compared, onwards, one_more])
    return kind(rng, lang)


def summed_on(rng: random.Random, lang: str) -> Item:
    """A sum, and then something more or less, or another sum."""
    while True:
        a, b, c, d = (rng.randint(2, 25) for _ in range(4))
        kind = rng.choice(["plus", "minus", "sum"])
        x, y = (c, d) if kind == "sum" else (a + b, c)
        if (
            x + y <= ADD_MAX
            and (kind != "minus" or x >= y)
            and not any(map(is_held_out, (pair_key(a, b), pair_key(x, y))))
        ):
            break
    opening = rng.choice(WORDINGS["plus"][lang]).format(a=a, b=b), worked_sum(a, b)
    question = rng.choice(AGAIN[lang][kind]).format(*((c, d) if kind == "sum" else (c,)))
    answer = (worked_difference if kind == "minus" else worked_sum)(x, y)
    return Item(question, answer, history=[said(rng, lang, False, *opening)])


def turned(rng: random.Random, lang: str) -> Item:
    """A list in order, and then in the opposite one."""
    items = [str(n) for n in sorted(lists.to_sort(rng))]
    up = rng.random() < 0.5
    asked = rng.choice(WORDINGS["sort_up" if up else "sort_down"][lang])
    asked = asked.format(list=", ".join(rng.sample(items, len(items))))
    answers = [", ".join(items), ", ".join(items[::-1])][:: 1 if up else -1]
    return Item(rng.choice(AGAIN[lang]["turned"]), answers[1], history=[(asked, answers[0])])


def compared(rng: random.Random, lang: str) -> Item:
    """The larger of two numbers, and then the smaller, or the other way round."""
    while is_held_out(f"compare|{(pair := sorted(to_compare(rng)))[0]}|{pair[1]}"):
        pass
    larger = rng.random() < 0.5
    a, b = rng.sample(pair, 2)
    opening = rng.choice(WORDINGS["larger" if larger else "smaller"][lang]).format(a=a, b=b)
    asked = rng.choice(AGAIN[lang]["smaller" if larger else "larger"])
    history = [said(rng, lang, False, opening, compared_number(lang, a, b, larger))]
    return Item(asked, compared_number(lang, a, b, not larger), history=history)


RINGS = [("day", words.WEEKDAYS), ("month", words.MONTHS)]


def onwards(rng: random.Random, lang: str) -> Item:
    """The next day or month, or the one before, and the next again."""
    (kind, rings), step, i = rng.choice(RINGS), rng.choice([1, -1]), rng.randrange(12)
    ring = rings[lang]
    which = "next" if step > 0 else "previous"
    three = [ring[(i + n * step) % len(ring)] for n in range(3)]
    said_as = AGAIN[lang]["steps"][f"{which}_{kind}"]
    opening = rng.choice(WORDINGS[f"{which}_{kind}"][lang]).format(x=three[0])
    history = [said(rng, lang, False, opening, said_as.format(*three[:2]))]
    return Item(rng.choice(AGAIN[lang][which]), said_as.format(*three[1:]), history=history)


def one_more(rng: random.Random, lang: str) -> Item:
    """A joke, or a story of somebody else."""
    if rng.random() < 0.5:
        asked, (first, second) = rng.choice(WORDINGS["joke"][lang]), rng.sample(TALK["jokes"][lang], 2)
    else:
        (hero, thing), others = ((rng.choice(STORIES[part][lang]) for part in ("heroes", "things")) for _ in range(2))
        asked = rng.choice(WORDINGS["story"][lang]).format(a=hero, b=thing[0] if lang == "zh" else "a " + thing)
        first, second = requested_story(rng, lang, hero, thing), requested_story(rng, lang, *others)
    return Item(rng.choice(AGAIN[lang]["one_more"]), second, history=[(asked, first)])


def beyond(rng: random.Random, lang: str, held: bool) -> Item:
    """Something of a known thing that no table has, or something that the user never told."""
    questions = NOT_KNOWN_OF[lang]
    if rng.random() < 0.3:
        questions = rng.choice(TOLD[lang])["asked"]
    opening = said_before(rng, lang, held, fact_item, RELATIONS)
    declines = load_json("outside")[lang]["declines"]
    return Item(rng.choice(questions), rng.choice(declines), history=[opening], declines=True)


def aside(rng: random.Random, lang: str, held: bool) -> Item:
    """Small talk, or who it is, after other things."""
    talk = trainable(rng.choice([chat.greeting, chat.greeting, chat.who_it_is]), rng, lang, False)
    before = [said_before(rng, lang, held, small_exchange) for _ in range(rng.randint(1, 2))]
    return Item(talk.question, talk.answer, history=before)


SAME_SKILLS = [
    words.opposites, words.word_to_other, words.units_dates, arithmetic, times_table, comparing, lists.sorting,
    lists.counting, lists.rewriting,
]  # fmt: skip
KINDS = {  # share of the trained follow-ups, and the function that makes one
    "facts": (44, facts),
    "same_skill": (14, same_skill),
    "told": (18, told),
    "again": (14, again),
    "beyond": (9, beyond),
    "aside": (14, aside),
}
