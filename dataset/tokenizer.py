"""A tokenizer folder as one object: text to ids, markers by name, the chat template, and the files to carry along.

tokenizer = load_tokenizer()                    # the shipped one; load_tokenizer(FOLDER) any model's
ids = tokenizer.encode("text").ids              # text never becomes a marker
ids, loss_mask = chat.render_chat(tokenizer, messages)

Weights belong to one tokenizer: a .pth carries its files, and `hash` tells whether two number their tokens alike.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

TOKENIZER_DIR = Path(__file__).resolve().parent.parent / "model" / "tokenizer"
TEMPLATE_FILE = Path(__file__).resolve().parent / "chat_template.jinja"

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, END_TOOL_RESPONSE = "<tool_response>", "</tool_response>"
SECTION_MARKERS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE)
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(7))
# Of the tokenizers that train_tokenizer.py makes: a marker's place in this tuple is its token id, 0 to 15.
MARKERS = (PAD, BOS, EOS, *SECTION_MARKERS, *RESERVED)
# The ones a decoder may hide; the think and tool markers are part of an answer and stay visible (as in Qwen3).
SPECIAL_MARKERS = frozenset((PAD, BOS, EOS, *RESERVED))

CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
CARRIED += ("generation_config.json",)  # it says which tokens end an answer
_MARKER_LIKE = re.compile(r"[<\[]\S+[>\]]")
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others for U+0100 and on.
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}


class TokenizerError(ValueError):
    """A tokenizer that cannot be used, or not for this; the text is one line that names it and says what to do."""


def load_tokenizer(folder: str | Path = TOKENIZER_DIR) -> "ChatTokenizer":
    """The tokenizer of a folder; TokenizerError if there is none."""
    folder = Path(folder)
    try:
        files = {name: (folder / name).read_text(encoding="utf-8") for name in CARRIED if (folder / name).exists()}
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"the tokenizer in {folder} cannot be read: {error}") from None
    if "tokenizer.json" not in files:
        raise TokenizerError(
            f"no tokenizer.json in {folder}: give a folder that has one (python train_tokenizer.py makes one; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes one of older formats)"
        )
    return ChatTokenizer(files, str(folder))


class ChatTokenizer:
    """What a tokenizers.Tokenizer does, in which text never becomes a marker; and what chats need to know of it.

    A marker is an added token that is special, or looks like <this> or [this]. Of the attributes that are not here
    (encode(), encode_batch_fast(), ...), those of a tokenizers.Tokenizer that does not look for markers are meant.
    """

    def __init__(self, files: dict[str, str], source: str):
        """files: the texts of those of CARRIED that there are. source: what messages call it."""
        self.files, self.source = files, source
        spec = self._json("tokenizer.json")
        self._config = self._json("tokenizer_config.json")
        try:
            self.full = Tokenizer.from_str(files["tokenizer.json"])
            added = {token["content"]: token for token in spec.get("added_tokens") or []}
            markers = {text for text, t in added.items() if t.get("special") or _MARKER_LIKE.fullmatch(text)}
            self.marker_ids = {text: added[text]["id"] for text in added if text in markers}
            self.hidden_ids = {t["id"] for t in added.values() if t.get("special")}  # no text, in an answer
            # (whether it takes the blanks before it, and those behind it) of the markers that do
            self.takes_blanks = {m: b for m in markers if any(b := (added[m].get("lstrip"), added[m].get("rstrip")))}
            self.plain, self._going_on = _without_markers(spec, markers)
        except Exception as error:  # tokenizers raises bare Exception for what it cannot read
            raise TokenizerError(f"{source}: its tokenizer.json is not a tokenizer: {_first_line(error)}") from None
        self._texts_added = {t["id"]: text for text, t in added.items() if text not in markers}
        scheme = (spec.get("pre_tokenizer") or {}).get("prepend_scheme")
        self._prefix_at_beginning_only = scheme == "first"
        decoder = json.dumps(spec.get("decoder"), ensure_ascii=False)
        self._byte_level, self._words = '"ByteLevel"' in decoder, decoder == "null"
        # SentencePiece's decoders take the blank off that begins a text.
        self.drops_first_space = self._words or not self._byte_level and "\u2581" in decoder
        self.vocab_size = 1 + max(self.full.get_vocab().values(), default=0)

    def _json(self, name: str) -> dict:
        try:
            content = json.loads(self.files.get(name, "{}"))
        except ValueError as error:
            what = "is a Git LFS pointer, not the file: run `git lfs pull`"
            is_pointer = self.files[name].startswith("version https://git-lfs")
            raise TokenizerError(f"{self.source}: {name} {what if is_pointer else f'is not JSON: {error}'}") from None
        if not isinstance(content, dict):
            raise TokenizerError(f"{self.source}: {name} is not a JSON object")
        return content

    def __reduce__(self) -> tuple:
        return ChatTokenizer, (self.files, self.source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "plain":
            raise AttributeError(name)
        return getattr(self.plain, name)

    # ------------------------------------------------------------------------------------------------ identity

    @cached_property
    def hash(self) -> str:
        """SHA-256 of which text has which id: the same for a folder that other software has written anew."""
        spec = self._json("tokenizer.json")
        merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"].get("merges") or []]
        ids = sorted((token, i) for token, i in self.full.get_vocab().items())
        return hashlib.sha256(json.dumps([ids, merges]).encode()).hexdigest()

    @cached_property
    def chat_hash(self) -> str:
        """SHA-256 of all that shapes the ids of a chat: `hash`, how text is split, and the template."""
        spec = self._json("tokenizer.json")
        parts = [self.hash, spec.get("normalizer"), spec.get("pre_tokenizer"), self.template_text]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def is_ours(self) -> bool:
        """Whether train_tokenizer.py made it: it then has all the MARKERS."""
        return all(marker in self.marker_ids for marker in MARKERS)

    def require_same(self, other: "ChatTokenizer", what: str, whose: str) -> None:
        """TokenizerError, which names both, if the other one numbers its tokens otherwise."""
        if self.hash != other.hash:
            raise TokenizerError(
                f"{what} has another tokenizer than {whose}: {self.source} ({self.vocab_size} tokens, {self.hash[:8]}) "
                f"against {other.source} ({other.vocab_size} tokens, {other.hash[:8]}): give the one that belongs to it"
            )

    # ------------------------------------------------------------------------------------------------ ids and text

    def encode_piece(self, text: str, begins: bool, after_marker: bool) -> list[int]:
        """Ids of a part of a longer text: its very beginning, what comes after a marker, or what goes on."""
        prefixed = begins or after_marker and not self._prefix_at_beginning_only
        return (self.plain if prefixed else self._going_on).encode(text, add_special_tokens=False).ids

    def get_vocab(self) -> dict[str, int]:
        return self.full.get_vocab()

    def get_vocab_size(self) -> int:
        """The ids there are, whether all of them are used or not."""
        return self.vocab_size

    def token_to_id(self, token: str) -> int | None:
        return self.full.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.full.id_to_token(token_id)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.full.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in UTF-8; nothing for a hidden marker, or for an id that no token has."""
        if token_id in self.hidden_ids or (token := self.full.id_to_token(token_id)) is None:
            return b""
        if token in self.marker_ids or token_id in self._texts_added:
            return token.encode()
        if self._byte_level:
            return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in token)
        if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
            return bytes.fromhex(byte[1])
        return f" {token}".encode() if self._words else token.replace("\u2581", " ").encode()

    # ------------------------------------------------------------------------------------------------ special tokens

    def special(self, name: str) -> str | None:
        """The text of "bos_token", "eos_token", "pad_token" or "unk_token", as the folder names it."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self._json(file).get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def special_id(self, name: str) -> int | None:
        text = self.special(name)
        return None if text is None else self.full.token_to_id(text)

    @property
    def max_length(self) -> int | None:
        """For how many tokens the folder says that its model is made."""
        length = self._config.get("model_max_length")
        return length if isinstance(length, int) and 0 < length < 1 << 24 else None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: end of text, end of turn, and of ours the beginning of another turn."""
        if self.is_ours:
            return frozenset(self.marker_ids[marker] for marker in (PAD, BOS, EOS))
        named = self._json("generation_config.json").get("eos_token_id")
        ids = {*(named if isinstance(named, list) else [named]), self.special_id("eos_token"), self.turn_end_id}
        return frozenset(i for i in ids if isinstance(i, int))

    @cached_property
    def eos_id(self) -> int:
        """The end of a turn, or of a text where there are no turns; 0 where nothing says which that is."""
        ids = (self.turn_end_id, self.special_id("eos_token"), self.marker_ids.get(PAD))
        return next((i for i in ids if i is not None), 0)

    @cached_property
    def pad_id(self) -> int:
        ids = (self.special_id("pad_token"), self.marker_ids.get(PAD), self.eos_id)
        return next(i for i in ids if i is not None)

    @cached_property
    def bos_id(self) -> int:
        bos = self.special_id("bos_token")
        return self.eos_id if bos is None else bos

    @cached_property
    def text_prefix(self) -> list[int]:
        """What stands before a text that is continued: what this tokenizer's own models have seen there."""
        if self.is_ours:
            return [self.marker_ids[PAD]]
        template = self.full.encode("").ids
        bos = self.special_id("bos_token")
        return template or ([] if bos is None else [bos])

    @cached_property
    def document_id(self) -> int:
        """What stands before a document in pretraining."""
        return self.text_prefix[-1] if self.text_prefix else self.marker_ids.get(PAD, self.eos_id)

    # ------------------------------------------------------------------------------------------------ chats

    @cached_property
    def template_text(self) -> str | None:
        """The Jinja chat template of the folder; ours where it has none, if need be with the markers that it has."""
        template = self.files.get("chat_template.jinja") or self._config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default") or next(iter(named.values()), None)
        if isinstance(template, str) and template.strip():
            return template
        ours = TEMPLATE_FILE.read_text(encoding="utf-8")
        if BOS in self.marker_ids and EOS in self.marker_ids:
            return ours
        end = self.special("eos_token")
        begin = self.special("bos_token") or end
        is_plain = begin in self.marker_ids and end in self.marker_ids and not re.search(r"['\\]", f"{begin}{end}")
        return ours.replace(BOS, begin).replace(EOS, end) if is_plain else None

    @cached_property
    def has_own_template(self) -> bool:
        """Whether chats are rendered by the Jinja template: there is one, and it is not ours as it is."""
        text = self.template_text
        return text is not None and text.strip() != TEMPLATE_FILE.read_text(encoding="utf-8").strip()

    @property
    def brings_template(self) -> bool:
        return bool(self.files.get("chat_template.jinja") or self._config.get("chat_template"))

    @property
    def chat_files(self) -> dict[str, str]:
        """`files`, and the template by which chats are rendered if they hold none."""
        if self.brings_template or not self.template_text:
            return self.files
        return self.files | {TEMPLATE_FILE.name: self.template_text}

    @cached_property
    def turn_end_id(self) -> int | None:
        """The marker that ends an assistant's turn; None if chats cannot be rendered."""
        from dataset.template import turn_end

        return turn_end(self) if self.has_own_template else self.marker_ids.get(EOS)

    @cached_property
    def answer_markers(self) -> dict[int, str]:
        """Ids that are markers in an answer: what thinking and calls begin and end with, and what is hidden."""
        names = {i: marker for marker, i in self.marker_ids.items()}
        sections = {i: marker for i, marker in names.items() if marker in SECTION_MARKERS}
        return {i: names[i] for i in self.hidden_ids if i in names} | sections

    def opens_thinking(self, prompt_ids: list[int]) -> bool:
        """Whether the last marker of a prompt is <think>: its answer begins inside of a thinking block."""
        think, names = self.marker_ids.get(THINK), set(self.marker_ids.values())
        return think is not None and next((i for i in reversed(prompt_ids) if i in names), None) == think


def _without_markers(spec: dict, markers: Iterable[str]) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer with the markers under names that no text has, so that every id stays what it is; and the same for
    text that goes on, without the blank that SentencePiece puts before the first word."""
    secret = secrets.token_hex(16)
    renamed = {marker: f"\ufdd0{secret}-{n}" for n, marker in enumerate(markers)}
    spec, model = dict(spec), dict(spec["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {renamed.get(token, token): i for token, i in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[renamed.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    spec["model"], spec["post_processor"] = model, None
    # Those that the vocabulary has need not be added; the others hold the places of their ids.
    known = vocab if isinstance(vocab, dict) else {token for token, _ in vocab}
    spec["added_tokens"] = [
        token | {"content": renamed.get(token["content"], token["content"])}
        for token in spec.get("added_tokens") or []
        if not (token["content"] in renamed and token["content"] in known)
    ]
    plain = Tokenizer.from_str(json.dumps(spec))
    going_on = _without_prefix(spec)
    return plain, Tokenizer.from_str(json.dumps(going_on)) if going_on != spec else plain


def _without_prefix(step: Any) -> Any:
    """The normalizers and pre-tokenizers of a tokenizer.json, without the blank that they put before a text."""
    if isinstance(step, list):
        return [_without_prefix(part) for part in step if not isinstance(part, dict) or part.get("type") != "Prepend"]
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    names = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")
    step = step | {name: _without_prefix(step[name]) for name in names if name in step}
    if step.get("type") == "Metaspace":
        step |= {"prepend_scheme": "never"}
    if step.get("type") == "ByteLevel":
        step |= {"add_prefix_space": False}
    return step


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
