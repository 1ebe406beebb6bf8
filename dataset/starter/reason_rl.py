"""Problems one step beyond those of reason.jsonl, for reinforcement learning: with the answer, but without the steps
that lead to it."""

import random

from dataset.starter.skills import Item, is_held_out
from dataset.starter.stages import PROBLEMS, problem_of, two_sums

LOW, HIGH = 15, 55  # two_sums of reason.jsonl goes from 2 to 25
QUESTIONS, HELD_OUT = 6_000, 600
KNOWN = 0.3  # share of the training questions that are of reason.jsonl's kinds: they are not to be forgotten


def larger_sums(rng: random.Random, lang: str, held: bool = False) -> Item:
    """a + b - c with larger numbers. The worked steps are for those who want to compare; the files leave them out."""
    question, steps, answer, key = two_sums(rng, lang, LOW, HIGH)
    return Item(question, answer, f"larger_sums|{key}", reasoning=steps)


def make_questions(rng: random.Random, count: int, held: bool) -> list[Item]:
    """Different ones, half of them in either language, mixed with known kinds to train on; unseen when held out: these
    numbers."""
    items: dict[str, Item] = {}
    while len(items) < count:
        make = problem_of(rng.choice(list(PROBLEMS))) if not held and rng.random() < KNOWN else larger_sums
        item = make(rng, ("zh", "en")[len(items) % 2], held)
        if is_held_out(item.key) == held:
            items.setdefault(item.question, item)
    return list(items.values())


def question_row(item: Item) -> dict:
    """As dataset/questions.py reads it."""
    asked = [{"role": "user", "content": item.question}]
    return {"skill": item.key.partition("|")[0], "conversations": asked, "answers": [item.answer]}
