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
from model.inference.chatbot import AnswerSettings, Chatbot
from model.inference.tools import SCHEMAS
from server.deltas import ChatAnswer
from server.errors import ApiError
from server.grammars import Grammars
from server.messages import conversation
from server.reading import parse_body, read_body
from server.replies import add_delta
from server.schemas import AnswerFormat, ChatRequest, CompletionRequest
from server.service import Service, Settings

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


# ------------------------------------------------------------------------------------------------ calls


def written(call: dict) -> list[int]:
    return [TOOL_CALL_ID, *TOKENIZER.encode("\n" + json.dumps(call) + "\n").ids, END_TOOL_CALL_ID]


def test_calls_that_the_model_makes_come_in_pieces():
    pieces = []
    answer = ChatAnswer(TOKENIZER, tools=True, eager=True)
    for token in written(CALLS[1]):
        pieces += answer.push(token)
    assert len(pieces) > 5 and "id" not in pieces[1]["tool_calls"][0]
    whole = message(written(CALLS[0]) + written(CALLS[1]), tools=True, eager=True)
    assert [json.loads(call["function"]["arguments"]) for call in whole["tool_calls"]] == [
        c["arguments"] for c in CALLS
    ]
    # Not a call after all: content, unless its beginning has gone out already.
    broken = [TOOL_CALL_ID, *TOKENIZER.encode('{"name": "f", "arguments": {"x": 1 + 1}}').ids, END_TOOL_CALL_ID]
    assert message(broken, tools=True) == {"content": '{"name": "f", "arguments": {"x": 1 + 1}}'}
    assert message(broken, tools=True, eager=True)["tool_calls"][0]["function"]["arguments"] == '{"x": 1 + 1}'


def test_a_call_that_is_cut_off_has_the_arguments_so_far():
    ids = [TOOL_CALL_ID, *TOKENIZER.encode('\n{"name": "f", "arguments": {"x": "}\\"{').ids]
    for eager in (False, True):
        answer, whole = ChatAnswer(TOKENIZER, tools=True, eager=eager), {}
        for delta in [*(delta for token in ids for delta in answer.push(token)), *answer.close(cut=True)]:
            add_delta(whole, delta)
        (call,) = whole["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": '{"x": "}\\"{'} and "content" not in whole


def test_one_call_is_enough_without_parallel_calls():
    answer = ChatAnswer(TOKENIZER, tools=True, parallel=False)
    for token in written(CALLS[0]):
        assert not answer.stopped
        answer.push(token)
    assert answer.stopped and answer.calls == 1


# ------------------------------------------------------------------------------------------------ schemas

TEXT = {"type": "string"}


def thing(**properties) -> dict:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    "schema, good, bad",
    [
        (thing(a=TEXT), ['{"a": "x"}', "{}"], ['{"a": "x", "b": 1}', '{"b": 1}']),
        (thing(a=thing(b=TEXT)), ['{"a": {"b": "x"}}'], ['{"a": {"c": "x"}}']),
        ({"type": "array", "items": thing(a=TEXT)}, ['[{"a": "x"}]'], ['[{"b": "x"}]']),
        (thing(a=TEXT) | {"additionalProperties": True}, ['{"a": "x", "b": 1}'], []),
        (thing(a=TEXT) | {"required": ["a", "b"]}, ['{"a": "x", "b": 1}'], ['{"a": "x", "c": 1}']),
        (thing(), ["{}"], ['{"a": 1}']),
        ({"type": "object"}, ['{"a": 1}'], []),
        ({"anyOf": [thing(a=TEXT), thing(b=TEXT)]}, ['{"a": "x"}', '{"b": "x"}'], ['{"c": 1}', '{"a": "x", "b": "x"}']),
        (
            {"allOf": [thing(a=TEXT) | {"required": ["a"]}, {"$ref": "#/$defs/B"}],
             "$defs": {"B": thing(b=thing(c=TEXT))}},
            ['{"a": "x", "b": {"c": "x"}}', '{"a": "x"}'],
            ['{"a": "x", "z": 1}', '{"a": "x", "b": {"z": 1}}', '{"b": {}}'],
        ),
        (
            thing(k=TEXT) | {"anyOf": [thing(a=TEXT), thing(b=TEXT)]},
            ['{"k": "x", "a": "x"}'],
            ['{"k": "x", "z": "x"}'],
        ),
        ({"$ref": "#/$defs/N", "$defs": {"N": thing(n={"$ref": "#/$defs/N"})}},
         ['{"n": {"n": {}}}'], ['{"n": {"m": 1}}']),
        ({"const": {"properties": {"a": 1}}}, ['{"properties": {"a": 1}}'], []),
        (thing(a={"type": "array", "uniqueItems": True, "contains": TEXT}), ['{"a": [1, 1]}'], ['{"a": 1}']),
        ({"type": "string", "pattern": "^(?=.*a)b", "minLength": 2}, ['"xy"'], ['"x"']),
        ({"type": "string", "format": "cat"}, ['"x"'], ["1"]),
        (thing(a=TEXT) | {"propertyNames": {"pattern": "q"}, "not": {}, "if": {}, "then": {}}, ['{"a": "x"}'], []),
        ({"type": "integer"}, ["-123456789012345"], ["1234567890123456", "1.5"]),
        ({"type": "number", "minimum": 0}, ["0.123456789", "12"], ["0.1234567891", "-1"]),
    ],
)  # fmt: skip
def test_schemas_are_closed_and_lose_what_no_grammar_can_hold(schema, good, bad):
    wanted = AnswerFormat("json", schema, "x")
    constraint = Grammars(TOKENIZER, 6400).answer(wanted, thinking=False)
    for text in good + bad:
        own = constraint.copy()
        assert (follow(own, TOKENIZER.encode(text).ids) and own.matcher.is_accepting()) == (text in good), text


def test_a_schema_that_doubles_at_each_reference_is_refused():
    definitions = {"D0": thing(x=TEXT)}
    for n in range(40):
        definitions[f"D{n + 1}"] = {"allOf": [{"$ref": f"#/$defs/D{n}"}] * 2}
    schema = {"$ref": "#/$defs/D40", "$defs": definitions}
    for faulty in (schema, {"allOf": 5}, {"properties": 5}, {"required": 5, "properties": {}}, {"$ref": "#/nowhere"}):
        with pytest.raises(ApiError) as error:
            Grammars(TOKENIZER, 6400).answer(AnswerFormat("json", faulty, "x"), thinking=False)
        assert error.value.status == 400 and error.value.param == "x"


def test_what_is_left_out_of_schemas_is_told_once(capfd):
    schema = thing(a={"type": "array", "uniqueItems": True}, b={"type": "string", "pattern": "(?!told)"})
    for _ in range(2):
        Grammars(TOKENIZER, 6400).answer(AnswerFormat("json", schema, "x"), thinking=False)
    assert capfd.readouterr().err.count("(?!told)") == 1


def test_a_tool_without_parameters_takes_none():
    constraint = Grammars(TOKENIZER, 6400).call([{"type": "function", "function": {"name": "f"}}], thinking=False)
    assert follow(constraint.copy(), written({"name": "f", "arguments": {}}))
    assert not follow(constraint.copy(), written({"name": "f", "arguments": {"a": 1}}))


def test_without_tools_none_can_be_called(tiny, tmp_path):
    """A call would be read as text. Who biases the marker, or asks to see markers, knows better."""
    bot = Chatbot(tmp_path / "x.pth", tiny(vocab_size=6400), TOKENIZER, 512, AnswerSettings())
    service = Service(bot, [], Settings("x", 0.7, 1.0, None, None, None))

    def bias(**more) -> float | None:
        body = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], **more}
        _, job = service.prepare_chat(json.dumps(body).encode())
        return job.choices[0].params.logit_bias.get(TOOL_CALL_ID)

    assert bias() == bias(tools=SCHEMAS, tool_choice="none") == -100
    assert bias(tools=SCHEMAS) is None and bias(skip_special_tokens=False) is None
    assert bias(logit_bias={TOOL_CALL_ID: 3}) == 3


def test_an_integer_that_python_does_not_read_is_named_as_such():
    with pytest.raises(ApiError, match="an integer of more than 4,300 digits"):
        parse_body(b'{"n": ' + b"9" * 10_000 + b"}")
