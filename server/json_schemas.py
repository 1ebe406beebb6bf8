"""A client's JSON schema, made into one that a grammar can hold and a small model can finish.

schema, left_out = prepare(schema, can_match)      # left_out: what the grammar cannot hold, in words

An object with `properties` and no `additionalProperties` is closed, as most clients mean it: a model would otherwise
invent keys without end. So it would digits: a number gets limits where it has none. llguidance itself leaves out the
keywords that it does not know ("lenient") and tells them; patterns and references that it cannot hold are taken out
here.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
SCHEMAS = ("items", "prefixItems", "additionalItems", "additionalProperties")  # one or a list
IN_PLACE = ("allOf", "anyOf", "oneOf")  # say more about the same value
MOST, FINEST = 10**15 - 1, 1e-9  # of numbers whose schema says no limits
MAX_NODES = 20_000  # of the prepared schema: references can double at each step


class TooLarge(ValueError):
    pass


def prepare(schema: dict, can_match: Callable[[str], bool]) -> tuple[dict, list[str]]:
    """can_match: whether the grammar can hold a pattern. Raises TooLarge, or RecursionError for deep nesting."""
    preparing = _Preparing(schema, can_match)
    return preparing.closed(schema), preparing.left_out


class _Preparing:
    def __init__(self, root: dict, can_match: Callable[[str], bool]):
        self.root, self.can_match = root, can_match
        self.left_out: list[str] = []
        self.nodes = 0

    def closed(self, schema: Any, stay_open: bool = False) -> Any:
        """stay_open: the schema is a part of a larger one, which is closed as a whole."""
        if not isinstance(schema, dict):
            return schema  # true, false, or a fault for the grammar to name
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise TooLarge("the schema is too large")
        sources = [key for key in ("properties", *IN_PLACE, "$ref") if key in schema]
        every = schema.get("allOf")
        parts = len(sources) + (len(every) - 1 if isinstance(every, list) else 0)
        names = list(dict.fromkeys(self._names(schema, set())))
        combined = (parts > 1 and bool(names)) or stay_open
        new = {key: self._value(key, value, combined) for key, value in schema.items() if self._holds(key, value)}
        new |= _limits(schema)
        if combined and (target := self._target(new.get("$ref"))) is not None:
            del new["$ref"]
            rest = new.get("allOf", [])
            new["allOf"] = [*(rest if isinstance(rest, list) else ()), self.closed(target, stay_open=True)]
        declared = "additionalProperties" in schema or schema.get("unevaluatedProperties", False) is not False
        objects = combined and bool(names) or "properties" in schema or "unevaluatedProperties" in schema
        if objects and not declared and not stay_open and self._least(schema) <= len(names):
            own = new.get("properties", {})
            new["properties"] = dict.fromkeys(names, {}) | own if isinstance(own, dict) else own
            new["additionalProperties"] = False
        return new

    def _least(self, schema: dict) -> float:
        least = schema.get("minProperties", 0)
        return least if isinstance(least, (int, float)) else 0

    def _value(self, key: str, value: Any, combined: bool) -> Any:
        if key in SCHEMA_MAPS and isinstance(value, dict):
            return {name: self.closed(each) for name, each in value.items() if self._matches(key, name)}
        if key in IN_PLACE and isinstance(value, list):
            return [self.closed(each, stay_open=combined) for each in value]
        if key in SCHEMAS:
            return [self.closed(each) for each in value] if isinstance(value, list) else self.closed(value)
        return value

    def _holds(self, key: str, value: Any) -> bool:
        """Whether the grammar can hold this keyword; notes it if not."""
        if key == "x-guidance":
            return False
        fault = None
        if key == "pattern" and isinstance(value, str) and _is_pattern(value) and not self.can_match(value):
            fault = f"the pattern {ascii(value[:80])}"
        elif key == "$ref" and isinstance(value, str) and not value.startswith("#"):
            fault = f"the reference to {ascii(value[:80])}"
        if fault:
            self.left_out.append(fault)
        return not fault

    def _matches(self, key: str, name: str) -> bool:
        return key != "patternProperties" or self._holds("pattern", name)

    def _names(self, schema: Any, seen: set[str]) -> Iterator[str]:
        """The properties that a value of this schema may have, by all that is said about it."""
        if not isinstance(schema, dict):
            return
        for key in ("properties", "required"):
            names = schema.get(key)
            yield from (name for name in names if isinstance(name, str)) if isinstance(names, (dict, list)) else ()
        for key in IN_PLACE:
            for part in schema[key] if isinstance(schema.get(key), list) else ():
                yield from self._names(part, seen)
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref not in seen and (target := self._target(ref)) is not None:
            seen.add(ref)
            yield from self._names(target, seen)

    def _target(self, ref: Any) -> dict | None:
        """What a reference inside the schema points to."""
        if not isinstance(ref, str) or not ref.startswith("#/"):
            return None
        value: Any = self.root
        for step in ref[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            value = value.get(step) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else None


def _limits(schema: dict) -> dict:
    """What a number's schema does not say of its digits."""
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if not {"integer", "number"} & {name for name in types if isinstance(name, str)} or {"enum", "const"} & set(schema):
        return {}
    lows, highs = (
        [schema[key] for key in (f"{kind}imum", f"exclusive{kind.title()}imum") if key in schema]
        for kind in ("min", "max")
    )
    limits = {}
    if not lows and not any(isinstance(high, (int, float)) and high < -MOST for high in highs):
        limits["minimum"] = -MOST
    if not highs and not any(isinstance(low, (int, float)) and low > MOST for low in lows):
        limits["maximum"] = MOST
    coarse = all(isinstance(limit, int) for limit in lows + highs)
    if "number" in types and "multipleOf" not in schema and coarse:
        limits["multipleOf"] = FINEST
    return limits


def _is_pattern(text: str) -> bool:
    """One that is none at all is the client's fault, and for the grammar to name."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
