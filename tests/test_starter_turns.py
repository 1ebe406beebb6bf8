"""The starter corpus' follow-ups: what is asked in short is answered with what was said before.

pytest tests/test_starter_turns.py
"""

import random
import re

import pytest

from dataset.starter import long_chats, turns
from dataset.starter.facts import RELATIONS
from dataset.starter.skills import person

DRAWS = 400


def drawn(kind, lang: str, held: bool = False):
    rng = random.Random(f"{kind}/{lang}")
    return [kind(rng, lang, held) for _ in range(DRAWS)]


def meanings(answer: str, lang: str) -> set[tuple[str, str]]:
    """(relation, thing) of all facts that an answer states."""
    return {
        (relation.name, row["id"])
        for relation in RELATIONS
        for row in relation.rows.get(lang, [])
        if relation.fill(relation.answer[lang], row) == answer
    }


@pytest.mark.parametrize("lang", ["zh", "en"])
@pytest.mark.parametrize("held", [False, True])
def test_a_fact_goes_on_to_the_same_of_another_thing_or_another_of_the_same(lang, held):
    for item in drawn(turns.facts, lang, held):
        answers = [answer for _, answer in item.history] + [item.answer]
        for before, after in zip(answers, answers[1:], strict=False):
            pairs = [(a, b) for a in meanings(before, lang) for b in meanings(after, lang)]
            assert any((a[0] == b[0]) != (a[1] == b[1]) for a, b in pairs), item
        assert "{" not in item.question


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_what_the_user_said_is_what_is_answered(lang):
    names = set()
    for item in drawn(turns.told, lang):
        pattern = "|".join(re.escape(about["answer"]).replace(r"\{\}", "(.+)") for about in turns.TOLD[lang])
        (thing,) = (part for part in re.fullmatch(pattern, item.answer).groups() if part)
        assert any(thing in question for question, _ in item.history), item
        names.add(thing)
    assert len(names) > DRAWS / 5  # they cannot be learnt by heart


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_what_was_told_early_in_a_long_chat_is_asked_late(lang):
    rng = random.Random(lang)
    opening = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    chats = [long_chats.long_chat(rng, lang, lambda lang: opening, lambda lang, tools: opening) for _ in range(300)]
    pattern = "|".join(
        re.escape(about["answer"]).replace(r"\{\}", "(.+)") for told in turns.TOLD.values() for about in told
    )
    far = 0
    for chat in (chat for chat in chats if len(chat) > 2):
        for i, message in enumerate(chat):
            if message["role"] == "assistant" and (match := re.fullmatch(pattern, message.get("content") or "")):
                (thing,) = (part for part in match.groups() if part)
                where = [j for j in range(i) if thing in chat[j]["content"]]
                assert where, (thing, chat)
                far += i - where[0] > 8
    assert far > 20


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_of_several_things_told_the_one_asked_for_is_answered(lang):
    rng = random.Random(lang)
    for _ in range(DRAWS):
        user = turns.User(rng, lang)
        while len(user.known) < 4:
            opening, reply = user.tell()
            thing = user.known[-1][1]
            assert thing in opening and thing.lower() in reply.lower(), (opening, reply)
        assert len({id(kind) for kind, _ in user.known}) == len(user.known)  # no kind twice: one answer
        question, answer = user.ask()
        assert [answer] == [kind["answer"].format(thing) for kind, thing in user.known if question in kind["asked"]]


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_sums_lists_and_days_go_on_from_the_answer(lang):
    rng, forms = random.Random(1), turns.AGAIN[lang]
    for _ in range(DRAWS):
        item = turns.summed_on(rng, lang)
        start, asked = (re.findall(r"\d+", text) for text in (item.history[0][1], item.question))
        numbers = [int(n) for n in ([start[-1], *asked] if len(asked) == 1 else asked)]
        minus = len(asked) == 1 and item.question in [form.format(asked[0]) for form in forms["minus"]]
        assert int(re.findall(r"\d+", item.answer)[-1]) == numbers[0] + numbers[1] * (-1 if minus else 1), item
        item = turns.turned(rng, lang)
        assert item.answer.split(", ") == item.history[0][1].split(", ")[::-1]
        item = turns.onwards(rng, lang)
        known = item.history[0][1].rstrip("。.").split("是" if lang == "zh" else " is ")[-1]
        assert known in item.answer and not item.answer.rstrip("。.").endswith(known), item
        item = turns.compared(rng, lang)
        before, after = (re.findall(r"\d+", text) for text in (item.history[0][1], item.answer))
        assert after[:2] == before[:2] and {after[2], before[2]} == set(before[:2]), item


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_the_same_task_is_another_one(lang):
    for item in drawn(turns.same_skill, lang):
        assert item.question not in item.history[0][0] and item.answer


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_people_have_many_names(lang):
    rng = random.Random(0)
    assert len({person(rng, lang) for _ in range(1000)}) > 300
