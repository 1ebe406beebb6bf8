"""The starter corpus' files for the stages after SFT: valid, true, and held out for real.

pytest tests/test_starter_stages.py
"""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from dataset.checks import conversation_faults, preference_faults
from dataset.starter import corpus as starter
from dataset.starter import long_chats
from dataset.starter.words import WEEKDAYS
from evaluation.scoreboard import read_heldout
from model.inference.tools import run_tool

STAGES = (*starter.STAGES, "tools")  # those with held-out questions


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """All files but the pretraining text and the SFT, small."""
    folder = tmp_path_factory.mktemp("stages")
    starter.write_starter(folder, 0.1)
    return folder


def read(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text.lower()).rstrip("?？.。")


@pytest.mark.parametrize("stage", starter.STAGES)
def test_rows_are_valid_and_in_both_languages(corpus, stage):
    for part in ("", "_val"):
        rows = read(corpus, stage + part)
        assert len(rows) >= 90
        assert [fault for row in rows for fault in conversation_faults(row)] == []
        chinese = sum(bool(re.search("[\u4e00-\u9fff]", row["conversations"][-1]["content"])) for row in rows)
        assert 0.15 < chinese / len(rows) < 0.75
    assert len(read_heldout(corpus / f"{stage}_heldout.jsonl")) >= 16


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_questions_were_never_trained_with_their_answer(corpus, stage):
    """In the stage's own rows, and in the SFT before it."""
    trained = set()
    for row in [*(read(corpus, stage) if stage in starter.STAGES else []), *read(corpus, "sft"), *read(corpus, "long")]:
        messages = row["conversations"]
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                answer = message.get("tool_calls") or message["content"]
                trained.add((squeeze(messages[i - 1]["content"]), squeeze(answer)))
    for row in read(corpus, f"{stage}_heldout"):
        question = squeeze(row["conversations"][-1]["content"])
        if row.get("no_call"):
            continue  # what counts is that nothing is called
        if "call" in row:
            assert (question, squeeze(json.dumps([row["call"]]))) not in trained
        elif row["skill"] != "result":  # its last message is the tool's: the pair of call and result is new
            assert not any((question, squeeze(answer)) in trained for answer in row["answers"]), row


def test_held_out_pairs_are_new_and_differ_in_the_answer_alone(corpus):
    train, held = read(corpus, "dpo"), read(corpus, "dpo_val")
    for row in train + held:
        assert preference_faults(row) == []
    pairs = {tuple(squeeze(row[side][-1]["content"]) for side in ("chosen", "rejected")) for row in train}
    questions = {squeeze(row["chosen"][-2]["content"]) for row in train}
    assert len(held) == 300
    for row in held:
        new_question = squeeze(row["chosen"][-2]["content"]) not in questions
        assert new_question or tuple(squeeze(row[side][-1]["content"]) for side in ("chosen", "rejected")) not in pairs


def test_every_step_of_the_reasoning_is_true_and_leads_to_the_answer(corpus):
    thinking = 0
    for row in read(corpus, "reason"):
        answer = row["conversations"][-1]
        steps = answer.get("reasoning_content")
        if not steps or steps in sum(starter.THOUGHTS.values(), []):
            continue
        thinking += 1
        for left, right in re.findall(r"([\d ×+-]+) = (\d+)", steps):
            assert eval_sum(left) == int(right), steps
        days = re.findall(r"(\d+) (\w+)", steps) if "=" not in steps else []
        for (n, day), (m, following) in zip(days, days[1:], strict=False):
            ring = next(ring for ring in WEEKDAYS.values() if day in ring)
            assert int(m) == int(n) + 1 and following == ring[(ring.index(day) + 1) % 7]
        if compared := re.search(r"(\d+) ([<>]) (\d+)$", steps):
            assert (int(compared[1]) < int(compared[3])) == (compared[2] == "<"), steps
            continue
        end = re.findall(r"= (\d+)$", steps) or [days[-1][1]]
        assert end[0] == answer["content"], steps
    assert thinking > 500


def eval_sum(text: str) -> int:
    """Products before sums, by hand."""
    total = Fraction(0)
    for sign, term in re.findall(r"([+-]?)\s*((?:\d+)(?:\s*×\s*\d+)*)", text):
        value = Fraction(1)
        for factor in re.findall(r"\d+", term):
            value *= int(factor)
        total += -value if sign == "-" else value
    return int(total)


def test_tool_results_are_those_of_the_tools(corpus):
    calls = chained = failed = 0
    for row in read(corpus, "long"):
        messages = row["conversations"]
        for i, message in enumerate(messages):
            if message.get("tool_calls"):
                (call,) = json.loads(message["tool_calls"])
                assert messages[i + 1] == {"role": "tool", "content": run_tool(**call)}
                result = json.loads(messages[i + 1]["content"], parse_float=str)
                calls += 1
                if messages[i + 2].get("tool_calls"):
                    chained += 1
                    failed += "error" in result
                else:
                    assert str(result["result"]) in messages[i + 2]["content"]
    assert calls > 100 and chained > 10 and failed > 1 and chained < calls / 2


def test_the_new_identity_is_nobody_else(corpus):
    """Its rows say the new name where it is asked for, and never the old one."""
    rows = [row["conversations"] for row in read(corpus, "lora_identity")]
    said = [m["content"] for messages in rows for m in messages if m["role"] == "assistant"]
    assert not any("MiniMind" in text for text in said)
    assert sum("小雨" in messages[-1]["content"] or "Rain" in messages[-1]["content"] for messages in rows) > 50


def test_long_chats_are_long_and_short_and_show_functions(corpus):
    """Whole conversations that end with an answer, most of one exchange; the others fill a context, and in a part of
    them functions stand first. Nothing in them is a held-out question with its answer."""
    rows = read(corpus, "long")
    assert all(fault.level != "error" for row in rows for fault in conversation_faults(row))
    sizes = [long_chats.size(row["conversations"]) for row in rows]
    assert 0.6 < sum(size < 300 for size in sizes) / len(rows) < 0.9 and sum(size > 1500 for size in sizes) > 20
    listing = sum(bool(row["conversations"][0].get("tools")) for row in rows) / len(rows)
    assert abs(listing - (1 - long_chats.SHORT) * long_chats.WITH_FUNCTIONS) < 0.05
    asked = {json.dumps(row["conversations"]): row.get("answers", []) for row in read(corpus, "tools_heldout")}
    for row in rows:
        assert row["conversations"][-1]["role"] == "assistant"
        assert json.dumps(row["conversations"][:-1]) not in asked
