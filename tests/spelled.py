"""Answers for tests, written as text: markers in it stand for their tokens."""

import re
from functools import partial

from dataset.chat import END_THINK, END_TOOL_CALL, MARKER_IDS, THINK, TOOL_CALL, load_tokenizer
from model.inference.answers import AnswerParser, AssistantMessage, Piece, to_message
from model.inference.text_stream import TextStream

TOKENIZER = load_tokenizer()
TAGS = re.compile(f"({'|'.join((THINK, END_THINK, TOOL_CALL, END_TOOL_CALL))})")


def ids_of(text: str) -> list[int]:
    """The tokens of a model that answers so, its markers real ones."""
    parts = TAGS.split(text)
    return [token for part in parts for token in ([MARKER_IDS[part]] if part in MARKER_IDS else encode(part))]


def encode(text: str) -> list[int]:
    """The tokens of a text in which markers, if any, are spelled out."""
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def pieces_of(ids: list[int] | str) -> list[Piece]:
    ids = ids_of(ids) if isinstance(ids, str) else ids
    return AnswerParser(partial(TextStream, TOKENIZER), TOKENIZER.answer_markers).parse(ids)


def message_of(ids: list[int] | str) -> AssistantMessage:
    return to_message(pieces_of(ids))
