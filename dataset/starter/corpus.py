"""The built-in bilingual starter corpus: pretraining text, conversations and a held-out scoreboard, made in seconds.

    python -m dataset.starter [--size 1.0] [--seed 0] [--out DIR]

A tiny regular world (fact tables in tables/*.tsv) that a model of a few million parameters learns in minutes. Held-out
questions share no (question, answer) pair with training: unseen are, by skill, the wording of a fact, the pair of
operands, the list, the sentence, the system message with this question. is_held_out() decides by a hash of its key.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dataset.cache import default_cache_dir
from dataset.jsonl import DataError
from dataset.starter import chains, chat, lists, long_chats, own, reason_rl, skills, stages, stories, turns, words
from dataset.starter.facts import LIFE, NATURE, WORLD
from dataset.starter.registers import TYPED, typed
from dataset.starter.skills import NAMES, Item, is_held_out, person

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / "starter_data"
LANGUAGES = ("zh", "en")
STAMP = "stamp.json"

SFT_ROWS = 60_000  # at size 1.0
SFT_VAL_ROWS = 300
PRETRAIN_BYTES = 5_000_000  # at size 1.0
OWN_TEXTS = 20_000  # at size 1.0
PRETRAIN_VAL_BYTES = 100_000
HELD_OUT_PER_SKILL = 30

Skill = Callable[[random.Random, str, bool], Item]

# Parts of the conversations, and the function that makes one.
SKILLS: dict[str, tuple[float, Skill]] = {
    "identity": (4.0, chat.who_it_is),
    "greeting": (6.0, chat.greeting),
    WORLD: (14.0, skills.facts_of(WORLD)),
    NATURE: (17.0, skills.facts_of(NATURE)),
    LIFE: (17.0, skills.facts_of(LIFE)),
    "arithmetic": (14.0, skills.arithmetic),
    "times_table": (3.0, skills.times_table),
    "comparing": (9.0, skills.comparing),
    "sorting": (8.0, lists.sorting),
    "counting": (4.5, lists.counting),
    "opposites": (5.0, words.opposites),
    "translation": (10.0, words.translation),
    "units_dates": (6.0, words.units_dates),
    "category": (5.0, lists.category),
    "rewriting": (11.0, lists.rewriting),
    "story": (3.0, chat.story),
    "system_prompt": (5.5, chat.system_prompt),
    "multi_turn": (9.5, turns.multi_turn),
    "unknown": (20.0, chat.unknown),
}
PROBLEMS = {name: (share, stages.problem_of(name)) for name, (share, _) in stages.PROBLEMS.items()}
CALLED = {"arithmetic", "times_table", "units_dates"}  # skills that the built-in tools have too
# The answer repeats a part of the question.
LITERAL = {"sorting", "counting", "category", "rewriting", "system_prompt", "story"}
TALK = ("identity", "greeting", "story", "system_prompt", "unknown")  # left out of plain-text dialogues
WORKED = {"arithmetic": 7, "times_table": 1, "comparing": 3, "units_dates": 1, "opposites": 0.5}  # true on their own

# The stages after SFT: by file, the share of each subject. A part of the rows repeats SFT conversations, lest the model
# forget them.
STAGES: dict[str, dict[str, tuple[float, Skill]]] = {
    "lora_identity": {"persona": (1, stages.persona)},
    "lora_medical": {"health": (1, stages.health)},
    "reason": PROBLEMS,
}
STAGE_ROWS = {"lora_identity": 3_000, "lora_medical": 3_000, "reason": 16_000}  # at size 1.0
REPEATED = {"lora_identity": 0.5, "lora_medical": 0.7}
PROBLEM_ROWS = 0.12  # of the SFT: problems of several steps
THINKING = 0.7  # share of the problems whose steps are shown
# Before an answer without steps.
THOUGHTS = {"zh": ["这个我会。", "很简单。"], "en": ["I can do this.", "That is easy."]}
THOUGHT = 0.05  # share of those that have one: a chat that asks for thinking must not lose what needs none
PREFERENCES = 6_000  # at size 1.0
LONG_ROWS = 12_000  # at size 1.0
# What no tool can do.
BEYOND_TOOLS = (WORLD, NATURE, LIFE, *"comparing sorting counting opposites translation category rewriting".split())
FILES = (
    "pretrain.jsonl",
    "pretrain_val.jsonl",
    "sft.jsonl",
    "sft_val.jsonl",
    "heldout.jsonl",
    "dpo.jsonl",
    "dpo_val.jsonl",
)
FILES += tuple(f"{stage}{part}.jsonl" for stage in STAGES for part in ("", "_val", "_heldout"))
FILES += ("tools_heldout.jsonl", "long.jsonl", "long_val.jsonl")
FILES += ("reason_rl.jsonl", "reason_rl_val.jsonl", "agent.jsonl", "agent_val.jsonl")

# Parts of the pretraining bytes.
TEXTS = {"story": 10, "description": 12, "facts": 13, "dialogue": 37, "worked": 20, "translation": 8, "repeated": 16}


def draw_item(rng: random.Random, skill: str | Skill, lang: str, held: bool = False) -> Item:
    """An Item of the skill that lies on the wanted side of the split."""
    make = (SKILLS | PROBLEMS)[skill][1] if isinstance(skill, str) else skill
    while True:
        item = make(rng, lang, held)
        if is_held_out(item.key) == held:
            return item


def exchange(rng: random.Random, skill: str | Skill, lang: str) -> Item:
    """An Item to train on, as people type it, with thinking in some."""
    item = draw_item(rng, skill, lang)
    if rng.random() < TYPED:
        item.question = typed(rng, item.question, lang, literal=skill in LITERAL)
    if item.reasoning and rng.random() > THINKING:
        item.reasoning = ""
    elif not item.reasoning and not item.declines and rng.random() < THOUGHT:
        item.reasoning = rng.choice(THOUGHTS[lang])
    return item


def text_document(rng: random.Random, kind: str, lang: str) -> str:
    """One pretraining text."""
    if kind == "story":
        return stories.story_text(rng, lang)
    if kind == "description":
        return stories.description_text(rng, lang)
    if kind == "facts":
        return stories.facts_text(rng, lang)
    if kind == "repeated":
        return stories.repeated_text(rng, lang)
    if kind == "translation":
        return stories.translation_text(rng, words.word_pairs(), trainable_sentence)
    weights = WORKED if kind == "worked" else {name: share for name, (share, _) in SKILLS.items() if name not in TALK}
    some = rng.choices(list(weights), list(weights.values()), k=2)  # a text keeps to one or two subjects

    def any_item(rng: random.Random, lang: str) -> Item:
        return draw_item(rng, rng.choice(some), lang)

    def impersonal(rng: random.Random, lang: str) -> Item:  # 'so Tom is older' says nothing by itself
        while any(name in (item := any_item(rng, lang)).answer for name in NAMES[lang]):
            pass
        return item

    if kind == "worked":
        return stories.plain_text(rng, lang, impersonal)
    return stories.dialogue_text(rng, lang, any_item, person(rng, lang))


def trainable_sentence(rng: random.Random) -> tuple[str, str]:
    while True:
        pair = words.sentence_pair(rng)
        if not is_held_out(f"sentence|{pair[0]}"):
            return pair


def make_pretrain(rng: random.Random, limit: int, seen: set[str]) -> list[str]:
    """Distinct texts of about `limit` bytes, each kind and language with its share; none is in `seen`, which grows."""
    texts = []
    for kind, share in TEXTS.items():
        for lang in LANGUAGES:
            left = limit * share / sum(TEXTS.values()) / len(LANGUAGES)
            while left > 0:
                text = text_document(rng, kind, lang)
                if text in seen and rng.random() < 0.99:  # a world this small repeats itself now and then
                    continue
                seen.add(text)
                texts.append(text)
                left -= len(text.encode()) + 1
    rng.shuffle(texts)
    return texts


def to_messages(item: Item, with_answer: bool = True) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": item.system}] if item.system else []
    for question, answer in item.history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": item.question})
    thinking = {"reasoning_content": item.reasoning} if item.reasoning else {}
    return messages + [{"role": "assistant", "content": item.answer, **thinking}] * with_answer


def make_conversation(rng: random.Random, name: str, lang: str) -> list[dict[str, str]]:
    """A conversation of the skill; now and then two exchanges follow one another, or an idle system message opens."""
    item = exchange(rng, name, lang)
    messages = to_messages(item)
    if not item.system and not item.history and rng.random() < 0.1:
        before = exchange(rng, rng.choice(["greeting", "identity", WORLD, NATURE, "arithmetic", "unknown"]), lang)
        messages = to_messages(before) + messages
    if not item.system and rng.random() < 0.025:
        idle = {"zh": "你是一个友好的小助手。", "en": "You are a friendly assistant."}[lang]
        messages.insert(0, {"role": "system", "content": idle})
    return messages


def subjects() -> dict[str, float]:
    """What is talked about, and its share of the conversations."""
    shares = {}
    for part, kinds in ((1 - PROBLEM_ROWS, SKILLS), (PROBLEM_ROWS, PROBLEMS)):
        total = sum(share for share, _ in kinds.values())
        shares |= {name: part * share / total for name, (share, _) in kinds.items()}
    return shares


def make_sft(rng: random.Random, rows: int, exclude: frozenset[str] = frozenset()) -> tuple[list[list], Counter]:
    """Conversations in the shares of SKILLS, and problems of several steps; half of each in either language; rows in
    `exclude` are drawn again."""
    conversations, counts = [], Counter()
    for name, share in subjects().items():
        for i in range(max(2, round(rows * share))):
            messages = make_conversation(rng, name, LANGUAGES[i % 2])
            for _ in range(50):  # the few small-talk rows may all be taken
                if json.dumps(messages, ensure_ascii=False) not in exclude:
                    break
                messages = make_conversation(rng, name, LANGUAGES[i % 2])
            else:
                continue
            conversations.append(messages)
            counts[name] += 1
    rng.shuffle(conversations)
    return conversations, counts


def make_heldout(rng: random.Random, skills: dict[str, tuple[float, Skill]]) -> list[dict]:
    """The scoreboard: for each skill, half Chinese and half English questions, all different."""
    rows = []
    for name, (_, make) in skills.items():
        for lang in LANGUAGES:
            asked: set[str] = set()
            for _ in range(100 * HELD_OUT_PER_SKILL):
                item = draw_item(rng, make, lang, held=True)
                messages = to_messages(item, with_answer=False)
                shown = json.dumps(messages, ensure_ascii=False)
                if shown.lower() in asked:
                    continue
                asked.add(shown.lower())
                row = {"skill": name, "conversations": messages}
                if item.declines:
                    row["declines"] = True
                elif item.must_contain:
                    row["must_contain"] = item.must_contain
                else:
                    row["answers"] = list(dict.fromkeys([item.answer, *item.accepted]))
                rows.append(row)
                if len(asked) == HELD_OUT_PER_SKILL // len(LANGUAGES):
                    break
    return rows


def make_stage(rng: random.Random, stage: str, rows: int) -> list[list]:
    """Conversations of a later stage, mixed with some of the SFT."""
    makers, shares = (
        [make for _, make in STAGES[stage].values()],
        [share for share, _ in STAGES[stage].values()],
    )
    names, weights = list(SKILLS), [share for share, _ in SKILLS.values()]
    conversations = []
    while len(conversations) < rows:
        lang = LANGUAGES[len(conversations) % 2]
        subjects, odds = (names, weights) if rng.random() < REPEATED[stage] else (makers, shares)
        messages = to_messages(exchange(rng, rng.choices(subjects, odds)[0], lang))
        # Who it was is not repeated to a model that becomes somebody else.
        if stage != "lora_identity" or not any("MiniMind" in m["content"] for m in messages if m["role"] != "user"):
            conversations.append(messages)
    return conversations


def make_long(rng: random.Random, rows: int) -> list[list]:
    """Conversations of up to a thousand tokens, of the subjects of the SFT."""
    shares = subjects()
    # With the built-in tools in view, what they can do is left to them.
    inside = {name: share for name, share in shares.items() if name != "system_prompt"}  # which can only open a chat
    beside_tools = {name: share for name, share in inside.items() if name not in CALLED | set(PROBLEMS)}
    beside_tools["identity"] *= 3  # and who it is must not be forgotten

    def opening(lang: str) -> list[dict]:
        return make_conversation(rng, rng.choices(list(shares), list(shares.values()))[0], lang)

    def one_more(lang: str, tools: bool) -> list[dict]:
        wanted = beside_tools if tools else inside
        name = rng.choices(list(wanted), list(wanted.values()))[0]
        return to_messages(exchange(rng, name, lang))

    return [long_chats.long_chat(rng, LANGUAGES[i % 2], opening, one_more) for i in range(rows)]


def make_problems(rng: random.Random, rows: int) -> list[list]:
    """Problems with worked steps; every other row is a chat that may be long and have tools."""
    names, shares = list(PROBLEMS), [share for share, _ in PROBLEMS.values()]
    half = rows // 2
    problems = [to_messages(exchange(rng, rng.choices(names, shares)[0], LANGUAGES[i % 2])) for i in range(half)]
    return [row for pair in zip(problems, make_long(rng, half), strict=True) for row in pair]


def as_typed(question: str) -> str:
    """The same for questions that differ in case, blanks and end marks alone."""
    return re.sub(r"\s+", "", question.lower()).rstrip("?？.。!！~…")


def without(kept: set[str], conversations: list[list]) -> list[list]:
    """Those in which none of the kept questions is asked: typed in short, one wording may become another."""
    return [
        messages
        for messages in conversations
        if not any(m["role"] == "user" and as_typed(m["content"]) in kept for m in messages)
    ]


def make_tools_heldout(rng: random.Random) -> list[dict]:
    """Is the right call made and its result used, is none made where none is needed, and does it know who it is?"""
    rows = stages.tool_questions(rng, 2 * HELD_OUT_PER_SKILL)
    others = {name: skill for name, skill in SKILLS.items() if name not in CALLED and name != "system_prompt"}
    for row in make_heldout(rng, others)[:: len(others) // 3]:
        conversation = [stages.TOOLS_OFFERED, *row["conversations"]]
        rows.append({"skill": "no_call", "conversations": conversation, "no_call": True})
    for row in make_heldout(rng, {"identity": SKILLS["identity"]}):
        rows.append(row | {"conversations": [stages.TOOLS_OFFERED, *row["conversations"]]})
    return rows


def beyond_tools(rng: random.Random, lang: str, held: bool) -> Item:
    """What no built-in tool can answer."""
    return draw_item(rng, rng.choice(BEYOND_TOOLS), lang, held)


def make_preferences(rng: random.Random, rows: int, held: bool) -> list[dict]:
    """Pairs that differ in the answer alone."""
    pairs = []
    while len(pairs) < rows:
        item, worse = stages.preference(rng, LANGUAGES[len(pairs) % 2], held)
        if is_held_out(item.key) == held:
            messages = to_messages(item)
            pairs.append({"chosen": messages, "rejected": messages[:-1] + [{"role": "assistant", "content": worse}]})
    return pairs


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_starter(out_dir: str | Path = DEFAULT, size: float = 1.0, seed: int = 0) -> dict[str, Counter]:
    """Writes all FILES and the stamp into out_dir; returns the number of rows by file and by skill."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / STAMP).unlink(missing_ok=True)  # an interrupted run must not look finished

    def rng_for(part: str) -> random.Random:
        return random.Random(f"{seed}/{part}")  # a string seeds by SHA-512: the same in every process

    seen: set[str] = set()
    pretrain = make_pretrain(rng_for("pretrain"), int(PRETRAIN_BYTES * size), seen)
    known = set(pretrain)
    val_bytes = int(PRETRAIN_VAL_BYTES * min(1, size))
    pretrain_val = [text for text in make_pretrain(rng_for("pretrain_val"), val_bytes, seen) if text not in known]
    heldout = make_heldout(rng_for("heldout"), SKILLS)
    kept = {as_typed(row["conversations"][0]["content"]) for row in heldout if len(row["conversations"]) == 1}
    sft, counts = make_sft(rng_for("sft"), int(SFT_ROWS * size))
    sft = without(kept, sft)
    trained = frozenset(json.dumps(messages, ensure_ascii=False) for messages in sft)
    sft_val, _ = make_sft(rng_for("sft_val"), SFT_VAL_ROWS, trained)

    write_jsonl(out_dir / "pretrain.jsonl", [{"text": text} for text in pretrain])
    write_jsonl(out_dir / "pretrain_val.jsonl", [{"text": text} for text in pretrain_val])
    write_jsonl(out_dir / "sft.jsonl", [{"conversations": messages} for messages in sft])
    write_jsonl(out_dir / "sft_val.jsonl", [{"conversations": messages} for messages in sft_val])
    write_jsonl(out_dir / "heldout.jsonl", heldout)
    write_jsonl(out_dir / "dpo.jsonl", make_preferences(rng_for("dpo"), int(PREFERENCES * size), held=False))
    write_jsonl(out_dir / "dpo_val.jsonl", make_preferences(rng_for("dpo_val"), 300, held=True))
    write_jsonl(out_dir / "tools_heldout.jsonl", make_tools_heldout(rng_for("tools_heldout")))
    write_jsonl(out_dir / "agent.jsonl", chains.make_tasks(rng_for("agent"), size, beyond_tools))
    write_jsonl(out_dir / "agent_val.jsonl", chains.make_heldout(rng_for("agent_val"), beyond_tools))
    for part, rows in (("", int(LONG_ROWS * size)), ("_val", 100)):
        conversations = without(kept, make_long(rng_for("long" + part), rows))
        write_jsonl(out_dir / f"long{part}.jsonl", [{"conversations": messages} for messages in conversations])
    for stage in STAGES:
        for part, rows in (("", int(STAGE_ROWS[stage] * size)), ("_val", 200)):
            chats = rng_for(stage + part)
            conversations = make_problems(chats, rows) if stage == "reason" else make_stage(chats, stage, rows)
            conversations = without(kept, conversations)
            write_jsonl(out_dir / f"{stage}{part}.jsonl", [{"conversations": messages} for messages in conversations])
        write_jsonl(out_dir / f"{stage}_heldout.jsonl", make_heldout(rng_for(f"{stage}_heldout"), STAGES[stage]))
    for part, rows in (("", int(reason_rl.QUESTIONS * size)), ("_val", reason_rl.HELD_OUT)):
        questions = reason_rl.make_questions(rng_for("reason_rl" + part), rows, held=part == "_val")
        write_jsonl(out_dir / f"reason_rl{part}.jsonl", [reason_rl.question_row(item) for item in questions])
    (out_dir / STAMP).write_text(json.dumps(stamp(size, seed)), encoding="utf-8")
    return {"sft": counts, "heldout": Counter(row["skill"] for row in heldout)}


def write_own(world: Path, out_dir: Path, size: float, seed: int) -> None:
    """Writes the files of a world of one's own and says what to do with them. DataError for what is missing in it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in own.make_world(world, seed, int(OWN_TEXTS * size), int(SFT_ROWS * size)).items():
        write_jsonl(out_dir / f"{name}.jsonl", rows)
        print(f"{out_dir / name}.jsonl: {len(rows):,} rows")
    for script, part, minutes in (("train_pretrain.py", "pretrain", 2), ("train_full_sft.py", "sft", 4)):
        files = f"--data_path {out_dir}/{part}.jsonl --val_path {out_dir}/{part}_val.jsonl"
        print(f"python {script} {files} --minutes {minutes}")
    print(f"python eval_model.py --model_mode 1 --score {out_dir}/heldout.jsonl")


def stamp(size: float, seed: int) -> dict:
    """What the files depend on: the generator's sources, the tables, the arguments."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.py"), *(HERE / "tables").glob("*.*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return {"sources": digest.hexdigest(), "size": size, "seed": seed}


def ensure_starter(out_dir: str | Path | None = None, size: float = 1.0, seed: int = 0) -> Path:
    """The folder with the corpus; generated when absent, incomplete or made by another version or other arguments.
    None: dataset/starter_data, or in the cache where that cannot be written to."""
    if out_dir is None:
        place = DEFAULT if DEFAULT.exists() else DEFAULT.parent
        out_dir = DEFAULT if os.access(place, os.W_OK) else default_cache_dir() / DEFAULT.name
    out_dir = Path(out_dir)
    if not is_current(out_dir, size, seed):
        out_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(out_dir / "stamp.lock"):  # two programs that begin at once make it once
            if not is_current(out_dir, size, seed):
                write_starter(out_dir, size, seed)
    return out_dir


def is_current(out_dir: Path, size: float, seed: int) -> bool:
    """Whether the folder holds all files of this version and these arguments."""
    try:
        made = json.loads((out_dir / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return made == stamp(size, seed) and all((out_dir / name).is_file() for name in FILES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the starter corpus.")
    parser.add_argument("--size", type=float, default=1.0, help="1.0 = 5 MB of text and 60,000 conversations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT, help="folder for the files")
    parser.add_argument("--world", type=Path, help="a folder with a world of your own, in place of the built-in one")
    args = parser.parse_args()
    if not 0 < args.size <= 100:
        parser.error(f"--size {args.size}: give a number above 0 and at most 100")
    start = time.perf_counter()
    if args.world is not None:
        if args.out.resolve() == DEFAULT:
            parser.error("--world needs --out FOLDER, for the files that are made of it")
        try:
            write_own(args.world, args.out, args.size, args.seed)
        except DataError as error:
            sys.exit(f"error: {error}")
        return
    try:
        counts = write_starter(args.out, args.size, args.seed)
    except OSError as error:
        sys.exit(f"error: --out {args.out}: {error.strerror}; choose a folder that can be written to")
    print(f"{'file':<28}{'rows':>8}{'bytes':>12}")
    for name in FILES:
        data = (args.out / name).read_bytes()
        print(f"{name:<28}{data.count(10):>8}{len(data):>12}")
    print(f"\n{'skill':<20}{'sft':>8}{'heldout':>12}")
    for name in SKILLS:
        print(f"{name:<20}{counts['sft'][name]:>8}{counts['heldout'][name]:>12}")
    print(f"\nwritten to {args.out} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
