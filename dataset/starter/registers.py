"""How people type a question: in short, in lower case, with a filler, a typo, no question mark, other signs.

Rules, not lists of questions: each takes a question of any skill and says it in another register. What must not change
is kept: of a `literal` question, whose answer repeats a part of it, that is all that stands after its last colon.
"""

import random
import re
from collections.abc import Callable

from dataset.starter.facts import load_json

TYPED = 0.7  # share of the trained questions that are said in another register

WORDS = load_json("registers")
BEFORE, AFTER, ENDS = WORDS["before"], WORDS["after"], WORDS["ends"]
OTHERWISE = WORDS["otherwise"]  # [what is written, how it is said otherwise, ...]; English: whole words in any case
OPENERS = re.compile(
    r"^(what is|what's|what are|which is|who is|when is|where is|tell me|give me|name|do you know|can you say|say|"
    r"how is|please|i want|say|calculate|work out|in the)\b[:,]? ",
    re.IGNORECASE,
)
ZH_TAILS = re.compile(
    r"(是什么|是哪里|是多少|在哪里|在哪儿|叫什么|是几|怎么说|怎么讲|是谁|是哪个|等于多少|等于几)?[？。]$"
)
LEFT_OUT = {"en": r"\b(the|an?|do|does|is|are|of|there|have|has) ", "zh": r"的|是|请|有|一下"}
NEIGHBOURS = {a: b for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm") for a, b in zip(row, row[1:], strict=False)}
SOUNDS_ALIKE = dict(zip("的在首哪知道语币物色季味行星声做义", "得再手那只到雨比务涩记未型心生作意", strict=True))
WIDE = {ord(c): ord(c) + 0xFEE0 for c in "0123456789+-=?"}


def typed(rng: random.Random, question: str, lang: str, literal: bool = False) -> str:
    """The question in a register drawn at random; of some rules none, one or several apply. Those that know words know
    "zh" and "en"; for other languages the rules on letters, signs and case are left."""
    plain, kept = question, ""
    if literal:
        mark = max(question.rfind("："), question.rfind(": "))
        question, kept = question[: mark + 1], question[mark + 1 :]
    if question:
        question = calculation(rng, question, lang)
        for chance, rule in RULES:
            if rng.random() < chance:
                question = rule(rng, question, lang) or question
    if literal:
        question = without_colon(rng, question, kept) + listed(rng, kept)
    elif rng.random() < 0.5:
        question = question.rstrip("?？.。!！") + (rng.choice(ENDS) if rng.random() < 0.3 else "")
    if lang in BEFORE and rng.random() < 0.35:
        question = rng.choice(BEFORE[lang]) + question
    if lang in AFTER and rng.random() < 0.2 and not literal:
        question = question.rstrip("?？.。!！") + rng.choice(AFTER[lang])
    return question.strip() or plain


def without_colon(rng: random.Random, head: str, kept: str) -> str:
    """'Sort:' as 'Sort', now and then."""
    if head and rng.random() < 0.2:
        return head[:-1] + (" " if kept[:1] != " " else "")
    return head


def listed(rng: random.Random, things: str) -> str:
    """'cat, dog' as 'cat,dog', 'cat dog', 'cat，dog'."""
    joins = [join for join in (", ", "、") if join in things]
    if not joins or rng.random() < 0.6:
        return things
    return things.replace(joins[0], rng.choice([" ", ",", "，", "、", "  ", " , "]))


def calculation(rng: random.Random, question: str, lang: str) -> str:
    """'2 + 3' as '2+3', '2 plus 3', '2+3=', ..."""

    def said(match: re.Match) -> str:
        a, sign, b = match.groups()
        words = {"en": {"+": "plus", "-": "minus"}, "zh": {"+": "加", "-": "减"}}.get(lang, {})
        gap = " " if lang == "en" else rng.choice(["", " "])
        forms = [f"{a}{sign}{b}"] * 3 + [f"{a} {sign}{b}", f"{a} {sign} {b}"]
        if sign in words:
            forms += [f"{a}{gap}{words[sign]}{gap}{b}"]
        elif sign == "×":
            forms += [
                f"{a}x{b}",
                f"{a}*{b}",
                f"{a} x {b}",
                f"{a} * {b}",
                f"{a}{gap}{'times' if lang == 'en' else '乘'}{gap}{b}",
            ]
        form = rng.choice(forms)
        return form + rng.choice(["", "", "=", "=?", " ="]) if match.group() == question else form

    return re.sub(r"(?<!\d [+*×-] )\b(\d+) ([+*×-]) (\d+)(?! [+*×-])", said, question)


def shortened(rng: random.Random, question: str, lang: str) -> str:
    """'What's the capital of Peru?' as 'capital of Peru' or 'Peru capital'; '法国的首都是哪里？' as '法国的首都'."""
    if lang == "zh":
        return ZH_TAILS.sub("", question)
    if lang != "en":
        return question
    question = re.sub(r"\b(planet is the \w+) planet\b", r"\1", question)
    short = re.sub(r"^(the|an?) ", "", OPENERS.sub("", question), flags=re.IGNORECASE).rstrip("?.")
    match = re.fullmatch(r"([\w ]{3,20}) of (?:the |an? )?([\w ]+)", short)
    turned = match and rng.random() < 0.4 and not re.search(r"\d", short)  # '10 percent of 20' is not '20 10 percent'
    return f"{match[2]} {match[1]}" if turned else short


def otherwise(rng: random.Random, question: str, lang: str) -> str:
    """One or two words in their everyday form."""
    found = [forms for forms in OTHERWISE.get(lang, []) if re.search(bounded(forms[0], lang), question, re.IGNORECASE)]
    if re.search(r"\d", question):  # '3 + 4 4 me' would be another sum
        found = [forms for forms in found if not forms[1].isdigit()]
    for forms in rng.sample(found, min(len(found), rng.randint(1, 2))):
        question = re.sub(bounded(forms[0], lang), rng.choice(forms[1:]), question, count=1, flags=re.IGNORECASE)
    return question


def bounded(words: str, lang: str) -> str:
    return rf"\b{words}\b" if lang == "en" else words


def left_out(rng: random.Random, question: str, lang: str) -> str:
    """Without one or two small words."""
    for _ in range(rng.randint(1, 2)):
        found = list(re.finditer(LEFT_OUT[lang], question)) if lang in LEFT_OUT else []
        if found:
            match = rng.choice(found)
            before, after = question[: match.start()], question[match.end() :]
            question = question if before[-1:].isdigit() and after[:1].isdigit() else before + after
    return question


def misspelt(rng: random.Random, question: str, lang: str) -> str:
    """One letter wrong in a word of four or more, or one character that sounds alike; never in a number."""
    if lang == "zh":
        places = [i for i, c in enumerate(question) if c in SOUNDS_ALIKE]
        i = rng.choice(places) if places else len(question)
        return question[:i] + SOUNDS_ALIKE.get(question[i : i + 1], "") + question[i + 1 :]
    words = list(re.finditer(r"[^\W\d_]{4,}", question))
    if not words:
        return question
    word = rng.choice(words)
    i = rng.randint(word.start() + 1, word.end() - 2)
    a, b = question[i], question[i + 1]
    wrong = rng.choice([b + a, b, a + a + b, NEIGHBOURS.get(a, a) + b, a])
    return question[:i] + wrong + question[i + 2 :]


def in_plural(rng: random.Random, question: str, lang: str) -> str:
    """'What does a cow eat?' as 'What do cows eat?'."""
    match = re.search(r"\b(does|is|has) an? ([a-z]+)\b", question) if lang == "en" else None
    if not match or match[2][-1] in "sxyfh" or match[2] in ("mouse", "sheep", "person", "kind", "number"):
        return question
    verb = {"does": "do", "is": "are", "has": "have"}[match[1]]
    return f"{question[: match.start()]}{verb} {match[2]}s{question[match.end() :]}"


def unquoted(rng: random.Random, question: str, lang: str) -> str:
    return re.sub('[“”"]', "", question)


def lower(rng: random.Random, question: str, lang: str) -> str:
    return question.lower()


def upper(rng: random.Random, question: str, lang: str) -> str:
    return question.upper()


def wide(rng: random.Random, question: str, lang: str) -> str:
    """Digits and signs as Chinese input methods write them."""
    return question.translate(WIDE) if lang == "zh" else question


def spaced(rng: random.Random, question: str, lang: str) -> str:
    """A space too many or too few."""
    places = [match.start() for match in re.finditer(" |(?<=[一-鿿])(?=[一-鿿])", question)]
    if not places:
        return question
    i = rng.choice(places)
    return question[:i] + ("  " if question[i] == " " else " ") + question[i:].lstrip(" ")


RULES: list[tuple[float, Callable[[random.Random, str, str], str]]] = [
    (0.2, in_plural), (0.3, unquoted), (0.3, shortened), (0.35, otherwise), (0.2, left_out),
    (0.12, misspelt), (0.45, lower), (0.06, upper), (0.04, wide),
    (0.06, spaced),
]  # fmt: skip
