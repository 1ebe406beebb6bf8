"""The starter corpus: same bytes for a seed, valid rows, a true split between training and held-out.

pytest tests/test_starter.py
"""

import json
import os
import random
import re
import string
import subprocess
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from dataset.starter import corpus as starter
from dataset.starter import skills
from dataset.starter.facts import NONE, RELATIONS, TABLES, WORDINGS, load_json, load_table
from dataset.starter.skills import number_word

ROOT = Path(__file__).resolve().parents[1]


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The corpus at full size, as a user gets it."""
    folder = tmp_path_factory.mktemp("starter")
    start = time.process_time()
    starter.write_starter(folder)
    assert time.process_time() - start < 20
    return folder


@pytest.fixture(scope="module")
def sft(corpus) -> list[list[dict]]:
    return [row["conversations"] for row in read(corpus, "sft.jsonl")]


@pytest.fixture(scope="module")
def pretrain(corpus) -> list[str]:
    return [row["text"] for row in read(corpus, "pretrain.jsonl")]


@pytest.fixture(scope="module")
def heldout(corpus) -> list[dict]:
    return read(corpus, "heldout.jsonl")


def squeeze(text: str) -> str:
    """The form in which two questions count as the same: no case, no blanks, no end mark."""
    return re.sub(r"\s+", "", text.lower()).rstrip("?？.。")


def accepted(row: dict) -> list[str]:
    return row.get("answers", [])


def is_chinese(messages: list[dict]) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", "".join(m["content"] for m in messages if m["role"] == "user")))


# --- generation ------------------------------------------------------------------------------------------------------


def test_same_bytes_in_another_process(tmp_path):
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "dataset.starter", "--size", "0.05", "--out", str(tmp_path / hash_seed)]
        subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": hash_seed}
        )
    for name in (*starter.FILES, starter.STAMP):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_seed_changes_the_text(tmp_path):
    for seed in (0, 1):
        starter.write_starter(tmp_path / str(seed), 0.02, seed)
    assert (tmp_path / "0/sft.jsonl").read_bytes() != (tmp_path / "1/sft.jsonl").read_bytes()


def test_ensure_starter_generates_once_and_again_after_a_change(tmp_path, monkeypatch):
    calls = []
    write = starter.write_starter
    monkeypatch.setattr(starter, "write_starter", lambda *args: (calls.append(args), write(*args)))
    assert starter.ensure_starter(tmp_path, 0.02) == tmp_path
    starter.ensure_starter(tmp_path, 0.02)
    assert len(calls) == 1
    (tmp_path / starter.STAMP).write_text("{}")  # made by another version
    starter.ensure_starter(tmp_path, 0.02)
    (tmp_path / "heldout.jsonl").unlink()
    starter.ensure_starter(tmp_path, 0.02)
    starter.ensure_starter(tmp_path, 0.03)
    assert len(calls) == 4


def test_two_programs_that_begin_at_once_make_it_once(tmp_path):
    program = f"""
from dataset.starter import corpus
write = corpus.write_starter
corpus.write_starter = lambda *args: (print("made"), write(*args))
assert corpus.ensure_starter({str(tmp_path)!r}, 0.02)
"""
    command = [sys.executable, "-c", program]
    programs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [program.communicate(timeout=60)[0].strip() for program in programs]
    assert sorted(said) == ["", "", "made"] and not any(program.returncode for program in programs)


def test_wrong_size_is_one_line():
    run = subprocess.run(
        [sys.executable, "-m", "dataset.starter", "--size", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2 and "--size" in run.stderr and "Traceback" not in run.stderr


# --- the files -------------------------------------------------------------------------------------------------------


def test_sizes(corpus, sft, pretrain, heldout):
    assert 4.7e6 < sum(len(text.encode()) for text in pretrain) < 5.3e6
    assert 58_000 <= len(sft) <= 62_000
    assert 250 <= len(read(corpus, "sft_val.jsonl")) <= 320
    content = [sum(len(m["content"].encode()) for m in messages) for messages in sft]
    assert 50 < sum(content) / len(content) < 150
    users = [sum(m["role"] == "user" for m in messages) for messages in sft]
    assert 0.08 < sum(n > 1 for n in users) / len(users) < 0.25 and max(users) <= 4
    assert 0.05 < sum(messages[0]["role"] == "system" for messages in sft) / len(sft) < 0.12
    assert Counter(row["skill"] for row in heldout) == dict.fromkeys(starter.SKILLS, starter.HELD_OUT_PER_SKILL)
    chinese = sum(is_chinese(row["conversations"]) for row in heldout)
    assert 0.4 < chinese / len(heldout) < 0.6


def test_conversations_are_valid(corpus, sft, heldout):
    conversations = sft + [row["conversations"] for row in read(corpus, "sft_val.jsonl")]
    for row in heldout:
        kinds = set(row) - {"skill", "conversations"}
        assert len(kinds) == 1 and kinds <= {"answers", "must_contain", "declines"}
        assert all(accepted(row))
        conversations.append(row["conversations"] + [{"role": "assistant", "content": "?"}])
    for messages in conversations:
        roles = " ".join(m["role"] for m in messages)
        assert re.fullmatch("(system )?(user assistant ?)+", roles), roles
        for text in (m["content"] for m in messages):
            assert text and text == text.strip() and not set("{}") & set(text), text
            assert text != NONE and f" {NONE}." not in text, text  # an empty cell of a table


def test_both_languages(sft, pretrain):
    assert 0.4 < sum(map(is_chinese, sft)) / len(sft) < 0.6
    chinese = sum(len(text.encode()) for text in pretrain if re.search(r"[\u4e00-\u9fff]", text))
    assert 0.4 < chinese / sum(len(text.encode()) for text in pretrain) < 0.6


# --- the split -------------------------------------------------------------------------------------------------------


def test_no_heldout_pair_is_trained_on(corpus, sft, pretrain, heldout):
    trained = set()
    for messages in sft:
        for i, message in enumerate(messages):  # every turn with its context, and every exchange by itself
            if message["role"] == "assistant":
                context = "\n".join(squeeze(m["content"]) for m in messages[:i])
                trained |= {(context, squeeze(message["content"]))}
                trained |= {(squeeze(messages[i - 1]["content"]), squeeze(message["content"]))}
    told = defaultdict(list)  # plain-text dialogues, cut where an answer begins, by the end of the question before it
    turn = "|".join(
        [r"”老师说：“", r'"theteachersaid:"', r"”.{2,3}问。妈妈回答：“", r'"asked[a-z]+\.mothersaid:"']
        + [r"\n?(?:answer:|答：|老师：|teacher:)"]
    )
    for text in pretrain:
        pieces = re.split(turn, re.sub(r"[ \t]", "", text.lower()))
        for question, answer in zip(pieces, pieces[1:], strict=False):
            question = squeeze(question)
            told[question[-6:]].append((question, squeeze(answer)))
    assert sum(map(len, told.values())) > 10_000
    for row in heldout:
        context = "\n".join(squeeze(m["content"]) for m in row["conversations"])
        for answer in accepted(row):
            assert (context, squeeze(answer)) not in trained, row
        if len(row["conversations"]) > 1 or not accepted(row):
            continue  # the context is part of the question
        question = squeeze(context)
        for asked, answer in told[question[-6:]]:
            same = re.search(r"(^|[“\":：])" + re.escape(question) + "$", asked)
            assert not (same and answer.startswith(squeeze(row["answers"][0]))), row


def pairs_in(text: str) -> set[tuple[int, int]]:
    """Unordered operand pairs of every sum and difference in a text: digits, words of both languages, word problems."""
    words_en = {number_word(n, "en"): n for n in range(100)}
    words_zh = {number_word(n, "zh"): n for n in range(100)}
    number = {**words_en, **words_zh, **{str(n): n for n in range(1000)}}
    found = re.findall(r"(\d+) ?(?:[+-]|plus|minus|加|减) ?(\d+)", text)
    found += re.findall(r"([a-z-]+) (?:plus|minus) ([a-z-]+)", text.lower())
    found += re.findall(r"([零一二三四五六七八九十]+)[加减]([零一二三四五六七八九十]+)", text)
    found += re.findall(r"has (\d+) \w+\.? (?:and|Mother) (?:buys|gives away|loses|gives \w+) (\d+)", text)
    found += re.findall(r"有 (\d+) \w+，\D{2,6} (\d+) ", text)
    return {tuple(sorted((number[a], number[b]))) for a, b in found if a in number and b in number}


@pytest.mark.slow
def test_operand_pairs_of_heldout_sums_are_never_seen(corpus, sft, pretrain, heldout):
    trained = set()
    for text in [*pretrain, *("\n".join(m["content"] for m in messages) for messages in sft)]:
        trained |= pairs_in(text)
    assert len(trained) > 180  # the table of the small numbers is there
    tested = set()
    for row in heldout:
        if row["skill"] == "arithmetic":
            found = pairs_in(row["conversations"][-1]["content"])
            assert len(found) == 1, row
            assert found <= pairs_in(" ".join(row["answers"])), row
            tested |= found
    assert len(tested) >= 10
    assert not tested & trained


def test_lists_of_heldout_are_never_seen(sft, pretrain, heldout):
    """What stands behind the last colon of a sorting, counting or reversing question occurs in no training question."""

    def list_of(question: str) -> str:
        return question.rsplit("：", 1)[-1].rsplit(": ", 1)[-1].strip(" ?？")

    trained = {(messages[-2]["content"], list_of(messages[-2]["content"])) for messages in sft}
    asked = {question for question, _ in trained}
    for row in heldout:
        question = row["conversations"][-1]["content"]
        assert row["skill"] not in ("sorting", "counting", "category") or question not in asked
    sentences = {listed for _, listed in trained} | {
        line for text in pretrain for line in re.split(r" = |：|: |\n", text)
    }
    for row in heldout:
        question = row["conversations"][-1]["content"]
        if row["skill"] == "translation" and list_of(question)[-1] in "。.":
            assert list_of(question) not in sentences, question


def test_held_out_facts_are_told_and_asked_otherwise(sft, pretrain, heldout):
    """A held-out fact must be learnable: its answer occurs in training, under other questions."""
    answers = Counter(m["content"] for messages in sft for m in messages if m["role"] == "assistant")
    text = "\n".join(pretrain)
    for row in heldout:
        if row["skill"].startswith("facts_") or row["skill"] == "opposites":
            assert answers[row["answers"][0]] >= 1 or row["answers"][0] in text, row


def test_validation_shares_no_row_with_training(corpus, sft, pretrain):
    assert not {row["text"] for row in read(corpus, "pretrain_val.jsonl")} & set(pretrain)
    trained = {json.dumps(messages) for messages in sft}
    assert not [row for row in read(corpus, "sft_val.jsonl") if json.dumps(row["conversations"]) in trained]


# --- the world -------------------------------------------------------------------------------------------------------


def test_tables_are_complete():
    names = sorted(path.stem for path in TABLES.glob("*.tsv"))
    assert len(names) >= 10
    for name in names:
        rows = load_table(name)  # raises on a row of another length
        for row in rows:
            assert all(cell and cell == cell.strip() for cell in row.values()), (name, row)
            for column in row:  # a fact is told in both languages or in none
                if column.endswith("_zh"):
                    assert (row[column] == NONE) == (row[f"{column[:-3]}_en"] == NONE), (name, row)
        if name.startswith("opposites"):
            words = [word for row in rows for word in row.values()]
            assert len(words) == len(set(words)), Counter(words).most_common(3)
        else:
            for column in ("id", "zh", "en"):
                assert len({row[column] for row in rows}) == len(rows), (name, column)
                assert NONE not in {row[column] for row in rows}


def test_questions_have_one_answer_and_enough_wordings():
    for relation in RELATIONS:
        for lang, questions in relation.questions.items():
            assert len(set(questions)) == len(questions) >= 8, relation.name
            keys = [row["k"] for row in relation.rows[lang]]
            assert len(keys) == len(set(keys)), (relation.name, lang)
            for text in [*questions, relation.answer[lang], *relation.told[lang]]:
                assert "{" in text


def test_wordings_kept_for_the_heldout_file_are_not_trained(sft):
    asked = {squeeze(m["content"]) for messages in sft for m in messages if m["role"] == "user"}
    for group in ("identity", "small_talk"):
        for lang in ("zh", "en"):
            for intent in load_json("talk")[group][lang]:
                trained, kept = intent["questions"][:-2], intent["questions"][-2:]
                assert {squeeze(q) for q in trained} & asked and not {squeeze(q) for q in kept} & asked, kept


def test_wordings_say_the_whole_question():
    """Each has the blanks of its kind, and none is one that is kept for the held-out file."""

    def blanks(template: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name}

    for relation in RELATIONS:
        thing = {"k", "ak"} if relation.name != "made" else {"k"}
        for lang, templates in relation.otherwise.items():
            kept = {squeeze(question) for question in relation.questions[lang][-2:]}
            assert all(blanks(text) & thing and squeeze(text) not in kept for text in templates), relation.name
    free = {"more": {"n", "m", "t"}, "fewer": {"n", "m", "t"}}  # a scene may have its own things
    for kind, wordings in WORDINGS.items():
        if kind != "facts":
            for templates in wordings.values():
                wanted = set().union(*map(blanks, templates)) - free.get(kind, set())
                assert all(wanted <= blanks(text) for text in templates), kind
                assert len(set(templates)) == len(templates) >= 20, kind


def parts(text: str) -> list[str]:
    return re.findall(r"[^\s,，、]+", text)


def test_answers_are_computed_right(sft):
    """Sums, products, comparisons, reversals and sorted lists, checked from the text alone."""
    checked = Counter()
    for messages in sft:
        question = unicodedata.normalize("NFKC", messages[-2]["content"])  # digits may be typed wide
        answer = messages[-1]["content"]
        if re.fullmatch(r"(\d+ [+×-] \d+ = \d+(, )?)+", answer):
            for step in answer.split(", "):  # every step of a worked sum, and at its end what was asked for
                left, right = step.replace("×", "*").split(" = ")
                assert eval(left) == int(right) >= 0, answer
            if asked := re.search(r"\d+ [+×-] \d+", question):
                assert eval(asked[0].replace("×", "*")) == int(right), (question, answer)
            checked["sum"] += 1
        elif match := re.fullmatch(r"(\d+) ([<>]) (\d+)(?:, so |，)(\d*)(.+)", answer):
            pair = [int(match[1]), int(match[3])]
            assert (pair[0] < pair[1]) == (match[2] == "<"), answer
            if match[4]:
                assert int(match[4]) == (max if re.search("larger|大", match[5]) else min)(pair), answer
            checked["compare"] += 1
        elif match := re.fullmatch(
            r"(?:Reverse|Reverse the order|Say it backwards|把它倒过来|倒着说|反过来写)[:：] ?(.+)", question
        ):
            assert parts(answer) == parts(match[1])[::-1], question
            checked["reverse"] += 1
        elif re.fullmatch(r"\d+(?:, \d+)+", answer) and re.search(r"\d", question):  # not 'the other way round'
            numbers = [int(n) for n in answer.split(", ")]
            up = sorted(int(n) for n in re.findall(r"\d+", question))
            assert numbers in (up, up[::-1]), question
            if way := re.search("(large to small|high to low|从大到小)|(small to large|从小到大)", question):
                assert (numbers == up) == bool(way[2]), question
            checked["sort"] += 1
    assert min(checked[kind] for kind in ("sum", "compare", "reverse", "sort")) > 200, checked


@pytest.mark.parametrize(
    ("lang", "told"),
    [
        ("en", r"([A-Z]\w+)(?: is|'s tower has) (\d+)"),
        ("zh", r"(?:，|^)(\w+?)(?:今年|堆的积木有) (\d+)"),
    ],
)
def test_the_older_and_the_taller_are_those_of_the_larger_number(lang, told):
    rng, seen = random.Random(0), 0
    for _ in range(400):
        item = skills.comparing(rng, lang, held=False)
        if len(people := re.findall(told, item.question)) == 2:
            winner = max(people, key=lambda person: int(person[1]))[0]
            assert re.search(rf"(, so |，){winner}", item.answer), item
            seen += 1
    assert seen > 40
