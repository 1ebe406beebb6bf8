"""Problems that are answered by generation: GSM8K, and held-out questions as those of the starter corpus.

The rule for GSM8K: the number after the last "####" of the answer, else its last number; commas and currency signs do
not count, and 18, 18.0 and 18.00 are the same. For held-out questions it is the scoreboard's.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from evaluation.asking import Examinee, Prompt
from evaluation.multiple_choice import Result, Row
from evaluation.statistics import pass_at_k
from evaluation.tasks import Problem, Task

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The number that an answer ends with, None without one."""
    _, marked, end = text.rpartition("####")
    found = NUMBER.findall(end if marked else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if marked else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def run_generative(
    examinee: Examinee, task: Task, shots: int, samples: int, seed: int, show: Callable = lambda done: None
) -> Result:
    """`samples` answers to each question: the likeliest one, or several drawn at the bot's temperature.

    The accuracy is pass@1; with several samples the last row is pass@k for k = samples."""
    bot = examinee.bot
    examples = task.shots.get("", [])[:shots]
    prompts = [_prompt(examinee, question, examples) for question in task.questions]
    fits = [i for i, prompt in enumerate(prompts) if not bot.overflow(prompt)]
    asked = [(i, n) for i in fits for n in range(samples)]
    said: list[list[str]] = [[] for _ in prompts]
    right = [0] * len(prompts)
    seeds = [seed + n for _, n in asked]
    answers = bot.answer_each([prompts[i] for i, _ in asked], seeds, 64)
    for done, (number, message, _) in enumerate(answers, 1):
        i = asked[number][0]
        question = task.questions[i]
        text = message.text if examinee.chat else _first_answer(message.text)
        said[i].append(text)
        if isinstance(question, Problem):
            right[i] += (wanted := final_number(question.answer)) is not None and final_number(text) == wanted
        else:
            right[i] += question.is_right(message)
        show(done)
    subjects = [getattr(question, "skill", "") for question in task.questions]
    rows = [Row("exact" if k == 1 else f"pass@{k}", [pass_at_k(samples, r, k) for r in right], 0.0, subjects)
            for k in dict.fromkeys((1, samples))]  # fmt: skip
    details = [{"right": r, "of": samples, "answers": texts} for r, texts in zip(right, said, strict=True)]
    result = Result(task, rows, *_worked_answers(examinee, task, prompts), details, len(examples))
    if len(fits) < len(prompts):
        result.notes.append(f"{len(prompts) - len(fits)} questions leave no room for an answer: counted as wrong")
    return result


def _prompt(examinee: Examinee, question, examples: list[Problem]) -> str | list[dict]:
    if not isinstance(question, Problem):
        return question.messages
    prompt = Prompt(question.question, [(example.question, example.answer) for example in examples])
    if examinee.chat:
        return prompt.messages
    return Prompt(_as_text(question.question), [(_as_text(q), answer) for q, answer in prompt.examples]).text


def _as_text(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _first_answer(text: str) -> str:
    """What a model that continues texts writes before it makes up the next question."""
    return re.split(r"\n\s*\n|Question:", text, maxsplit=1)[0]


def _worked_answers(examinee: Examinee, task: Task, prompts: list) -> tuple[list[float], list[int]]:
    """Bits and bytes of the worked answers, for problems that have one."""
    if not isinstance(task.questions[0], Problem):
        return [], []
    items = []
    for problem in task.questions:
        question = problem.question if examinee.chat else _as_text(problem.question)
        items.append(examinee.item(Prompt(question), [problem.answer]))
    scores = examinee.score(items)
    bits = [-score.logprob / math.log(2) for (score,) in scores]
    return bits, [len(problem.answer.encode()) for problem in task.questions]
