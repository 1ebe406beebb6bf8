"""Token ids in, text out: never half a character, and never the beginning of a stop string.

stream = TextStream(tokenizer, stop=["END"])
print(stream.push(token_id), end="")
"""

import codecs
from collections.abc import Sequence
from functools import lru_cache

from dataset.tokenizer import ChatTokenizer


@lru_cache(1 << 18)
def token_bytes(tokenizer: ChatTokenizer, token_id: int) -> bytes:
    """The tokenizer's, which spells a token out anew each time."""
    return tokenizer.token_bytes(token_id)


class TextStream:
    """Token ids in, pieces of text out. Never half a character, and nothing that may be the beginning of a stop string.

    Bytes that are not UTF-8 become U+FFFD. After `stopped`, no more text comes.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.first = tokenizer.drops_first_space

    def push(self, token_id: int) -> str:
        """The text that is certain after this token, possibly none."""
        new = self.decoder.decode(token_bytes(self.tokenizer, token_id))
        if self.first and new:
            new, self.first = new.removeprefix(" "), False
        return self._release(new)

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
