"""Problems one step beyond those of reason.jsonl, for reinforcement learning: with the answer, but without the steps
that lead to it."""

import random

from dataset.starter.skills import Item, is_held_out
from dataset.starter.stages import two_sums

LOW, HIGH = 15, 55  # two_sums of reason.jsonl goes from 2 to 25
QUESTIONS, HELD_OUT = 6_000, 600


def larger_sums(rng: random.Random, lang: str) -> Item:
    """a + b - c with larger numbers. The worked steps are for those who want to compare; the files leave them out."""
    question, steps, answer, key = two_sums(rng, lang, LOW, HIGH)
    return Item(question, answer, f"larger_sums|{key}", reasoning=steps)


def make_questions(rng: random.Random, count: int, held: bool) -> list[Item]:
    """Different ones, half of them in either language; unseen when held out: these numbers."""
    items: dict[str, Item] = {}
    while len(items) < count:
        item = larger_sums(rng, ("zh", "en")[len(items) % 2])
        if is_held_out(item.key) == held:
            items.setdefault(item.question, item)
    return list(items.values())


def question_row(item: Item) -> dict:
    return {
        "skill": "larger_sums", "conversations": [{"role": "user", "content": item.question}], "answers": [item.answer],
    }  # fmt: skip
