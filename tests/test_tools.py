"""The built-in tools and the reading of calls: `pytest tests/test_tools.py`."""

import ast
import json
import operator
import random
import re
from fractions import Fraction

import pytest

from model.inference.tools import SCHEMAS, TOOLS, UNITS, parse_call, run_tool


def calculated(expression):
    return run_tool("calculator", {"expression": expression})


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("123 + 456", "579"), ("0.1+0.2", "0.3"), ("2 + 3 * 4", "14"), ("(2+3)*4", "20"), ("10 / 4", "2.5"),
        ("1/3", "0.3333333333"), ("2/3", "0.6666666667"), ("8 - 3 - 2", "3"), ("8 / 4 / 2", "1"), ("-(2 - 5)", "3"),
        ("- - 3", "3"), ("2 * -3", "-6"), ("-0", "0"), ("0 / -5", "0"), ("7.50", "7.5"), (".5 + 1.", "1.5"),
        ("007", "7"), ("99999 * 999999", "99998900001"), ("12345678901 + 0.5", "12345678902"),
        ("1 / 3000000", "0.0000003333333333"), ("1 / 1024", "0.0009765625"), ("100 / 8 * 8", "100"),
        (" 1\t+\n1 ", "2"), ("1000000 * 1000000 * 1000", "1000000000000000"), ("100 * 10 / 4", "250"),
        ("9" * 150 + " * 0 + 1", "1"), ("(" * 20 + "1" + ")" * 20, "1"),
    ],
)  # fmt: skip
def test_calculator(expression, result):
    assert calculated(expression) == f'{{"result": {result}}}'


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("1 / 0", "division by zero"), ("1 / (2 - 2)", "division by zero"), ("0/0", "division by zero"),
        ("", "not an expression"), (" ", "not an expression"), ("1 +", "not an expression"),
        ("()", "not an expression"), ("(1", "not an expression"), ("1)", "not an expression"),
        ("1 2", "not an expression"),
        ("1.2.3", "not an expression"), (".", "not an expression"), ("1e5", "not an expression"),
        ("0x10", "not an expression"), ("1_000", "not an expression"), ("1,000", "not an expression"),
        ("2 ** 9", "not an expression"), ("7 // 2", "not an expression"), ("7 % 2", "not an expression"),
        ("2^9", "not an expression"), ("nan", "not an expression"), ("inf", "not an expression"),
        ("True", "not an expression"), ("1j", "not an expression"), ("１+１", "not an expression"),
        ("٣ + ٣", "not an expression"), ("² + 1", "not an expression"), ("1\0", "not an expression"),
        ("\ud800", "not an expression"), ("__import__('os')", "not an expression"),
        ("(1).__class__", "not an expression"), ("print(1)", "not an expression"), ("'a' * 9", "not an expression"),
        ("1" * 201, "expression too long"), ("(" * 10**6, "expression too long"), ("9" * 10**7, "expression too long"),
        ("(" * 90 + "1" + ")" * 90, "expression too deep"), ("-" * 199 + "1", "expression too deep"),
        ("9" * 16, "number too large"), ("*".join(["99999"] * 30), "number too large"),
        ("1 / " + "9" * 16, "number too small"),
    ],
)  # fmt: skip
def test_calculator_refuses(expression, error):
    assert calculated(expression) == json.dumps({"error": error})


def random_expression(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([str(rng.randrange(1000)), f"{rng.randrange(100)}.{rng.randrange(100):02}"])
    if rng.random() < 0.2:
        return f"-{random_expression(rng, depth - 1)}"
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    text = f"{left}{rng.choice(['', ' '])}{rng.choice('+-*/')} {right}"
    return f"({text})" if rng.random() < 0.5 else text


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def python_value(node, text):
    """What Python's own grammar makes of the text, every number in it an exact fraction."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](python_value(node.left, text), python_value(node.right, text))
    if isinstance(node, ast.UnaryOp):
        return -python_value(node.operand, text)
    return Fraction(ast.get_source_segment(text, node))


def test_calculator_agrees_with_python():
    rng, compared = random.Random(0), 0
    for _ in range(2000):
        expression = random_expression(rng, 4)
        try:
            value = python_value(ast.parse(expression, mode="eval").body, expression)
        except ZeroDivisionError:
            value = None
        answer = json.loads(calculated(expression), parse_float=Fraction, parse_int=Fraction)
        if len(expression) > 200:
            assert answer == {"error": "expression too long"}
        elif value is None:
            assert answer == {"error": "division by zero"}
        elif abs(value) > 10**15 or 0 < abs(value) < Fraction(1, 10**15):
            assert "number too" in answer["error"]
        else:
            assert abs(answer["result"] - value) <= abs(value) * Fraction(1, 10**9), expression
            assert value.denominator > 1 or answer["result"] == value
            compared += 1
    assert compared > 1500


NO_DATE, NO_RANGE, NO_NUMBER = (
    json.dumps({"error": text}) for text in ("not a date YYYY-MM-DD", "date out of range", "number out of range")
)


@pytest.mark.parametrize(
    ("day", "days", "content"),
    [
        ("2026-11-24", 10, '{"result": "2026-12-04"}'), ("2024-02-28", 1, '{"result": "2024-02-29"}'),
        ("2023-02-28", 1, '{"result": "2023-03-01"}'), ("2026-01-01", -1, '{"result": "2025-12-31"}'),
        ("0001-01-01", 0, '{"result": "0001-01-01"}'), ("9999-12-31", 1, NO_RANGE),
        ("0001-01-01", -1, NO_RANGE), ("2026-01-01", 10**4000, NO_RANGE),
        ("2026-02-30", 1, NO_DATE), ("0000-01-01", 1, NO_DATE),
        ("20260101", 1, NO_DATE), ("2026-1-1", 1, NO_DATE),
        ("2026-W01-1", 1, NO_DATE), ("２０２６-01-01", 1, NO_DATE),
        ("2026-01-01\n", 1, NO_DATE), ("tomorrow", 1, NO_DATE),
    ],
)  # fmt: skip
def test_add_days(day, days, content):
    assert run_tool("add_days", {"date": day, "days": days}) == content


@pytest.mark.parametrize(
    ("value", "unit", "to", "content"),
    [
        (3, "km", "m", '{"result": 3000}'), (2.5, "kg", "g", '{"result": 2500}'),
        (1, "mile", "m", '{"result": 1609.344}'), (12, "inch", "foot", '{"result": 1}'),
        (1, "inch", "cm", '{"result": 2.54}'),
        (0.1, "m", "cm", '{"result": 10}'),
        (100, "celsius", "fahrenheit", '{"result": 212}'), (-40, "fahrenheit", "celsius", '{"result": -40}'),
        (98.6, "fahrenheit", "celsius", '{"result": 37}'), (90, "minute", "hour", '{"result": 1.5}'),
        (1, "day", "second", '{"result": 86400}'), (1, "pound", "ounce", '{"result": 16}'),
        (2, "cup", "ml", '{"result": 500}'), (0.0, "m", "km", '{"result": 0}'),
        (-0.0, "m", "km", '{"result": 0}'), (1, "m", "m", '{"result": 1}'),
        (1, "mm", "mile", '{"result": 0.0000006213711922}'), (3, "km", "kg", '{"error": "units do not fit"}'),
        (3, "celsius", "m", '{"error": "units do not fit"}'), (3, "parsec", "m", '{"error": "unknown unit"}'),
        (3, "m", "", '{"error": "unknown unit"}'), (float("nan"), "m", "km", NO_NUMBER),
        (float("inf"), "m", "km", NO_NUMBER), (10**400, "m", "km", NO_NUMBER),
        (1e15, "km", "mm", '{"error": "number too large"}'), (1e-300, "m", "km", '{"error": "number too small"}'),
    ],
)  # fmt: skip
def test_convert(value, unit, to, content):
    assert run_tool("convert", {"value": value, "unit": unit, "to": to}) == content


def test_conversions_there_and_back_again():
    pairs = [(a, b) for a in UNITS for b in UNITS if a != b and UNITS[a][0] == UNITS[b][0]]
    assert len(pairs) == 7 * 6 + 4 * 3 + 4 * 3 + 2 + 3 * 2
    for unit, to in pairs:
        there = json.loads(run_tool("convert", {"value": 12, "unit": unit, "to": to}))["result"]
        back = json.loads(run_tool("convert", {"value": there, "unit": to, "to": unit}))["result"]
        assert back == pytest.approx(12, rel=1e-8)


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("rm", {}, "unknown tool"), (None, {}, "unknown tool"), (["calculator"], {}, "unknown tool"),
        ("calculator", None, "arguments are not an object"), ("calculator", [], "arguments are not an object"),
        ("calculator", '{"expression": "1"}', "arguments are not an object"),
        ("calculator", {}, "expression is missing"), ("convert", {"value": 1, "unit": "m"}, "to is missing"),
        ("calculator", {"expression": "1", "self": "x"}, "unknown argument"),
        ("calculator", {"expression": 1}, "expression is not a string"),
        ("calculator", {"expression": None}, "expression is not a string"),
        ("calculator", {"expression": ["1"]}, "expression is not a string"),
        ("add_days", {"date": "2026-01-01", "days": "1"}, "days is not an integer"),
        ("add_days", {"date": "2026-01-01", "days": 1.5}, "days is not an integer"),
        ("add_days", {"date": "2026-01-01", "days": True}, "days is not an integer"),
        ("add_days", {"date": 20260101, "days": 1}, "date is not a string"),
        ("convert", {"value": True, "unit": "m", "to": "km"}, "value is not a number"),
        ("convert", {"value": "3", "unit": "m", "to": "km"}, "value is not a number"),
        ("convert", {"value": 3, "unit": [], "to": "km"}, "unit is not a string"),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_the_schema(name, arguments, error):
    assert run_tool(name, arguments) == json.dumps({"error": error})


def test_schemas_are_openai_schemas_of_all_tools():
    assert [schema["function"]["name"] for schema in SCHEMAS] == list(TOOLS)
    for schema in SCHEMAS:
        assert schema["type"] == "function" and schema["function"]["parameters"]["type"] == "object"
        properties = schema["function"]["parameters"]["properties"]
        assert {"type"} == {key for value in properties.values() for key in value}


# ------------------------------------------------------------------------------------------------ calls

CALL = {"name": "calculator", "arguments": {"expression": "1 + 1"}}


def test_a_call_is_an_object_with_a_name():
    assert parse_call(json.dumps(CALL)) == CALL
    assert parse_call('\n{"name": "clock"}\n') == {"name": "clock", "arguments": {}}


@pytest.mark.parametrize(
    ("inside", "fault"),
    [
        ("", "Expecting value"), ("{", "Expecting property name"), ("calculator(1)", "Expecting value"),
        ('{"name": "calculator", "arguments": {"expression": "1}}', "Invalid control character"),
        ("null", "null"), ("[]", "a list"), (json.dumps([CALL]), "a list"), ('"x"', "a string"), ("{}", 'no "name"'),
        ('{"name": 3, "arguments": {}}', 'no "name"'), ('{"name": "x", "arguments": [1]}', "a list, not an object"),
        ('{"name": "x", "arguments": {"a": "\\ud800"}}', "half a character"), ("[" * 10**5, "recursion"),
        ('{"name": "x", "arguments": {"a": ' + "[" * 60 + "]" * 60 + "}}", "nested too deeply"),
        ('{"name": "x", "arguments": {"a": ' + "1" * 5000 + "}}", "digits"),
        (json.dumps(CALL) + json.dumps(CALL), "Extra data"),
    ],
)  # fmt: skip
def test_malformed_calls_are_reported(inside, fault):
    with pytest.raises((ValueError, RecursionError), match=re.escape(fault)):
        parse_call(f"\n{inside}\n")
