"""Token ids of an answer -> what a client is shown: reasoning, content and tool calls, piece by piece.

answer = ChatAnswer(tokenizer, stop=["END"], thinking=False, tools=True)
for token in tokens: deltas = answer.push(token)     # [{"content": "Hel"}], [{"reasoning_content": ...}], [], ...
deltas = answer.close()

Markers are recognised by their token ids. A model that spells out "<think>" in ordinary tokens has written text.
"""

import json
import uuid
from collections.abc import Sequence

from tokenizers import Tokenizer

from dataset.chat import END_THINK_ID, END_TOOL_CALL_ID, MARKER_IDS, THINK_ID, TOOL_CALL_ID
from model.inference.text_stream import TextStream
from model.inference.tools import parse_call

REASONING, CONTENT, CALL = "reasoning_content", "content", "tool_calls"
MARKERS = frozenset(MARKER_IDS.values())


class TextAnswer:
    """The continuation of a text, in which markers are text like any other."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stream = TextStream(tokenizer, stop)

    @property
    def stopped(self) -> bool:
        return self.stream.stopped

    def shows(self, token: int) -> bool:
        return True

    def push(self, token: int) -> list[dict]:
        text = self.stream.push(token)
        return [{"text": text}] if text else []

    def close(self, cut: bool = False) -> list[dict]:
        text = self.stream.close(cut)
        return [{"text": text}] if text else []


class ChatAnswer:
    """An assistant's turn. Stop strings end its content; they are not looked for in reasoning and calls.

    thinking: the prompt ends inside of a thinking block. tools: calls are expected; without, their markers are left
    out and what stands between them is content.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, thinking: bool = False, tools: bool = False):
        self.tokenizer, self.stop, self.tools = tokenizer, stop, tools
        self.stopped, self.calls, self.reasoning_tokens = False, 0, 0
        self._open(REASONING if thinking else CONTENT, trim=thinking)

    def _open(self, section: str, trim: bool) -> None:
        self.section = section
        self.stream = TextStream(self.tokenizer, self.stop if section == CONTENT else ())
        self.trim = trim  # white space at the beginning of the section belongs to the marker before it
        self.held = ""  # white space that may turn out to belong to the marker after it; or the text of a call

    def shows(self, token: int) -> bool:
        """Whether this token, if it comes next, is one of the content's."""
        return self.section == CONTENT and token not in MARKERS

    def push(self, token: int) -> list[dict]:
        """What the next token adds: deltas of an assistant message."""
        self.reasoning_tokens += self.section == REASONING
        if token == THINK_ID:
            return self._change(REASONING)
        if token == END_THINK_ID:
            return self._change(CONTENT)
        if token == TOOL_CALL_ID and self.tools:
            return self._change(CALL)
        if token == END_TOOL_CALL_ID and self.section == CALL:
            return self._change(CONTENT)
        if token in MARKERS:
            return []
        deltas = self._text(self.stream.push(token))
        self.stopped = self.stream.stopped
        return deltas

    def close(self, cut: bool = False) -> list[dict]:
        """The end of the answer. `cut`: it was cut off, so half a character at its end is dropped."""
        deltas = self._text(self.stream.close(cut))
        if self.section == CALL:
            return self._call()
        if self.section == CONTENT and self.held:
            deltas.append({CONTENT: self.held})
        self.held = ""
        return deltas

    def _change(self, section: str) -> list[dict]:
        deltas = self._text(self.stream.close())
        if self.section == CALL:
            deltas = self._call()
        self._open(section, trim=True)
        return deltas

    def _text(self, text: str) -> list[dict]:
        if self.section == CALL:
            self.held += text
            return []
        if self.trim:
            text = text.lstrip()
        text = self.held + text
        shown = text.rstrip()
        self.held = text[len(shown) :]
        self.trim = self.trim and not shown
        return [{self.section: shown}] if shown else []

    def _call(self) -> list[dict]:
        """The call whose text is complete, in one piece; as content if it is not a call after all."""
        text, self.held = self.held, ""
        try:
            call = parse_call(text)
        except (ValueError, RecursionError):
            return [{CONTENT: text.strip()}] if text.strip() else []
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        call = {"index": self.calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self.calls += 1
        return [{CALL: [call]}]
