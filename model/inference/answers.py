"""The one parser of answers: token ids -> thinking, content and tool calls, for chat, server, teacher and evaluation.

parser = AnswerParser(partial(TextStream, tokenizer), tokenizer.answer_markers, thinking=False)
builder = MessageBuilder()
for token in tokens:
    for piece in parser.push(token): deltas = builder.add(piece)     # a piece is raw text, or a marker
for piece in parser.close(): builder.add(piece)
message = builder.close()

Markers are recognised by their token ids. A model that spells out "<think>" in ordinary tokens has written text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from dataset.tokenizer import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL
from model.inference.tools import parse_call

REASONING, CONTENT, CALL = "reasoning_content", "content", "tool_calls"  # sections, named as in a message
SECTION_AFTER = {THINK: REASONING, END_THINK: CONTENT, TOOL_CALL: CALL, END_TOOL_CALL: CONTENT}


class Piece(NamedTuple):
    """Raw text of a section; or, with text "", the marker that this section begins after."""

    section: str
    text: str
    marker: str = ""


class TextDecoder(Protocol):
    """Tokens of one section -> text; `stopped`: a stop string ended it. TextStream is one."""

    stopped: bool

    def push(self, token: int) -> str: ...
    def close(self, cut: bool = False) -> str: ...


class AnswerParser:
    """An assistant's turn, token by token, as pieces.

    new_text(stop): a TextDecoder for the next section. markers: which token ids are markers; those that no section
    begins after are left out. thinking: the prompt ends inside of a thinking block. calls: with False the markers of
    calls are left out and what stands between them is content. Stop strings are looked for in the content alone.
    """

    def __init__(
        self,
        new_text: Callable[[Sequence[str]], TextDecoder],
        markers: dict[int, str],
        *,
        thinking: bool = False,
        calls: bool = True,
        stop: Sequence[str] = (),
    ):
        self.new_text, self.markers, self.stop = new_text, markers, stop
        self.sections = {m: s for m, s in SECTION_AFTER.items() if calls or m not in (TOOL_CALL, END_TOOL_CALL)}
        self._open(REASONING if thinking else CONTENT)

    def _open(self, section: str) -> None:
        self.section = section
        self.text = self.new_text(self.stop if section == CONTENT else ())

    @property
    def stopped(self) -> bool:
        return self.text.stopped

    def push(self, token: int) -> list[Piece]:
        marker = self.markers.get(token)
        if marker is None:
            return self._pieces(self.text.push(token))
        section = self.sections.get(marker)
        if section is None or marker == END_TOOL_CALL and self.section == CONTENT:
            return []
        if self.section == REASONING and marker in (TOOL_CALL, END_TOOL_CALL):
            section = REASONING  # a call that is thought about, not made
        before = self._pieces(self.text.close())
        self._open(section)
        return [*before, Piece(section, "", marker)]

    def close(self, cut: bool = False) -> list[Piece]:
        """The end of the answer. `cut`: it was cut off, so half a character at its end is dropped."""
        return self._pieces(self.text.close(cut))

    def parse(self, tokens: Iterable[int], cut: bool = False) -> list[Piece]:
        """A whole answer at once."""
        return [*(piece for token in tokens for piece in self.push(token)), *self.close(cut)]

    def _pieces(self, text: str) -> list[Piece]:
        return [Piece(self.section, text)] if text else []


@dataclass
class AssistantMessage:
    """What a model has said in one turn."""

    content: str = ""  # with it, in text, what stood between the markers of a malformed call
    reasoning_content: str = ""
    tool_calls: list[dict] = field(default_factory=list)  # [{"name": str, "arguments": dict}]
    faults: list[str] = field(default_factory=list)  # of malformed calls, in words
    text: str = ""  # content and calls with their markers spelled out, as the model wrote them


class MessageBuilder:
    """Pieces -> an AssistantMessage, and the deltas that a client puts it together from: {section: text}, without the
    white space around the sections, and {"tool_calls": [call]} for each call in one piece."""

    def __init__(self):
        self.message = AssistantMessage()
        self.section, self.raw = CONTENT, ""
        self.trim = False  # white space at the beginning of the section belongs to the marker before it
        self.held = ""  # white space that may turn out to belong to the marker after it; or the text of a call

    def add(self, piece: Piece) -> list[dict]:
        if piece.section != REASONING and piece.marker != END_THINK:
            self.raw += piece.marker + piece.text
        deltas = []
        if piece.marker:
            if self.section == CALL:
                deltas = self._call(ended=piece.marker == END_TOOL_CALL)
            self.trim, self.held = True, ""
        elif piece.section != self.section:  # a prompt that ends inside of a thinking block
            self.trim = True
        self.section = piece.section
        return deltas + self._text(piece.text)

    def finish(self) -> list[dict]:
        """The deltas that are left at the end of the answer."""
        if self.section == CALL:
            return self._call(ended=False)
        held, self.held = self.held, ""
        return self._delta(CONTENT, held) if self.section == CONTENT else []

    def close(self) -> AssistantMessage:
        self.finish()
        self.message.content, self.message.text = self.message.content.strip(), self.raw.strip()
        return self.message

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
        return self._delta(self.section, shown)

    def _call(self, ended: bool) -> list[dict]:
        """The call whose text is complete; as content if it is not a call after all."""
        text, self.held = self.held, ""
        try:
            if not ended:
                raise ValueError("it has no end")
            call = parse_call(text)
        except (ValueError, RecursionError) as error:
            self.message.faults.append(f"malformed tool call: {error}")
            return self._delta(CONTENT, text.strip())
        self.message.tool_calls.append(call)
        return [{CALL: [call]}]

    def _delta(self, section: str, text: str) -> list[dict]:
        if not text:
            return []
        setattr(self.message, section, getattr(self.message, section) + text)
        return [{section: text}]


def to_message(pieces: Iterable[Piece]) -> AssistantMessage:
    builder = MessageBuilder()
    for piece in pieces:
        builder.add(piece)
    return builder.close()
