"""Tokens of a choice -> what its client gets: deltas of an assistant message, or pieces of a text.

answer = ChatAnswer(tokenizer, stop=["END"], thinking=False, tools=True)
for token in tokens: deltas = answer.push(token)     # [{"content": "Hel"}], [{"reasoning_content": ...}], [], ...
deltas = answer.close()
"""

import json
import uuid
from collections.abc import Sequence
from functools import partial

from dataset.tokenizer import ChatTokenizer
from model.inference.answers import CALL, CONTENT, REASONING, AnswerParser, MessageBuilder, Piece
from model.inference.text_stream import TextStream


class TextAnswer:
    """The continuation of a text, in which markers are text like any other."""

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()):
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
    """An assistant's turn, taken apart by the AnswerParser, its calls in OpenAI's form.

    thinking: the prompt ends inside of a thinking block. tools: calls are expected; without, their markers are left
    out and what stands between them is content.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, stop: Sequence[str] = (), *, thinking: bool = False, tools: bool = False
    ):
        options = {"thinking": thinking, "calls": tools, "stop": stop}
        self.parser = AnswerParser(partial(TextStream, tokenizer), tokenizer.answer_markers, **options)
        self.builder = MessageBuilder()
        self.calls, self.reasoning_tokens = 0, 0

    @property
    def stopped(self) -> bool:
        return self.parser.stopped

    def shows(self, token: int) -> bool:
        """Whether this token, if it comes next, is one of the content's."""
        return self.parser.section == CONTENT and token not in self.parser.markers

    def push(self, token: int) -> list[dict]:
        """What the next token adds: deltas of an assistant message."""
        self.reasoning_tokens += self.parser.section == REASONING
        return self._deltas(self.parser.push(token))

    def close(self, cut: bool = False) -> list[dict]:
        """The end of the answer. `cut`: it was cut off, so half a character at its end is dropped."""
        deltas = self._deltas(self.parser.close(cut))
        return deltas + [self._numbered(delta) for delta in self.builder.finish()]

    def _deltas(self, pieces: list[Piece]) -> list[dict]:
        return [self._numbered(delta) for piece in pieces for delta in self.builder.add(piece)]

    def _numbered(self, delta: dict) -> dict:
        if CALL not in delta:
            return delta
        (call,) = delta[CALL]
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        self.calls += 1
        number, name = self.calls - 1, f"call_{uuid.uuid4().hex[:24]}"
        return {CALL: [{"index": number, "id": name, "type": "function", "function": function}]}
