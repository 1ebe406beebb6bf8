"""The starter corpus' world: fact tables (tables/*.tsv) and the wordings of each fact (tables/relations.json).

Read by the other files here. In each list of questions the last NEW_WORDINGS are never trained on.
"""

import json
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

TABLES = Path(__file__).resolve().parent / "tables"
NEW_WORDINGS = 2  # the last questions of a list are kept for the held-out file
NONE = "-"  # a cell with nothing to say


@lru_cache
def load_table(name: str, folder: Path = TABLES) -> list[dict[str, str]]:
    """Rows of <name>.tsv as dictionaries; the first line names the columns."""
    lines = (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t")
    return [dict(zip(header, line.split("\t"), strict=True)) for line in lines[1:]]


def an(noun: str) -> str:
    """'cat' -> 'a cat', 'owl' -> 'an owl'."""
    return ("an " if noun[0].lower() in "aeiou" and not noun.startswith("eu") else "a ") + noun


def many(noun: str) -> str:
    """'cat' -> 'cats', 'butterfly' -> 'butterflies', for the nouns of the tables."""
    if noun in (irregular := {"sheep": "sheep", "mouse": "mice", "foot": "feet"}):
        return irregular[noun]
    if noun[-1] == "y":
        return noun[:-1] + "ies"
    return noun + ("es" if noun[-1] in "shx" else "s")


def cap(sentence: str) -> str:
    """First letter in upper case, the rest untouched."""
    return sentence[:1].upper() + sentence[1:]


@dataclass
class Relation:
    """One kind of fact: `key` column -> `value` column ({k}, {v}; {ak}, {av} with an article in English)."""

    name: str
    skill: str
    table: str
    key: str
    value: str
    answer: dict[str, str]
    questions: dict[str, list[str]]
    told: dict[str, list[str]]  # further wordings for running text, beside the answer itself
    short: dict[str, list[str]]  # the relation in a word or two, as people type it beside the thing
    otherwise: dict[str, list[str]] = field(default_factory=dict)  # questions as people ask them, only trained on
    folder: Path = TABLES
    rows: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for lang in self.questions:
            key, value = self.key.format(lang=lang), self.value.format(lang=lang)
            self.rows[lang] = [
                {
                    "id": row["id"],
                    "k": row[key],
                    "v": row[value],
                    "ak": row[key] if row.get("plural") in (NONE, row[key]) else an(row[key]),
                    "av": an(row[value]),
                    "verb": row.get(f"verb_{lang}", ""),
                }
                for row in load_table(self.table, self.folder)
                if row[key] != NONE and row[value] != NONE
            ]

    def fill(self, template: str, row: dict[str, str]) -> str:
        return cap(template.format(**row))

    def ask_in_short(self, rng: random.Random, lang: str, row: dict[str, str]) -> str:
        """'capital France', '法国首都', and now and then '法国 capital': the thing's name in the other language."""
        short, key = rng.choice(self.short[lang]).format(**row), row["k"]
        other = "en" if lang == "zh" else "zh"
        names = [same["k"] for same in self.rows.get(other, []) if same["id"] == row["id"]]
        mixed = bool(names) and rng.random() < 0.15
        key = names[0] if mixed else key
        forms = ["{k} {s}", "{s} {k}", "{k}: {s}", "{s} - {k}"]
        forms += {"zh": [] if mixed else ["{k}{s}", "{k}的{s}", "{k}，{s}"], "en": ["{s} of {k}"]}.get(lang, [])
        form = rng.choice(forms)
        return form.format(k=key, s=short).strip(" ，:-") if short else key

    def ask_otherwise(self, rng: random.Random, lang: str, row: dict[str, str]) -> str:
        """As people ask; things in the plural or without an article now and then."""
        if row["ak"] != row["k"] and rng.random() < 0.5:
            row = row | {"ak": rng.choice([many(row["k"]), many(row["k"]), row["k"], f"the {row['k']}"])}
        return rng.choice(self.otherwise[lang]).format(**row)

    def tell(self, rng: random.Random, lang: str, row: dict[str, str]) -> str:
        """The fact as a sentence: half of the time exactly as an answer says it."""
        template = self.answer[lang] if rng.random() < 0.5 or not self.told[lang] else rng.choice(self.told[lang])
        return self.fill(template, row)


@lru_cache
def load_json(name: str, folder: Path = TABLES) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def load_relations() -> list[Relation]:
    """starter/relations.json: for each kind of fact its columns, its questions, its answer and further wordings."""
    relations = []
    for name, spec in load_json("relations").items():
        wordings = {lang: spec[lang] for lang in ("zh", "en") if lang in spec}
        answer, questions, told, short = (
            {lang: part[which] for lang, part in wordings.items()} for which in ("answer", "questions", "told", "short")
        )
        columns = (spec[which] for which in ("skill", "table", "key", "value"))
        relations.append(Relation(name, *columns, answer, questions, told, short, load_json("wordings")["facts"][name]))
    return relations


WORDINGS = load_json("wordings")  # how people ask, by skill: questions that are only trained on
WORLD, NATURE, LIFE = "facts_world", "facts_nature", "facts_life"
RELATIONS = load_relations()
