"""Token ids in, text out: never half a character, and never the beginning of a stop string.

stream = TextStream(tokenizer, stop=["END"])
print(stream.push(token_id), end="")
"""

import codecs
import re
from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others for U+0100 and on.
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}
_CONTROL = re.compile(r"<\|\w+\|>")  # <|im_end|> and the like are not text; <think> and <tool_call> are


@cache
def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; none for a control token."""
    if _CONTROL.fullmatch(token):
        return b""
    return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in token)


class TextStream:
    """Token ids in, pieces of text out. Never half a character, and nothing that may be the beginning of a stop string.

    Bytes that are not UTF-8 become U+FFFD. After `stopped`, no more text comes.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""

    def push(self, token_id: int) -> str:
        """The text that is certain after this token, possibly none."""
        return self._release(self.decoder.decode(token_bytes(self.tokenizer.id_to_token(token_id) or "")))

    def close(self, cut: bool = False) -> str:
        """What was held back. `cut`: the answer was cut off, so half a character at its end is dropped."""
        text = self._release("" if cut else self.decoder.decode(b"", final=True))
        rest, self.held = self.held, ""
        return text + rest

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        hold = 0  # the longest end of the text that begins a stop string
        for stop in self.stop:
            hold = max([hold, *(n for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))])
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]
