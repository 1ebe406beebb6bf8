"""Requests, answers and grammars of the server, without HTTP: `pytest tests/test_server_parts.py`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataset.chat import (
    END_THINK_ID,
    END_TOOL_CALL_ID,
    EOS_ID,
    THINK_ID,
    TOOL_CALL_ID,
    load_tokenizer,
    render_chat,
)
from model.inference.tools import SCHEMAS
from server.deltas import ChatAnswer
from server.errors import ApiError
from server.grammars import Grammars
from server.messages import conversation
from server.reading import read_body
from server.replies import add_delta
from server.schemas import AnswerFormat, ChatRequest, CompletionRequest

TOKENIZER = load_tokenizer()
CALLS = [
    {"name": "calculator", "arguments": {"expression": "1 + 1"}},
    {"name": "add_days", "arguments": {"date": "2026-01-01", "days": 3}},
]


def message(ids: list[int], **options) -> dict:
    """What a client puts together from the deltas, and how many there were."""
    answer = ChatAnswer(TOKENIZER, **options)
    whole = {}
    for delta in [*(delta for token in ids for delta in answer.push(token)), *answer.close()]:
        add_delta(whole, delta)
    return whole


def rendered(message: dict) -> list[int]:
    """The ids that a model gives which answers exactly so."""
    ids, mask = render_chat(TOKENIZER, [{"role": "user", "content": "?"}, message])
    return [token for token, own in zip(ids, mask, strict=True) if own and token != EOS_ID]


@pytest.mark.parametrize("reasoning", ["", "It says: one\n\nand two."])
@pytest.mark.parametrize("content", ["", "The answer 答案 is 🐱.\n  - two", " indented"])
@pytest.mark.parametrize("calls", [[], CALLS[:1], CALLS])
def test_what_is_rendered_is_taken_apart_again(reasoning, content, calls):
    whole = message(
        rendered({"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}),
        tools=True,
    )
    assert whole.get("reasoning_content", "") == reasoning
    assert whole.get("content", "") == (content.strip() if reasoning else content)
    functions = [call["function"] for call in whole.get("tool_calls", [])]
    assert [{**f, "arguments": json.loads(f["arguments"])} for f in functions] == calls
    assert len({call["id"] for call in whole.get("tool_calls", [])}) == len(calls)


def test_markers_spelt_out_are_text_and_real_ones_are_never_shown():
    text = "<think>a</think><tool_call>{}</tool_call><|im_end|>"
    ids = TOKENIZER.encode(text).ids
    assert message(ids, tools=True) == {"content": text}
    call = TOKENIZER.encode('{"name": "f", "arguments": {"x": "</tool_call>"}}').ids
    ids = [TOOL_CALL_ID, *call, END_TOOL_CALL_ID]
    (made,) = message(ids, tools=True)["tool_calls"]
    assert json.loads(made["function"]["arguments"]) == {"x": "</tool_call>"}
    assert message(ids) == {"content": '{"name": "f", "arguments": {"x": "</tool_call>"}}'}  # no tools: only text
    broken = [TOOL_CALL_ID, *TOKENIZER.encode('\n{"name": "f"').ids]
    assert message(broken, tools=True) == {"content": '{"name": "f"'}
    assert message([THINK_ID, END_THINK_ID, TOOL_CALL_ID, 7, 8]) == {}


def test_stop_strings_end_the_content_alone():
    ids = [*TOKENIZER.encode("a STOP b").ids, END_THINK_ID, *TOKENIZER.encode("\n\nc ST d STOP e").ids]
    whole = message(ids, thinking=True, stop=["STOP"])
    assert whole == {"reasoning_content": "a STOP b", "content": "c ST d "}
    answer = ChatAnswer(TOKENIZER, ["STOP"])
    for token in TOKENIZER.encode("x STO").ids:
        answer.push(token)
    assert not answer.stopped and answer.close() == [{"content": " STO"}]


def test_no_piece_of_an_answer_is_half_a_character():
    answer, pieces = ChatAnswer(TOKENIZER), []
    for token in TOKENIZER.encode("🐱 龘 🐶").ids:
        pieces += answer.push(token)
    text = "".join(piece["content"] for piece in pieces)
    assert text == "🐱 龘 🐶" and "\ufffd" not in text


# ------------------------------------------------------------------------------------------------ grammars


def follow(constraint, ids: list[int]) -> bool:
    """Whether the constraint allows these tokens, one after the other."""
    for token in ids:
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return True


def test_grammars_allow_what_they_should_and_nothing_else():
    grammars = Grammars(TOKENIZER, 6400 + 10)  # a model's vocabulary may be larger
    encode = lambda text: TOKENIZER.encode(text).ids  # noqa: E731
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = AnswerFormat("json", schema, "x")
    plain = grammars.answer(wanted, thinking=False)
    assert follow(plain.copy(), encode('{"a": 12}')) and not follow(plain.copy(), encode('{"a": "b"}'))
    assert not follow(plain.copy(), [TOOL_CALL_ID]) and not follow(plain.copy(), encode("{\n"))
    ended = plain.copy()
    follow(ended, encode('{"a": 12}'))
    assert not ended.failed and set(ended.mask().nonzero()[:, 0].tolist()) <= {EOS_ID}
    thoughtful = grammars.answer(wanted, thinking=True)
    assert follow(thoughtful.copy(), [*encode("well, {"), END_THINK_ID, *encode('\n\n{"a": 1}')])
    calls = grammars.call(SCHEMAS, thinking=False)
    call = [TOOL_CALL_ID, *encode("\n" + json.dumps(CALLS[0]) + "\n"), END_TOOL_CALL_ID]
    assert follow(calls.copy(), call) and not follow(calls.copy(), encode("I"))
    assert not follow(calls.copy(), [TOOL_CALL_ID, *encode('\n{"name": "other')])
    either = grammars.answer(wanted, thinking=False, tools=SCHEMAS)
    assert follow(either.copy(), call) and follow(either.copy(), encode('{"a": 1}'))


def test_a_schema_cannot_leave_its_rule():
    grammars = Grammars(TOKENIZER, 6400)
    name = '"\nstart: /.*/\n%json {'
    tricky = {"type": "object", "properties": {name: {"const": "\n\u2028"}}, "required": [name]}
    constraint = grammars.answer(AnswerFormat("json", tricky, "x"), thinking=False)
    assert not constraint.mask()[TOKENIZER.encode("hello").ids[0]]


# ------------------------------------------------------------------------------------------------ requests


def chat(**fields) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return read_body(json.dumps(body).encode(), ChatRequest)


def test_tool_results_stand_in_the_order_of_their_calls():
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": f'{{"n": {n}}}'}} for n in range(3)
    ]
    results = [
        {"role": "tool", "tool_call_id": f"c{n}", "content": [{"type": "text", "text": str(n)}]} for n in (2, 0, 1)
    ]
    request = chat(messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls}, *results])
    turns = conversation(request.messages)
    assert [m["content"] for m in turns] == ["hi", "", "0", "1", "2"]
    assert turns[1]["tool_calls"][2] == {"name": "f", "arguments": {"n": 2}}


@pytest.mark.parametrize("field", [*ChatRequest.model_fields, *CompletionRequest.model_fields])
def test_every_field_of_a_wrong_type_is_named(field):
    kind, body = ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    if field not in ChatRequest.model_fields:
        kind, body = CompletionRequest, {"model": "m", "prompt": "hi"}
    refused = 0
    for value in ([[]], {"a": {}}, "x" * 300, True, -1e9, float("nan"), float("inf"), [None], {"": "\x00"}, "\ud800"):
        try:
            read_body(json.dumps(body | {field: value}).encode(), kind)
        except ApiError as error:
            assert error.status == 400
            assert (error.param or "").startswith(field) or error.param == "stream_options", (value, error.body())
            refused += 1
    assert refused >= (1 if kind.model_fields[field].annotation is Any else 4)


@pytest.mark.parametrize("script", ["serve_openai_api", "eval_model"])
def test_scripts_that_answer_load_nothing_of_training(script):
    """Neither the trainer nor the starter corpus with its tables."""
    program = f"import sys, {script}; print(*sys.modules)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True)
    loaded = [name for name in done.stdout.split() if name.startswith(("trainer", "train_", "dataset.starter"))]
    assert loaded == [] and "model.inference.chatbot" in done.stdout.split()
