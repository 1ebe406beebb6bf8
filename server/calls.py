"""The text of a tool call while it comes: its name, and its arguments piece by piece.

call = CallText()
call.push('{"name": "f", "argu'); call.push('ments": {"x": 1}}')
call.name, call.arguments, call.complete                # "f", '{"x": 1}', True
"""

import json
import re

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"arguments"\s*:\s*(?=\{)')

NAME = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)')


class CallText:
    """`name` is None until it is known; what is not written name first, then an object of arguments, has none."""

    def __init__(self, name: str | None = None):
        self.name, self.arguments, self.complete = name, "", False
        self._head: str | None = ""  # what came before the arguments; None: they have begun
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def begun_name(self) -> str:
        """As much of the name as has been written."""
        found = NAME.match(self._head or "")
        return found[1] if found else ""

    def push(self, text: str) -> None:
        if self._head is not None:
            self._head += text
            found = HEAD.match(self._head)
            if not found:
                return
            try:
                self.name = json.loads(found[1])
            except ValueError:
                return
            text, self._head = self._head[found.end() :], None
        self._read(text)

    def _read(self, text: str) -> None:
        """The arguments end where their first brace is closed."""
        for c in text:
            if self.complete:
                return
            self.arguments += c
            if self._in_string:
                self._in_string = c != '"' or self._escaped
                self._escaped = c == "\\" and not self._escaped
            elif c == '"':
                self._in_string = True
            else:
                self._depth += (c in "{[") - (c in "}]")
                self.complete = self._depth == 0
