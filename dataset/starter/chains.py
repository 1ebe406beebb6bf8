"""Tasks for an agent: their answers take two or three calls of the built-in tools after one another, or none at all, or
another try after an error.

Chains of two calls, a second try, and several questions in one message are demonstrated now and then in the long chats.
Chains of three never are: agent.jsonl has the questions and what is true, and train_agent.py finds the way from one to
the other.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from dataset.starter import stages
from dataset.starter.skills import Item, is_held_out
from model.inference.tools import run_tool

LAST = "{last}"  # in an argument: the result of the call before


ROWS = 4_000  # of agent.jsonl, at size 1.0
HELD_OUT = 500  # of each kind of task


@dataclass
class Task:
    """A question and the calls that lead to its answer, which may be none. `before`: what has been said since the
    question, when the task begins. Unseen when held out: `key`."""

    question: str
    calls: list[tuple[str, dict]]
    answer: str  # with a place for the last result
    key: str
    truth: str = ""  # what a right answer says, where it is not the last result
    before: list[dict] = field(default_factory=list)


Make = Callable[[random.Random, str], Task]
Other = Callable[[random.Random, str, bool], Item]  # questions that no tool can answer; True: held out


def day(rng: random.Random) -> str:
    return f"20{rng.randint(20, 29)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def measures(rng: random.Random, lang: str) -> tuple[str, str, str, str]:
    """(unit, how people say it) of a big measure, and of a small one that goes into it."""
    small, big = rng.choice(stages.MEASURES)
    said = 1 + (lang == "en")
    return big[0], big[said], small[0], small[said]


def amount(rng: random.Random) -> int:
    return rng.randint(2, 20)


# --- two calls, three calls ------------------------------------------------------------------------------------------


def converted(rng: random.Random, lang: str, summed: bool, more: bool) -> Task:
    """An amount, perhaps a sum, of a big unit, and perhaps some more, in a small one."""
    a, b, c = amount(rng), amount(rng), rng.randint(2, 99)
    unit, big, to, small = measures(rng, lang)
    first, extra = (f"{a} + {b}" if summed else str(a)), (f" plus {c} {small}" if more else "")
    if lang == "zh":
        extra = f"再加 {c} {small}" if more else ""
        question = rng.choice(["{0} {1}{3}，一共是多少{2}？", "把 {0} {1}{3}换算成{2}。", "{0} {1}{3}等于多少{2}？"])
    else:
        question = rng.choice(
            ["How many {2} are {0} {1}{3}?", "Convert {0} {1}{3} to {2}.", "What is {0} {1}{3} in {2}?"]
        )
    calls = [("calculator", {"expression": first})] if summed else []
    calls.append(("convert", {"value": a if not summed else LAST, "unit": unit, "to": to}))
    calls += [("calculator", {"expression": f"{LAST} + {c}"})] if more else []
    answer = f"一共是 {{}} {small}。" if lang == "zh" else f"That is {{}} {small}."
    return Task(question.format(first, big, small, extra), calls, answer, f"converted|{first}|{unit}|{to}|{c * more}")


def dated(rng: random.Random, lang: str, summed: bool, later: int) -> Task:
    """The date some days after another, perhaps a sum of days, and then some days `later`, none, one or two times."""
    start, a, b = day(rng), amount(rng), amount(rng)
    first, steps = (f"{a} + {b}" if summed else str(a)), [amount(rng) for _ in range(later)]
    if lang == "zh":
        then = "".join(f"，再过 {days} 天" for days in steps)
        question = rng.choice(["{0} 之后 {1} 天{2}是哪一天？", "从 {0} 开始，过 {1} 天{2}是几月几日？"])
    else:
        then = "".join(f" and then {days} days later" for days in steps)
        question = rng.choice(["What date is {1} days after {0}{2}?", "Which date comes {1} days after {0}{2}?"])
    calls = [("calculator", {"expression": first})] if summed else []
    calls.append(("add_days", {"date": start, "days": LAST if summed else a}))
    calls += [("add_days", {"date": LAST, "days": days}) for days in steps]
    answer = "那天是 {}。" if lang == "zh" else "It is {}."
    return Task(question.format(start, first, then), calls, answer, f"dated|{start}|{first}|{steps}")


TWO: list[Make] = [
    lambda rng, lang: converted(rng, lang, summed=True, more=False),
    lambda rng, lang: converted(rng, lang, summed=False, more=True),
    lambda rng, lang: dated(rng, lang, summed=True, later=0),
    lambda rng, lang: dated(rng, lang, summed=False, later=1),
]
THREE: list[Make] = [
    lambda rng, lang: converted(rng, lang, summed=True, more=True),
    lambda rng, lang: dated(rng, lang, summed=True, later=1),
    lambda rng, lang: dated(rng, lang, summed=False, later=2),
]


def two_calls(rng: random.Random, lang: str) -> Task:
    return rng.choice(TWO)(rng, lang)


def three_calls(rng: random.Random, lang: str) -> Task:
    return rng.choice(THREE)(rng, lang)


# --- recovery --------------------------------------------------------------------------------------------------------


def recovery(rng: random.Random, lang: str) -> Task:
    """A question of one call that writes a date or a sign in another way than the tool reads it: copied as it stands,
    it has got an error back."""
    if rng.random() < 0.5:
        a, b = amount(rng), amount(rng)
        said, meant = rng.choice([(f"{a} × {b}", f"{a} * {b}"), (f"{a * b} ÷ {b}", f"{a * b} / {b}")])
        name, slip, arguments = "calculator", {"expression": said}, {"expression": meant}
        question, answer = rng.choice(stages.CALCULATE[lang]).format(said), f"{said} = {{}}"
    else:
        date, days = day(rng), rng.randint(1, 60)
        said = date.replace("-", "/")
        name, slip, arguments = "add_days", {"date": said, "days": days}, {"date": date, "days": days}
        question = rng.choice(stages.DATES[lang]).format(said, days)
        answer = "那天是 {}。" if lang == "zh" else "It is {}."
    call = {"role": "assistant", "content": "", "tool_calls": json.dumps([{"name": name, "arguments": slip}])}
    before = [call, {"role": "tool", "content": run_tool(name, slip)}]
    return Task(question, [(name, arguments)], answer, f"recovery|{said}|{json.dumps(arguments)}", before=before)


# --- to call or not to call ------------------------------------------------------------------------------------------


def one_call(rng: random.Random, lang: str) -> Task:
    question, name, arguments, answer = stages.tool_call(rng, lang)
    return Task(question, [(name, arguments)], answer, f"tool|{name}|{json.dumps(arguments)}")


def no_call(rng: random.Random, lang: str, held: bool, other: Other) -> Task:
    item = other(rng, lang, held)
    return Task(item.question, [], item.answer, item.key, truth=item.answer.rstrip(".。"))


# --- conversations ---------------------------------------------------------------------------------------------------


def carry_out(task: Task) -> tuple[list[dict], str]:
    """The messages between the task's question and its answer, and the last result."""
    messages, last = list(task.before), ""
    for name, arguments in task.calls:
        filled = {key: fill(value, last) for key, value in arguments.items()}
        output = run_tool(name, filled)
        last = str(json.loads(output, parse_float=str).get("result", last))  # as the tool wrote it
        calls = json.dumps([{"name": name, "arguments": filled}])
        messages += [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": output}]
    return messages, last


def fill(value: str | int, last: str) -> str | int:
    """An argument, with the last result where it wants it: a number if it is nothing else."""
    if value == LAST:
        return int(last) if last.isdigit() else last
    return value.replace(LAST, last) if isinstance(value, str) else value


DEMONSTRATED = {two_calls: 0.45, recovery: 0.2}  # shares; the others are several questions at once


def demonstration(rng: random.Random, lang: str) -> list[dict]:
    """A task of two calls, or of one, with or without another try after an error; or several questions of one call."""
    (make,) = rng.choices([*DEMONSTRATED, several], [*DEMONSTRATED.values(), 1 - sum(DEMONSTRATED.values())])
    if make is several:
        return several(rng, lang)
    while is_held_out((task := make(rng, lang)).key):
        pass
    return worked(task)


def several(rng: random.Random, lang: str) -> list[dict]:
    """Two or three questions in one message, each with its own call. No call needs the result of another: what is
    learnt is that the number of calls is up to the question."""
    parts: list[list[dict]] = []
    while len(parts) < 2 or (len(parts) == 2 and rng.random() < 0.6):
        exchange, key = stages.tool_exchange(rng, lang)
        parts += [exchange] if not is_held_out(key) else []
    said, answered = (" ".join(part[i]["content"] for part in parts) for i in (0, -1))
    between_them = [message for part in parts for message in part[1:-1]]
    return [{"role": "user", "content": said}, *between_them, {"role": "assistant", "content": answered}]


def worked(task: Task) -> list[dict]:
    """The task from its question to its answer."""
    messages, last = carry_out(task)
    answer = {"role": "assistant", "content": task.answer.format(last)}
    return [{"role": "user", "content": task.question}, *messages, answer]


def agent_row(kind: str, task: Task, offered: bool = True) -> dict:
    """A line of agent.jsonl: what the agent gets to see, an empty answer, and what is true."""
    truth = task.truth or carry_out(task)[1]
    conversation = [stages.TOOLS_OFFERED] * offered + [{"role": "user", "content": task.question}, *task.before]
    return {"skill": kind, "conversations": [*conversation, {"role": "assistant", "content": ""}], "gt": [truth]}


SHARES = {"two_calls": 2.5, "three_calls": 3, "call_or_answer": 3.5, "recovery": 1}  # of agent.jsonl
WITHOUT_TOOLS = 0.5  # share of the questions to train on that no tool can answer: what it knows is not to be forgotten


def draw_tasks(rng: random.Random, kinds: list[str], held: bool, other: Other) -> list[Task]:
    """A task of each of these kinds, all different. Of call_or_answer, one is right as often as the other."""
    make = {"two_calls": two_calls, "three_calls": three_calls, "recovery": recovery}
    tasks, asked = [], set()
    for i, kind in enumerate(kinds):
        some = make.get(kind) or rng.choice([one_call, partial(no_call, held=held, other=other)])
        while True:
            task = some(rng, ("zh", "en")[(i + i // len(SHARES)) % 2])
            if is_held_out(task.key) == held and (kind, task.question) not in asked:
                break
        asked.add((kind, task.question))
        tasks.append(task)
    return tasks


def make_tasks(rng: random.Random, size: float, other: Other) -> list[dict]:
    """The tasks to train on, in the shares of SHARES."""
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=int(ROWS * size))
    tasks = draw_tasks(rng, kinds, False, other)
    offered = [bool(task.calls) or rng.random() >= WITHOUT_TOOLS for task in tasks]
    return [agent_row(*row) for row in zip(kinds, tasks, offered, strict=True)]


def make_heldout(rng: random.Random, other: Other) -> list[dict]:
    kinds = list(SHARES) * HELD_OUT
    return [agent_row(*row) for row in zip(kinds, draw_tasks(rng, kinds, True, other), strict=True)]
