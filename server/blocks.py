"""Deltas of a choice -> the blocks that newer interfaces make an answer of: thinking, text, calls, one after the other.

blocks = Blocks()
for step, block, text in blocks.push({"content": "Hel"}): ...     # ("open", block, ""), ("add", block, "Hel")
for step, block, text in blocks.close(): ...                      # ("close", block, "")
"""

from collections.abc import Iterator
from dataclasses import dataclass

from model.inference.answers import CALL, CONTENT, REASONING

Step = tuple[str, "Block", str]


@dataclass
class Block:
    kind: str  # REASONING, CONTENT or CALL
    number: int
    text: str = ""  # of a call: its arguments
    call_id: str = ""
    name: str = ""


class Blocks:
    def __init__(self):
        self.all: list[Block] = []
        self.open: Block | None = None

    def push(self, delta: dict) -> Iterator[Step]:
        for kind in (REASONING, CONTENT):
            if delta.get(kind):
                if self.open is None or self.open.kind != kind:
                    yield from self._begin(Block(kind, len(self.all)))
                yield from self._add(delta[kind])
        for part in delta.get(CALL, ()):
            if "id" in part:
                block = Block(CALL, len(self.all), call_id=part["id"], name=part["function"]["name"])
                yield from self._begin(block)
            if part["function"]["arguments"]:
                yield from self._add(part["function"]["arguments"])

    def close(self) -> Iterator[Step]:
        """The end; an answer of nothing, or of thinking alone, is an empty text."""
        if not any(block.kind != REASONING for block in self.all):
            yield from self._begin(Block(CONTENT, len(self.all)))
        yield "close", self.open, ""

    def _begin(self, block: Block) -> Iterator[Step]:
        if self.open:
            yield "close", self.open, ""
        self.open = block
        self.all.append(block)
        yield "open", block, ""

    def _add(self, text: str) -> Iterator[Step]:
        self.open.text += text
        yield "add", self.open, text
