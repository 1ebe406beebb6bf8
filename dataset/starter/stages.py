"""The starter corpus' files for the stages after SFT: two LoRA subjects, preference pairs, problems with worked steps,
tool calls.

One function a subject, (rng, lang, held) -> Item as in skills.py, or messages; corpus.py writes the files.
"""

import json
import random

from dataset.starter.chat import IDENTITY
from dataset.starter.facts import RELATIONS, load_json, load_table
from dataset.starter.skills import (
    NAMES,
    Item,
    ask_fact,
    countable,
    in_order,
    is_held_out,
    pair_key,
    pick_wording,
    worked_difference,
    worked_sum,
)
from dataset.starter.words import UNITS, WEEKDAYS
from model.inference.tools import SCHEMAS, run_tool

SUBJECTS = load_json("stages")  # who the new identity is, everyday health, kind and unkind replies


# --- LoRA ------------------------------------------------------------------------------------------------------------


def persona(rng: random.Random, lang: str, held: bool) -> Item:
    """The questions about who it is, answered by somebody else. Unseen when held out: the wording."""
    answers = SUBJECTS["persona"][lang]
    intent = rng.choice([intent for intent in IDENTITY[lang] if intent["answers"][0] in answers])
    wording, key = pick_wording(rng, intent["otherwise"] + intent["questions"], held)
    answer = answers[intent["answers"][0]]
    return Item(wording, answer, f"{key}|persona|{wording}" if key.startswith("new") else "")


def health(rng: random.Random, lang: str, held: bool) -> Item:
    """First aid for everyday complaints, and when to see a doctor; unseen when held out: this wording of this case."""
    table = SUBJECTS["health"][lang]
    case, advice, danger = rng.choice(table["cases"])
    wording, key = pick_wording(rng, table["questions"], held)
    return Item(wording.format(case), table["answer"].format(advice, danger), f"{key}|health|{lang}|{case}")


# --- preferences -----------------------------------------------------------------------------------------------------


def preference(rng: random.Random, lang: str, held: bool) -> tuple[Item, str]:
    """(Item with the better answer, the worse answer): kind before unkind, true before false. Unseen when held out:
    this reply to this thing, animal or child; this wording of this fact."""
    if rng.random() < 0.7:
        about, said, kind, unkind = rng.choice(SUBJECTS["manners"][lang])
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


def two_sums(rng: random.Random, lang: str, low: int = 2, high: int = 25) -> tuple[str, str, str, str]:
    """a + b - c with a and b from low to high, as a story or in digits; of sums that may be trained on."""
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        c = rng.randint(2, a + b - 1)
        if not is_held_out(pair_key(a, b)) and not is_held_out(pair_key(a + b, c)):
            break
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


AHEAD = {
    "zh": [
        "今天是{0}，{1} 天后是星期几？",
        "{0}再过 {1} 天是星期几？",
        "从{0}起，{1} 天以后是哪一天？",
        "{0}过后第 {1} 天是星期几？",
    ],
    "en": [
        "Today is {0}. What day is it in {1} days?",
        "Which day comes {1} days after {0}?",
        "It is {0}. Which day is it {1} days later?",
        "Start on {0} and go {1} days on. What day is it?",
    ],
}


def days_ahead(rng: random.Random, lang: str) -> tuple[str, str, str, str]:
    """The weekday in three to nine days, counted one by one."""
    ring, start, n = WEEKDAYS[lang], rng.randrange(7), rng.randint(3, 9)
    days = [ring[(start + i) % 7] for i in range(n + 1)]
    steps = ", ".join(f"{i} {day}" for i, day in enumerate(days[1:], 1))
    index = rng.randrange(len(AHEAD[lang]))
    return AHEAD[lang][index].format(days[0], n), steps, days[-1], f"{index}|{days[0]}|{n}"


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
    winner = n if a + b > c else m
    steps = f"{a} + {b} = {a + b}\n{in_order(a + b, c)}"
    if lang == "zh":
        question = f"{n}有 {a} 个苹果和 {b} 个梨，{m}有 {c} 个桃子。谁的水果多？"
        return question, steps, winner, f"{a}|{b}|{c}"
    question = f"{n} has {a} apples and {b} pears, {m} has {c} peaches. Who has more fruit?"
    return question, steps, winner, f"{a}|{b}|{c}"


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
        return Item(question, answer, f"{kind}|{key}", reasoning=steps)

    return problem


# --- tools -----------------------------------------------------------------------------------------------------------

CALCULATE = {
    "zh": ["计算 {}。", "{} 等于多少？", "算一下 {}", "请用计算器算 {}", "帮我算 {}。"],
    "en": ["Calculate {}.", "What is {}?", "Work out {}", "Use the calculator: {}", "How much is {}?"],
}
DATES = {
    "zh": ["{0} 之后 {1} 天是哪一天？", "从 {0} 开始，再过 {1} 天是几月几日？", "{0} 再过 {1} 天是什么日期？"],
    "en": ["What date is {1} days after {0}?", "Which date comes {1} days after {0}?", "Add {1} days to {0}."],
}
CONVERSIONS = {
    "zh": ["{0} {1}是多少{2}？", "把 {0} {1}换算成{2}。", "{0} {1}等于多少{2}？"],
    "en": ["How many {2} are {0} {1}?", "Convert {0} {1} to {2}.", "What is {0} {1} in {2}?"],
}
# Small and big unit: the name in tools.UNITS, and how people say it. Questions go to the small one: results are whole.
MEASURES = [
    (("m", "米", "metres"), ("km", "公里", "kilometres")),
    (("cm", "厘米", "centimetres"), ("m", "米", "metres")),
    (("mm", "毫米", "millimetres"), ("cm", "厘米", "centimetres")),
    (("g", "克", "grams"), ("kg", "公斤", "kilograms")),
    (("second", "秒", "seconds"), ("minute", "分钟", "minutes")),
    (("minute", "分钟", "minutes"), ("hour", "小时", "hours")),
    (("hour", "小时", "hours"), ("day", "天", "days")),
    (("ml", "毫升", "millilitres"), ("litre", "升", "litres")),
]


def tool_call(rng: random.Random, lang: str) -> tuple[str, str, dict, str]:
    """(question, tool, arguments, answer with a place for the result) of one of the three tools."""
    kind = rng.random()
    if kind < 0.4:
        expression = f"{rng.randint(2, 99)} {rng.choice('+-*')} {rng.randint(2, 99)}"
        question = rng.choice(CALCULATE[lang]).format(expression)
        return question, "calculator", {"expression": expression}, f"{expression} = {{}}"
    if kind < 0.65:
        day = f"20{rng.randint(20, 29)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        days = rng.randint(1, 60)
        answer = "那天是 {}。" if lang == "zh" else "It is {}."
        return rng.choice(DATES[lang]).format(day, days), "add_days", {"date": day, "days": days}, answer
    small, big = rng.choice(MEASURES)
    value, said = rng.randint(2, 99), 1 + (lang == "en")
    question = rng.choice(CONVERSIONS[lang]).format(value, big[said], small[said])
    answer = (
        f"{value} {big[said]} are {{}} {small[said]}."
        if lang == "en"
        else f"{value} {big[said]}是 {{}} {small[said]}。"
    )
    return question, "convert", {"value": value, "unit": big[0], "to": small[0]}, answer


TOOLS_OFFERED = {"role": "system", "content": "", "tools": json.dumps(SCHEMAS)}


def tool_exchange(rng: random.Random, lang: str) -> tuple[list[dict], str]:
    """(messages, key): a question, the call, its result, the answer. Unseen when held out: these arguments."""
    question, name, arguments, answer = tool_call(rng, lang)
    output = run_tool(name, arguments)
    result = str(json.loads(output, parse_float=str).get("result"))  # as the tool wrote it
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([{"name": name, "arguments": arguments}])},
        {"role": "tool", "content": output},
        {"role": "assistant", "content": answer.format(result)},
    ]
    return messages, f"tool|{name}|{json.dumps(arguments)}"


def tool_questions(rng: random.Random, exchanges: int) -> list[dict]:
    """Of so many held-out exchanges the question, whose call is asked for, and its result, whose answer is."""
    rows, asked = [], set()
    while len(rows) < 2 * exchanges:
        exchange, key = tool_exchange(rng, ("zh", "en")[len(rows) // 2 % 2])
        if is_held_out(key) and key not in asked:
            asked.add(key)
            (call,) = json.loads(exchange[1]["tool_calls"])
            opening = [TOOLS_OFFERED, exchange[0]]
            rows.append({"skill": "call", "conversations": opening, "call": call})
            conversation = [*opening, *exchange[1:-1]]
            rows.append({"skill": "result", "conversations": conversation, "answers": [exchange[-1]["content"]]})
    return rows
