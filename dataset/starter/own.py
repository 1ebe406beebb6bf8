"""A world of your own: a folder of tables and wordings becomes the files that the scripts train on.

python -m dataset.starter --world FOLDER --out my_data     # docs/own_world.md says what stands in the folder

Facts, follow-ups, who it is, small talk, and what it does not know, in one language. What the starter world can do
beside them (sums, sorting, translation, ...) are programs of its two languages.
"""

import json
import random
from pathlib import Path

from dataset.jsonl import DataError
from dataset.starter.facts import Relation, load_json
from dataset.starter.registers import TYPED, typed
from dataset.starter.skills import Item, ask_fact, is_held_out, pick_wording

SHARES = {"facts": 66, "follow_up": 8, "identity": 8, "small_talk": 6, "outside": 12}  # per cent of the conversations
HELD_OUT = 60  # questions of each subject, at most
TRIES = 2000  # draws after which there is nothing on that side of the split
LANG = "own"  # the registers know no words of it: their rules on letters, signs and case apply
GUIDE = "docs/own_world.md says what a world is made of"


class World:
    """The tables and wordings of a folder. DataError names what is missing."""

    def __init__(self, folder: Path):
        self.file = file = folder / "world.json"
        try:
            spec = load_json("world", folder)
            self.another, self.declines = spec["another"], spec["declines"]
            self.outside = spec["outside"]
            self.talks = {kind: spec[kind] for kind in ("identity", "small_talk")}
            self.relations = []
            for name, part in spec["relations"].items():
                texts = ({LANG: part[which]} for which in ("answer", "questions", "told", "short"))
                self.relations.append(
                    Relation(name, "facts", part["table"], part["key"], part["value"], *texts, folder=folder)
                )
            lists = {name: spec[name] for name in ("another", "outside", "declines")}
            lists |= {f"{r}: {which}": part[which] for r, part in spec["relations"].items()
                      for which in ("questions", "told", "short")}  # fmt: skip
            lists |= {f"{kind} {n}: {which}": talk[which] for kind, talks in self.talks.items()
                      for n, talk in enumerate(talks, 1) for which in ("questions", "answers")}  # fmt: skip
            rows = {relation.name: len(relation.rows[LANG]) for relation in self.relations}
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}; {GUIDE}") from None
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: {type(error).__name__}: {error}; {GUIDE}") from None
        for name, texts in lists.items():
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise DataError(f"{file}: {name}: must be a list of texts; {GUIDE}")
            if len(texts) < 4 and name.endswith(("questions", "outside")):
                text = f"{file}: {name}: needs at least four questions, of which the last two are kept for the end"
                raise DataError(text)
            if not texts and not name.endswith("told"):
                raise DataError(f"{file}: {name}: is empty; {GUIDE}")
        if few := [name for name, n in rows.items() if n < 2]:
            raise DataError(f"{file}: {few[0]}: its table needs at least two things of which it is told")
        if empty := [name for name, part in {"relations": rows, **self.talks}.items() if not part]:
            raise DataError(f"{file}: {empty[0]}: is empty; {GUIDE}")

    # ------------------------------------------------------------------------------------------------ one exchange

    def draw(self, rng: random.Random, subject: str, held: bool = False) -> Item:
        """An Item that lies on the wanted side of the split. DataError if there seems to be none."""
        makers = {"facts": self.fact, "follow_up": self.follow_up, "outside": self.unknown}
        make = makers.get(subject) or self.talk(subject)
        for _ in range(TRIES):
            if is_held_out((item := make(rng, held)).key) == held:
                return item
        raise DataError(f"{self.file}: {subject}: too little to keep a part out of training; add things or wordings")

    def fact(self, rng: random.Random, held: bool) -> Item:
        relation = rng.choice(self.relations)
        return ask_fact(rng, LANG, held, relation, rng.choice(relation.rows[LANG]))

    def follow_up(self, rng: random.Random, held: bool) -> Item:
        """The same question about another thing, which only what was said before explains."""
        relation = rng.choice(self.relations)
        first, second = rng.sample(relation.rows[LANG], 2)
        opening = ask_fact(rng, LANG, False, relation, first)
        question = rng.choice(self.another).format(second["k"])
        key = f"another|{relation.name}|{first['k']}|{second['k']}"
        answer = relation.fill(relation.answer[LANG], second)
        return Item(question, answer, key, history=[(opening.question, opening.answer)])

    def talk(self, kind: str):
        def said(rng: random.Random, held: bool) -> Item:
            intent = rng.choice(self.talks[kind])
            wording, key = pick_wording(rng, intent["questions"], held)
            key = f"{key}|{wording}" if key.startswith("new") else ""
            return Item(wording, rng.choice(intent["answers"]), key, accepted=intent["answers"])

        return said

    def unknown(self, rng: random.Random, held: bool) -> Item:
        kept = max(2, len(self.outside) // 10)
        question = rng.choice(self.outside[-kept:] if held else self.outside[:-kept])
        return Item(question, rng.choice(self.declines), f"new|{question}" if held else "", accepted=self.declines)

    # ------------------------------------------------------------------------------------------------ the files

    def text(self, rng: random.Random) -> str:
        """What is known of one thing, or some questions with their answers."""
        if rng.random() < 0.5:
            items = [self.draw(rng, "facts") for _ in range(rng.randint(2, 5))]
            return "\n".join(f"{item.question}\n{item.answer}" for item in items)
        chosen = rng.choice(self.relations)
        thing = rng.choice(chosen.rows[LANG])["id"]
        told = [
            (r, row) for r in self.relations if r.table == chosen.table for row in r.rows[LANG] if row["id"] == thing
        ]
        rng.shuffle(told)
        return " ".join(relation.tell(rng, LANG, row) for relation, row in told)

    def conversation(self, rng: random.Random, subject: str) -> dict:
        item = self.draw(rng, subject)
        question = typed(rng, item.question, LANG) if rng.random() < TYPED else item.question
        turns = [*item.history, (question, item.answer)]
        return {"conversations": [message for turn in turns for message in as_messages(*turn)]}

    def held_out(self, rng: random.Random, subject: str) -> list[dict]:
        rows: dict[str, dict] = {}
        for _ in range(20 * HELD_OUT):
            item = self.draw(rng, subject, held=True)
            messages = [message for turn in item.history for message in as_messages(*turn)]
            messages.append({"role": "user", "content": item.question})
            answers = list(dict.fromkeys([item.answer, *item.accepted]))
            rows[json.dumps(messages)] = {"skill": subject, "conversations": messages, "answers": answers}
        return list(rows.values())[:HELD_OUT]


def as_messages(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_world(folder: Path, seed: int, texts: int, conversations: int) -> dict[str, list[dict]]:
    """The rows of each file, by its name."""
    world, rng = World(folder), random.Random(f"{seed}/own")
    rows = {"pretrain": [{"text": world.text(rng)} for _ in range(texts)]}
    subjects = rng.choices(list(SHARES), list(SHARES.values()), k=conversations)
    rows["sft"] = [world.conversation(rng, subject) for subject in subjects]
    rows["heldout"] = [row for subject in SHARES for row in world.held_out(rng, subject)]
    kept = {json.dumps(row["conversations"]) for row in rows["heldout"]}
    rows["sft"] = [row for row in rows["sft"] if json.dumps(row["conversations"][:-1]) not in kept]
    for name in ("pretrain", "sft"):
        cut = max(1, len(rows[name]) // 50)
        seen = set(map(json.dumps, rows[name][cut:]))
        rows[f"{name}_val"] = [row for row in rows[name][:cut] if json.dumps(row) not in seen] or rows[name][:1]
        rows[name] = rows[name][cut:]
    return rows
