"""Held-out questions: which answers and calls are right, which files are refused: `pytest tests/test_heldout.py`."""

import json

import pytest

from dataset.jsonl import DataError
from evaluation.scoreboard import Question, count_right, read_heldout
from model.inference.tools import SCHEMAS
from tests.spelled import message_of


@pytest.mark.parametrize(
    ("answer", "right", "exact"),
    [
        (" Paris.\n", True, False), ("paris", True, False), ("PARIS。", True, False), ("Paris..", False, False),
        ("Paris!", False, False), ("It is Paris", False, False), ("", False, False),
        ("Paris", True, True), ("Paris.", True, True), ("paris", False, True),
    ],
)  # fmt: skip
def test_what_counts_as_right(answer, right, exact):
    assert Question(1, "capital", [], "answers", ["London", "Paris."], exact).is_right(message_of(answer)) is right


@pytest.mark.parametrize(
    ("kind", "right", "answers"),
    [
        ("must_contain", ["cat", "Lamp"], {"A cat, a lamp.": True, "A cat.": False}),
        ("must_contain_one", ["Thu", "周四"], {"thursday": True, "是周四。": True, "Friday": False}),
        (
            "declines",
            True,
            {"Sorry, I don’t know.": True, "这个我不会，我会算术。": True, "It is 4.": False, "": False},
        ),
        (
            "no_call",
            True,
            {"It is 4.": True, "": False, '<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>': False},
        ),
    ],
)
def test_other_kinds_of_right(kind, right, answers):
    question = Question(1, "any", [], kind, right, False)
    assert {answer: question.is_right(message_of(answer)) for answer in answers} == answers


def test_declining_what_could_be_known_is_counted():
    questions = [Question(1, "in", [], "answers", ["Paris"], False), Question(2, "out", [], "declines", True, False)]
    counts = count_right(questions, [message_of("I don't know."), message_of("I don't know.")])
    assert (counts["correct"], counts["false_declines"], counts["knowable"]) == (1, 1, 1)


CALL = {"name": "calculator", "arguments": {"expression": "1 + 1"}}


def block(call) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (block(CALL), True),
        ('<tool_call>{"arguments":{"expression":"1 + 1"},"name":"calculator"}</tool_call>', True),
        ("I reckon: " + block(CALL), True),
        (block(CALL) * 2, False),
        (block(CALL) + "<tool_call>", False),
        (block({**CALL, "arguments": {"expression": "1 + 2"}}), False),
        (block({**CALL, "arguments": {"expression": "1 + 1", "x": 1}}), False),
        (block({**CALL, "name": "calculate"}), False),
        (json.dumps(CALL), False),
        ("1 + 1 = 2", False),
        ("", False),
    ],
)
def test_which_call_is_right(answer, right):
    assert Question(1, "tools", [], "call", CALL, False).is_right(message_of(answer)) is right


def test_arguments_are_compared_as_json_values():
    call = {"name": "x", "arguments": {"value": 3, "on": True, "list": [1, {"a": None}]}}
    question = Question(1, "tools", [], "call", call, False)
    cases = {"3.0": True, "3": True, "4": False, '"3"': False, "true": False}
    for value, right in cases.items():
        assert question.is_right(message_of(block(call).replace("3", value))) is right
    assert not question.is_right(message_of(block(call).replace("true", "1")))
    assert not question.is_right(message_of(block(call).replace("null", "0")))


def asks(*after: dict, **expected) -> str:
    """A line with a question for the calculator."""
    messages = [{"role": "system", "content": "", "tools": json.dumps(SCHEMAS)}, {"role": "user", "content": "?"}]
    return json.dumps({"skill": "tools", "conversations": [*messages, *after], **expected})


def test_questions_with_tools_are_read(tmp_path):
    """A call is asked for; or an answer, once the result is there."""
    call = {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}
    rows = [asks(call=CALL), asks(call, {"role": "tool", "content": '{"result": 2}'}, answers=["2"])]
    (tmp_path / "heldout.jsonl").write_text("\n".join(rows), encoding="utf-8")
    first, second = read_heldout(tmp_path / "heldout.jsonl")
    assert first.right == CALL and json.loads(first.expected) == CALL
    assert second.is_right(message_of("2.")) and second.messages[2]["content"] is None


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"skill": "x"', "line 2: invalid JSON"),
        ('{"conversations": [{"role": "user", "content": "?"}], "answers": ["a"]}', '"skill"'),
        ('{"skill": "x", "answers": ["a"]}', '"conversations"'),
        (
            '{"skill": "x", "conversations": [{"role": "user"}], "answers": ["a"]}',
            "message 1: content is missing or null",
        ),
        ('{"skill": "x", "conversations": [{"role": "user", "content": "?"}]}', 'needs one of "answers"'),
        ('{"skill": "x", "conversations": [{"role": "user", "content": "?"}], "answers": "a"}', "list of strings"),
        ('{"skill": "x", "conversations": [{"role": "assistant", "content": "?"}], "answers": ["a"]}', "the user's"),
        (asks(call=CALL, answers=["2"]), "needs one of"),
        (asks(call={}), "call: must be"),
        (asks(call="1 + 1"), "call: must be"),
        (asks(call={"name": "calculator"}), "call: must be"),
        (asks(call={**CALL, "arguments": "{}"}), "call: must be"),
        (asks(call={**CALL, "name": ""}), 'call: call 1 has no "name"'),
        (asks(call={**CALL, "name": "rm"}), 'calls "rm", which tools does not list'),
        (asks({"role": "tool", "content": "2"}, answers=["2"]), "a tool message without a call"),
        (asks({"role": "assistant", "tool_calls": "[{"}, answers=["2"]), "message 3: tool_calls: not valid JSON"),
        (asks({"role": "assistant", "tool_calls": [CALL]}, answers=["2"]), "or a tool's result"),
    ],
)
def test_faults_of_a_heldout_file_name_the_line(tmp_path, line, fault):
    path = tmp_path / "heldout.jsonl"
    good = '{"skill": "x", "conversations": [{"role": "user", "content": "?"}], "answers": ["a"]}'
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2") as caught:
        read_heldout(path)
    assert fault in str(caught.value)
