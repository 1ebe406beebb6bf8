"""The built-in tools: what a model may call (SCHEMAS), how a call is read (parse_call) and carried out (run_tool).

run_tool("calculator", {"expression": "(12.5 - 3) * 4"}) -> '{"result": 38}'

The schemas are short because a nano model must read them. Arguments come from a model, so nothing in them is trusted:
the calculator is a parser of its own, arithmetic is exact, and a call that cannot be carried out gets an error back.
"""

import json
import re
from datetime import date, timedelta
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

from dataset.chat import parse_tool_calls
from dataset.checks import SURROGATE_PATTERN

MAX_EXPRESSION = 200  # characters
MAX_DEPTH = 20  # of parentheses and signs
MAX_NUMBER = 10**15  # no result is larger; none but 0 is closer to 0 than 1 / MAX_NUMBER
DIGITS = 10  # significant ones, of results that are not whole
MAX_NESTING = 50  # objects and lists in the arguments of a call


class ToolError(Exception):
    """A call cannot be carried out; the message is what the model gets to read."""


# ------------------------------------------------------------------------------------------------ calculator

NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
TOKEN = re.compile(NUMBER.pattern + r"|\S")  # what is neither a number nor an operator is refused by _factor


def calculator(expression: str) -> str:
    if len(expression) > MAX_EXPRESSION:
        raise ToolError("expression too long")
    tokens = TOKEN.findall(expression)[::-1]  # the next one is the last
    value = _sum(tokens, 0)
    if tokens:
        raise ToolError("not an expression")
    return number_text(value)


def _sum(tokens: list[str], depth: int) -> Fraction:
    value = _product(tokens, depth)
    while tokens and tokens[-1] in ("+", "-"):
        sign = 1 if tokens.pop() == "+" else -1
        value += sign * _product(tokens, depth)
    return value


def _product(tokens: list[str], depth: int) -> Fraction:
    value = _factor(tokens, depth)
    while tokens and tokens[-1] in ("*", "/"):
        operator, factor = tokens.pop(), _factor(tokens, depth)
        if operator == "/" and factor == 0:
            raise ToolError("division by zero")
        value = value * factor if operator == "*" else value / factor
    return value


def _factor(tokens: list[str], depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise ToolError("expression too deep")
    token = tokens.pop() if tokens else ""
    if token in ("+", "-"):
        value = _factor(tokens, depth + 1)
        return value if token == "+" else -value
    if token == "(":
        value = _sum(tokens, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise ToolError("not an expression")
        return value
    if not NUMBER.fullmatch(token):
        raise ToolError("not an expression")
    return Fraction(token)


def number_text(value: Fraction) -> str:
    """Without an exponent, so that a small model can copy it; whole numbers exactly, others to DIGITS digits."""
    if abs(value) > MAX_NUMBER:
        raise ToolError("number too large")
    if 0 < abs(value) * MAX_NUMBER < 1:
        raise ToolError("number too small")
    if value.denominator == 1:
        return str(value.numerator)
    digits = max(DIGITS, len(str(int(abs(value)))))  # never fewer than stand before the point
    rounded = Context(prec=digits).divide(Decimal(value.numerator), Decimal(value.denominator))
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# ------------------------------------------------------------------------------------------------ dates, units


def add_days(date: str, days: int) -> str:
    try:
        return json.dumps((_date(date) + timedelta(days=days)).isoformat())
    except OverflowError:
        raise ToolError("date out of range") from None


def _date(text: str) -> date:
    try:
        year, month, day = map(int, re.fullmatch(r"([0-9]{4})-([0-9]{2})-([0-9]{2})", text).groups())
        return date(year, month, day)
    except (AttributeError, ValueError):
        raise ToolError("not a date YYYY-MM-DD") from None


# unit: (what it measures, size, zero point), the last two in the first unit of its kind
UNITS = {
    "m": ("length", Fraction(1), 0),
    "km": ("length", Fraction(1000), 0),
    "cm": ("length", Fraction(1, 100), 0),
    "mm": ("length", Fraction(1, 1000), 0),
    "mile": ("length", Fraction("1609.344"), 0),
    "foot": ("length", Fraction("0.3048"), 0),
    "inch": ("length", Fraction("0.0254"), 0),
    "kg": ("mass", Fraction(1), 0),
    "g": ("mass", Fraction(1, 1000), 0),
    "pound": ("mass", Fraction("0.45359237"), 0),
    "ounce": ("mass", Fraction("0.45359237") / 16, 0),
    "second": ("time", Fraction(1), 0),
    "minute": ("time", Fraction(60), 0),
    "hour": ("time", Fraction(3600), 0),
    "day": ("time", Fraction(86400), 0),
    "celsius": ("temperature", Fraction(1), 0),
    "fahrenheit": ("temperature", Fraction(5, 9), Fraction(-160, 9)),
    "litre": ("volume", Fraction(1), 0),
    "ml": ("volume", Fraction(1, 1000), 0),
    "cup": ("volume", Fraction("0.25"), 0),  # the metric cup
}


def convert(value: int | float, unit: str, to: str) -> str:
    if not abs(value) <= MAX_NUMBER:  # NaN too
        raise ToolError("number out of range")
    if unit not in UNITS or to not in UNITS:
        raise ToolError("unknown unit")
    kind, size, zero = UNITS[unit]
    to_kind, to_size, to_zero = UNITS[to]
    if kind != to_kind:
        raise ToolError("units do not fit")
    return number_text((Fraction(value) * size + zero - to_zero) / to_size)


# ------------------------------------------------------------------------------------------------ calls

# name: (function, the JSON types of its arguments); a function returns JSON text
TOOLS = {
    "calculator": (calculator, {"expression": "string"}),
    "add_days": (add_days, {"date": "string", "days": "integer"}),
    "convert": (convert, {"value": "number", "unit": "string", "to": "string"}),
}
PYTHON_TYPES = {"string": str, "integer": int, "number": (int, float)}


def _schema(name: str) -> dict:
    """As OpenAI has it, without what may be left out."""
    properties = {argument: {"type": kind} for argument, kind in TOOLS[name][1].items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


SCHEMAS = [_schema(name) for name in TOOLS]


def run_tool(name: Any, arguments: Any) -> str:
    """Carries out a call; the content of the tool message: {"result": ...} or {"error": "..."}. Never raises."""
    try:
        return f'{{"result": {_run(name, arguments)}}}'
    except ToolError as error:
        return json.dumps({"error": str(error)})


def _run(name: Any, arguments: Any) -> str:
    if not isinstance(name, str) or name not in TOOLS:
        raise ToolError("unknown tool")
    function, types = TOOLS[name]
    if not isinstance(arguments, dict):
        raise ToolError("arguments are not an object")
    if missing := [argument for argument in types if argument not in arguments]:
        raise ToolError(f"{missing[0]} is missing")
    if len(arguments) > len(types):
        raise ToolError("unknown argument")
    for argument, kind in types.items():
        value = arguments[argument]
        if not isinstance(value, PYTHON_TYPES[kind]) or isinstance(value, bool):
            raise ToolError(f"{argument} is not {'an' if kind == 'integer' else 'a'} {kind}")
    return function(**arguments)


def parse_call(block: str) -> dict:
    """What stands between the tool call markers -> {"name": str, "arguments": dict}. ValueError or RecursionError for
    what is not a call."""
    call = json.loads(block)
    if _depth(call) > MAX_NESTING:
        raise ValueError("nested too deeply")
    if SURROGATE_PATTERN.search(json.dumps(call, ensure_ascii=False)):
        raise ValueError("half a character")  # which no tokenizer can encode
    return parse_tool_calls([call])[0]


def _depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, parts), default=0)
