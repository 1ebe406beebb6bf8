"""Faults of conversations, in words; tool calls of every shape: `pytest tests/test_messages.py`."""

import json
import random

import pytest

from dataset.chat import load_tokenizer, parse_tool_calls, render_chat
from dataset.checks import validate_messages
from dataset.mapping import to_messages
from tests.samples import assistant, dumps, messy_chats, system, tool, user

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
CALLS = [
    {"name": "weather", "arguments": {"city": "北京", "deep": {"a": [None, 1.5]}}},
    {"name": "clock", "arguments": {}},
]
OPENAI_CALLS = [
    {"id": str(n), "type": "function", "function": {"name": call["name"], "arguments": dumps(call["arguments"])}}
    for n, call in enumerate(CALLS)
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_tool_calls_of_every_shape_are_the_same_calls():
    for shape in (CALLS, dumps(CALLS), json.dumps(CALLS), OPENAI_CALLS, dumps(OPENAI_CALLS)):
        assert parse_tool_calls(shape) == CALLS
    assert parse_tool_calls(None) == parse_tool_calls("") == parse_tool_calls("[]") == parse_tool_calls([]) == []


RESULT = (tool("r"), assistant("b"))


def with_calls(tool_calls, after=RESULT, tools=(WEATHER, CLOCK)):
    return [system("", tools=dumps(list(tools))), user("a"), assistant("", tool_calls=tool_calls), *after]


CALL = dumps(CALLS[:1])
FAULTS = [
    ([user("a"), assistant("b")], []),
    (with_calls(CALL), []),
    (
        [
            system(None, tools=dumps([CLOCK])),
            user("a"),
            assistant(None, tool_calls=dumps([{"name": "clock"}])),
            tool("x"),
            assistant("b"),
        ],
        [],
    ),
    ("text", ["error: "]),
    ([], ["error: "]),
    (
        [user("a"), None],
        [
            "error: message 2: ",
        ],
    ),
    ([user("a"), "b"], ["error: message 2: "]),
    ([{"content": "a"}, assistant("b")], ["error: message 1: role"]),
    ([{"role": 3, "content": "a"}, assistant("b")], ["error: message 1: role"]),
    (
        [{"role": "human", "content": "a"}, assistant("b")],
        ["error: message 1: role"],
    ),
    (
        [user("a"), {"role": "Assistant", "content": "a"}, assistant("b")],
        ["error: message 2: role"],
    ),
    (
        [user("a"), {"role": "narrator", "content": "a"}, assistant("b")],
        ["error: message 2: role"],
    ),
    ([{"role": "user"}, assistant("b")], ["error: message 1: content"]),
    ([user("a"), assistant(None)], ["error: message 2: content"]),
    ([user([{"type": "text"}]), assistant("b")], ["error: message 1: content"]),
    ([user(5), assistant("b")], ["error: message 1: content"]),
    ([user("a"), assistant("b", reasoning_content=["c"])], ["error: message 2: reasoning_content"]),
    ([user(" \n"), assistant("b")], ["warning: message 1: content"]),
    ([user("a"), assistant(" ")], ["error: message 2: "]),
    ([user("a"), assistant("", reasoning_content="b")], ["warning: message 2: "]),
    ([user("a"), system("s"), assistant("b")], ["warning: message 2: role"]),
    ([system("s"), system("s"), user("a"), assistant("b")], ["warning: message 2: role"]),
    ([user("a"), user("b"), assistant("c")], ["warning: message 2: role"]),
    ([user("a"), assistant("b"), assistant("c")], ["warning: message 3: role"]),
    ([assistant("a"), user("b"), assistant("c")], ["warning: message 1: role"]),
    ([user("a"), assistant("b"), user("c")], ["warning: message 3: role"]),
    ([system("s")], ["error: "]),
    ([user("a\ud800"), assistant("b")], ["error: message 1: content"]),
    ([user("a"), assistant("b\0")], ["warning: message 2: content"]),
    (
        [user("a<|im_start|>"), assistant("</think>")],
        ["warning: message 1: content", "warning: message 2: content"],
    ),
    ([user("a"), tool("b"), assistant("c")], ["error: message 2: role"]),
    (
        with_calls(CALL, [tool("r"), tool("r"), assistant("b")]),
        ["error: message 5: role"],
    ),
    (with_calls(CALL, [user("b"), assistant("c")]), ["warning: message 3: tool_calls"]),
    (with_calls(CALL, []), ["warning: message 3: tool_calls"]),
    (with_calls(CALL, tools=[CLOCK]), ["error: message 3: tool_calls"]),
    (with_calls(CALL, tools=[]), ["error: message 3: tool_calls"]),
    (with_calls(CALLS[:1]), ["warning: message 3: tool_calls"]),
    (with_calls(dumps(CALLS[0])), ["warning: message 3: tool_calls"]),
    (with_calls("[{"), ["error: message 3: tool_calls"]),
    (with_calls("3"), ["error: message 3: tool_calls"]),
    (with_calls('["clock"]'), ["error: message 3: tool_calls"]),
    (with_calls('[{"arguments": {}}]'), ["error: message 3: tool_calls"]),
    (
        with_calls('[{"name": "clock", "arguments": [1]}]'),
        ["error: message 3: tool_calls"],
    ),
    (
        with_calls('[{"name": "clock", "arguments": "x"}]'),
        ["error: message 3: tool_calls"],
    ),
    (
        with_calls('[{"name": "clock", "arguments": "{}"}]'),
        ["warning: message 3: tool_calls"],
    ),
    (
        with_calls('[{"name": "clock", "arguments": {"a": "\\ud800"}}]'),
        ["error: message 3: tool_calls"],
    ),
    ([system("", tools="[{"), user("a"), assistant("b")], ["error: message 1: tools"]),
    ([system("", tools="{}"), user("a"), assistant("b")], ["error: message 1: tools"]),
    (
        [system("", tools=[CLOCK]), user("a"), assistant("b")],
        ["warning: message 1: tools"],
    ),
    (
        [system("", tools="[{}]"), user("a"), assistant("b")],
        ["warning: message 1: tools"],
    ),
]


@pytest.mark.parametrize(("messages", "expected"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_named(tokenizer, messages, expected):
    found = [f"{level}: {text}" for level, text in validate_messages(messages)]
    for text in expected:
        level_and_place, _, field = text.rpartition(": ")
        assert any(fault.startswith(level_and_place) and field.strip() in fault for fault in found), found
    if not expected:
        assert not found
    if not any(fault.startswith("error") for fault in found):
        assert sum(render_chat(tokenizer, messages)[1]) > 0


def test_tools_given_apart_are_checked():
    messages = [user("a"), assistant("", tool_calls=CALL), tool("r"), assistant("b")]
    assert validate_messages(messages, [WEATHER]) == []
    assert "weather" in validate_messages(messages, [CLOCK])[0].text
    assert validate_messages(messages, "{")[0].text.startswith("tools")


def test_validation_never_raises_and_what_it_passes_can_be_rendered(tokenizer):
    rng = random.Random(0)
    values = [
        None,
        "",
        "a",
        "[]",
        CALL,
        "{",
        1,
        1.5,
        True,
        [],
        {},
        [None],
        ["a"],
        [{}],
        CALLS,
        OPENAI_CALLS,
        [{"function": 3}],
        [{"name": []}],
        [{"name": "clock", "arguments": []}],
        "\ud800",
        "<think>",
    ]
    fields = ["content", "tools", "tool_calls", "reasoning_content", "extra"]
    clean = 0
    for _ in range(4000):
        messages = []
        for role in rng.choices(
            ["system", "user", "assistant", "tool", "User", None, 3, ()], [3, 9, 9, 4, 1, 1, 1, 1], k=rng.randint(1, 4)
        ):
            content = rng.choice(["a", "b", rng.choice(values)])
            messages.append({"role": role, "content": content, rng.choice(fields): rng.choice(values)})
        if not any(fault.level == "error" for fault in validate_messages(messages)):
            clean += 1
            ids, mask = render_chat(tokenizer, messages)
            assert sum(mask) > 0 and len(ids) == len(mask)
    assert clean > 50


def test_every_conversational_fault_of_a_messy_file_is_found():
    dirty = messy_chats()
    planted = {line: (level, words) for line, level, words in dirty.planted}
    for number, line in enumerate(dirty.lines, 1):
        try:
            messages = json.loads(line)["conversations"]
            messages = to_messages(messages)[0] if isinstance(messages, list) else messages
        except (ValueError, KeyError, TypeError):
            continue
        faults = validate_messages(messages)
        level, words = planted.get(number, (None, ""))
        if level is None:
            assert faults == []
        elif words not in ("very long", "very many messages"):  # of any text: cleaning.py's
            assert any(fault.level == level and words in fault.text for fault in faults), (words, faults)
