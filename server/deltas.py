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
from server.calls import CallText


class StopStream(TextStream):
    """A TextStream that remembers which stop string ended it. keep: and shows it."""

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = (), *, keep: bool = False):
        super().__init__(tokenizer, stop)
        self.keep, self.found = keep, None

    def _release(self, new: str) -> str:
        before = self.held + new
        text = super()._release(new)
        if self.stopped and self.found is None:
            self.found = next(stop for stop in self.stop if before.startswith(stop, len(text)))
            return text + self.found if self.keep else text
        return text


class SpelledStream(StopStream):
    """Control tokens are text, by their names."""

    def push(self, token_id: int) -> str:
        if token_id in self.tokenizer.hidden_ids:
            return self._release(self.tokenizer.id_to_token(token_id))
        return super().push(token_id)


class TextAnswer:
    """The continuation of a text, in which markers are text like any other. key: what its pieces are called. spelled:
    control tokens are shown. keep: and the stop string too."""

    calls = 0

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        stop: Sequence[str] = (),
        *,
        key: str = "text",
        spelled: bool = False,
        keep: bool = False,
    ):
        self.stream, self.key = (SpelledStream if spelled else StopStream)(tokenizer, stop, keep=keep), key

    @property
    def stopped(self) -> bool:
        return self.stream.stopped

    @property
    def stop_string(self) -> str | None:
        return self.stream.found

    def shows(self, token: int, last: bool) -> bool:
        """Whether the log-probability of this token, if it comes next, is told. last: it ends the answer."""
        return True

    def push(self, token: int) -> list[dict]:
        text = self.stream.push(token)
        return [{self.key: text}] if text else []

    def close(self, cut: bool = False) -> list[dict]:
        text = self.stream.close(cut)
        return [{self.key: text}] if text else []


class ChatAnswer:
    """An assistant's turn, taken apart by the AnswerParser, its calls in OpenAI's form.

    thinking: the prompt ends inside of a thinking block. tools: calls are expected; without, their markers are left
    out and what stands between them is content. forced: a grammar sees to it that there is a call; only: and of which
    function. eager: arguments of a call come as they are written; else when it is known to be one, whole. parallel:
    there may be several. keep: the stop string is shown.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        stop: Sequence[str] = (),
        *,
        thinking: bool = False,
        tools: bool = False,
        forced: bool = False,
        only: str | None = None,
        eager: bool = False,
        parallel: bool = True,
        keep: bool = False,
    ):
        options = {"thinking": thinking, "calls": tools, "stop": stop}
        self.parser = AnswerParser(partial(StopStream, tokenizer, keep=keep), tokenizer.answer_markers, **options)
        self.builder = MessageBuilder()
        self.forced, self.only, self.eager, self.parallel = forced, only, eager or forced, parallel
        self.calls, self.reasoning_tokens = 0, 0
        self.call, self.sent = CallText(only), -1  # the one that is being written; characters of it that are out

    @property
    def stopped(self) -> bool:
        one_is_enough = not self.parallel and self.calls > 0 and self.parser.section != CALL
        return self.parser.stopped or one_is_enough

    @property
    def stop_string(self) -> str | None:
        return self.parser.text.found

    def shows(self, token: int, last: bool) -> bool:
        """Whether this token, if it comes next, is one of the content's. last: it ends the answer."""
        return not last and self.parser.section == CONTENT and token not in self.parser.markers

    def push(self, token: int) -> list[dict]:
        """What the next token adds: deltas of an assistant message."""
        self.reasoning_tokens += self.parser.section == REASONING
        return self._deltas(self.parser.push(token))

    def close(self, cut: bool = False) -> list[dict]:
        """The end of the answer. `cut`: it was cut off, so half a character at its end is dropped."""
        deltas = self._deltas(self.parser.close(cut))
        if self.builder.section == CALL:
            deltas += self._written() if cut else []
            if cut and self.forced and self.sent < 0:  # in the middle of the name
                deltas.append(self._open_call(self.call.begun_name))
            return deltas + self._end_call(self.builder.finish())
        return deltas + self.builder.finish()

    def _deltas(self, pieces: list[Piece]) -> list[dict]:
        deltas = []
        for piece in pieces:
            ended = piece.marker and self.builder.section == CALL
            made = self.builder.add(piece)
            deltas += self._end_call(made) if ended else made
            if piece.section == CALL:
                self.call.push(piece.text)
                deltas += self._written() if self.eager else []
        return deltas

    def _written(self) -> list[dict]:
        """What has been written of the call and is not out yet."""
        if self.call.name is None:
            return []
        deltas = [self._open_call(self.call.name)] if self.sent < 0 else []
        new, self.sent = self.call.arguments[self.sent :], len(self.call.arguments)
        return deltas + ([self._arguments(new)] if new else [])

    def _open_call(self, name: str) -> dict:
        self.calls, self.sent = self.calls + 1, 0
        function = {"name": name, "arguments": ""}
        call = {"index": self.calls - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        return {CALL: [call | {"function": function}]}

    def _arguments(self, text: str) -> dict:
        return {CALL: [{"index": self.calls - 1, "function": {"arguments": text}}]}

    def _end_call(self, made: list[dict]) -> list[dict]:
        """made: what the builder says of the call's text, that it is a call, or content after all."""
        call, sent = self.call, self.sent
        self.call, self.sent = CallText(self.only), -1
        if sent >= 0:
            return []
        if not made or CALL not in made[0]:
            return [] if self.forced else made
        (parsed,) = made[0][CALL]
        arguments = call.arguments if call.complete else json.dumps(parsed["arguments"], ensure_ascii=False)
        deltas = [self._open_call(parsed["name"]), self._arguments(arguments)]
        self.sent = -1
        return deltas
