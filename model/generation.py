"""KV cache, prefill and decode, sampling, streaming, batched generation: the only decode loop there is.

results = generate(model, [[0, 17, 4], [0, 8]], SamplingParams(temperature=0.7, top_p=0.9), tokenizer)
for piece in generate_stream(model, prompt_ids, SamplingParams(), tokenizer): print(piece, end="", flush=True)
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.model import MiniMindConfig, MiniMindLM

PREFILL_CHUNK = 512  # tokens of each prompt that one forward takes
PREFILL_LOGITS = 1 << 26  # at most so many logits in one forward: chunks shrink when the batch or vocabulary is large
READ_BLOCK = 64  # the cache is read up to the longest sequence, rounded up to this, for aligned attention kernels
NUCLEUS = 256  # top-p looks at so many tokens first: sorting the whole vocabulary takes longer than a nano model's step


# ------------------------------------------------------------------------------------------------ cache


class KVCache:
    """Keys and values of all layers, preallocated; every sequence of the batch has its own length.

    A forward of T tokens writes at each sequence's length, and a query at position p sees the keys j <= p. So prompts
    of different lengths are simply padded on the right: what padding wrote is overwritten before it can be seen.
    """

    def __init__(
        self, config: MiniMindConfig, batch: int, max_len: int, device: torch.device | str, dtype: torch.dtype
    ):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (layers, B, KV, S, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.max_len = max_len
        self.set_lengths([0] * batch)

    def set_lengths(self, lengths: list[int]) -> None:
        """Tokens held of each sequence. Kept here and on the device, so that nothing waits for the device."""
        self.lengths = lengths
        self.lengths_on_device = torch.tensor(lengths, device=self.k.device)  # (B,)

    def advance(self, n: int) -> None:
        """After a forward of n tokens."""
        self.lengths = [length + n for length in self.lengths]
        self.lengths_on_device += n

    def free(self, row: int) -> None:
        """The sequence has ended: its row starts over at 0, so that it can neither overflow nor widen what is read."""
        self.lengths[row] = 0
        self.lengths_on_device[row] = 0

    def keep(self, rows: list[int]) -> None:
        """Only these rows stay in the batch."""
        index = torch.tensor(rows, device=self.k.device)
        self.k, self.v = self.k.index_select(1, index), self.v.index_select(1, index)
        self.set_lengths([self.lengths[row] for row in rows])

    # The model calls the three below in this order: positions, mask, and update in each layer.

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens, (B, T)."""
        longest = max(self.lengths)
        if longest + T > self.max_len:
            raise ValueError(f"{longest} tokens and {T} more do not fit a cache of {self.max_len}")
        self.start = longest if min(self.lengths) == longest else None  # where all rows write, if at one place
        self.read = min(self.max_len, -(-(longest + T) // READ_BLOCK) * READ_BLOCK)
        self.write_at = self.lengths_on_device[:, None] + torch.arange(T, device=self.k.device)
        return self.write_at

    def mask(self, T: int) -> Tensor | None:
        """Which keys a query sees, (B, 1, T, S) bool; None in an empty cache: plain causal attention."""
        if self.start == 0:
            return None
        return (torch.arange(self.read, device=self.k.device) <= self.write_at[..., None])[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, KV, T, D) of the new tokens; returns all that they may attend to, (B, KV, S, D)."""
        T = k.shape[2]
        if self.start is not None:
            self.k[layer, :, :, self.start : self.start + T] = k
            self.v[layer, :, :, self.start : self.start + T] = v
            if self.start == 0:
                return k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            self.k[layer][rows, :, self.write_at] = k.transpose(1, 2).to(self.k.dtype)  # (B, T, KV, D)
            self.v[layer][rows, :, self.write_at] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, : self.read], self.v[layer, :, :, : self.read]


# ------------------------------------------------------------------------------------------------ sampling


@dataclass
class SamplingParams:
    """How one sequence is continued. Filters apply in the order of transformers: repetition penalty, temperature,
    top-k, top-p, min-p. `temperature` 0 takes the likeliest token. `seed` gives the same text whatever else is in the
    batch; None draws one from torch's generator. `stop_token_ids` None: the model's end-of-sequence token."""

    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        checks = [
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 = off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("stop", all(self.stop), "without empty strings"),
        ]
        for name, good, needed in checks:
            if not good:
                raise ValueError(f"{name} {getattr(self, name)} must be {needed}")


class Sampler:
    """Logits (B, vocab) -> token ids (B,): each row by its own parameters, all rows at once."""

    def __init__(self, params: list[SamplingParams], prompts: list[list[int]], vocab_size: int, device: torch.device):
        def column(values: list, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]  # (B, 1)

        self.params = params
        self.greedy = column([p.temperature == 0 for p in params], torch.bool)
        self.temperature = column([p.temperature or 1.0 for p in params])
        self.top_k = column([min(p.top_k or vocab_size, vocab_size) for p in params], torch.long)
        self.top_p = column([p.top_p for p in params])
        self.min_p = column([p.min_p for p in params])
        self.penalty = column([p.repetition_penalty for p in params])
        self.random = torch.zeros(len(params), max(p.max_new_tokens for p in params))  # (B, steps), one number a token
        for row, p in enumerate(params):
            seed = int(torch.randint(1 << 62, ())) if p.seed is None else p.seed
            generator = torch.Generator().manual_seed(seed)
            self.random[row, : p.max_new_tokens] = torch.rand(p.max_new_tokens, generator=generator)
        self.random = self.random.to(device)
        self.seen = None  # (B, vocab) tokens of prompt and answer, for the repetition penalty
        if any(p.repetition_penalty != 1 for p in params):
            self.seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, device=device)] = True

    def keep(self, rows: list[int]) -> None:
        """Only these rows stay in the batch."""
        index = torch.tensor(rows, device=self.top_k.device)
        for name in ("greedy", "temperature", "top_k", "top_p", "min_p", "penalty", "random", "seen"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[index])
        self.params = [self.params[row] for row in rows]

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """The token number `step` of each answer, (B,)."""
        logits = self.penalise(logits.float())
        tokens = logits.argmax(-1)
        if any(p.temperature > 0 for p in self.params):
            probs = self.filter(logits).softmax(-1)
            tokens = torch.where(self.greedy[:, 0], tokens, sample(probs, self.random[:, step]))
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def penalise(self, logits: Tensor) -> Tensor:
        """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858)."""
        if self.seen is None:
            return logits
        penalised = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self.seen, penalised, logits)

    def filter(self, logits: Tensor) -> Tensor:
        """Temperature, then top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751) and min-p (Nguyen et al. 2024,
        arXiv:2407.01082): what is filtered out becomes -inf."""
        logits = logits / self.temperature
        if any(0 < p.top_k < logits.shape[-1] for p in self.params):
            ordered = logits.topk(int(self.top_k.max()), dim=-1).values
            logits = logits.masked_fill(logits < ordered.gather(1, self.top_k - 1), float("-inf"))
        if any(p.top_p < 1 for p in self.params):
            logits = logits.masked_fill(~self.nucleus(logits.softmax(-1)), float("-inf"))
        if any(p.min_p > 0 for p in self.params):
            probs = logits.softmax(-1)
            logits = logits.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), float("-inf"))
        return logits

    def nucleus(self, probs: Tensor) -> Tensor:
        """Which tokens top-p keeps, (B, vocab) bool: those with less than top_p of the mass on likelier ones."""
        top, order = probs.topk(min(NUCLEUS, probs.shape[-1]), dim=-1)
        if (top.sum(-1, keepdim=True) < self.top_p)[self.top_p < 1].any():
            top, order = probs.sort(dim=-1, descending=True)
        keep = top.cumsum(-1) - top < self.top_p
        return torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, keep) | (self.top_p == 1)


def sample(probs: Tensor, random: Tensor) -> Tensor:
    """One token of each row of probs (B, vocab), by inverting the cumulative distribution at random (B,) in [0, 1)."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that the token found has a probability above 0.
    at = torch.minimum(random[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


# ------------------------------------------------------------------------------------------------ text


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


# ------------------------------------------------------------------------------------------------ generation


class Event(NamedTuple):
    """One new token of one sequence."""

    index: int  # of its prompt
    token_id: int
    text: str  # what can be shown now; "" without a tokenizer
    finish_reason: str | None  # "stop" (stop token or string), "length", None: goes on
    logprob: float | None  # of the token by the model alone: before temperature and filters


@dataclass
class Result:
    """One finished sequence. `token_ids` hold all that was generated, also the stop token or string; `text` ends before
    it, and is "" without a tokenizer."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[float] | None = None


def prefill(model: MiniMindLM, cache: KVCache, prompts: list[list[int]], chunk: int = PREFILL_CHUNK) -> Tensor:
    """Fill an empty cache with the prompts; logits that follow each one's last token, (B, vocab)."""
    B, T, vocab = len(prompts), max(map(len, prompts)), model.config.vocab_size
    padded = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts], device=cache.k.device)
    chunk = max(1, min(chunk, PREFILL_LOGITS // (B * vocab)))
    last = torch.empty(B, vocab, device=cache.k.device, dtype=cache.k.dtype)
    for start in range(0, T, chunk):
        logits = model(padded[:, start : start + chunk], cache=cache).logits
        cache.advance(logits.shape[1])
        rows = [row for row, prompt in enumerate(prompts) if start < len(prompt) <= start + chunk]
        last[rows] = logits[rows, [len(prompts[row]) - 1 - start for row in rows]].to(last.dtype)
    cache.set_lengths([len(prompt) for prompt in prompts])
    if not last.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or overflow in this dtype")
    return last


@torch.inference_mode()
def decode(
    model: MiniMindLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    tokenizer: Tokenizer | None = None,
    *,
    max_len: int | None = None,
    logprobs: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[list[Event]]:
    """Continue all prompts as one batch; yields after each step the events of the sequences that still run.

    max_len: prompt and answer together, at most (default and limit: the model's max_position_embeddings). Raises
    ValueError for an empty prompt, one that leaves no room for an answer, or stop strings without a tokenizer.
    """
    limit = min(max_len or model.config.max_position_embeddings, model.config.max_position_embeddings)
    room = []  # how many tokens each answer may have
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: at least one token is needed to continue from")
        if len(prompt) >= limit:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, but at most {limit - 1} fit a context of {limit}")
        if p.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        room.append(min(p.max_new_tokens, limit - len(prompt)))
    stop_ids = [{model.config.eos_token_id} if p.stop_token_ids is None else set(p.stop_token_ids) for p in params]
    streams = [TextStream(tokenizer, p.stop) if tokenizer else None for p in params]

    training = model.training
    model.eval()
    try:
        weight = model.model.embed_tokens.weight
        longest = max(len(prompt) + n for prompt, n in zip(prompts, room, strict=True))
        cache = KVCache(model.config, len(prompts), longest, weight.device, weight.dtype)
        sampler = Sampler(params, prompts, model.config.vocab_size, weight.device)
        logits = prefill(model, cache, prompts, prefill_chunk)
        rows: list[int | None] = list(range(len(prompts)))  # which prompt each row of the batch continues; None: ended
        step = 0
        while True:
            tokens = sampler(logits, step)
            step += 1
            chosen = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist() if logprobs else None
            events = []
            for row, (i, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                if i is None:
                    continue
                reason, text = None, ""
                if token in stop_ids[i]:
                    reason = "stop"
                elif streams[i]:
                    text = streams[i].push(token)
                    reason = "stop" if streams[i].stopped else None
                if reason is None and step == room[i]:
                    reason = "length"
                if reason and streams[i]:
                    text += streams[i].close(cut=reason == "length")
                events.append(Event(i, token, text, reason, chosen[row] if chosen else None))
                if reason:
                    rows[row] = None
                    cache.free(row)
            yield events

            alive = [row for row, i in enumerate(rows) if i is not None]
            if not alive:
                return
            if len(alive) <= 0.75 * len(rows):  # copying the cache at every end would cost more than the idle rows
                cache.keep(alive)
                sampler.keep(alive)
                tokens, rows = tokens[alive], [rows[row] for row in alive]
            logits = model(tokens[:, None], cache=cache).logits[:, -1]  # (B, vocab)
            cache.advance(1)
    finally:
        model.train(training)


def generate_each(
    model: MiniMindLM,
    prompts: list[list[int]],
    params: SamplingParams | list[SamplingParams],
    tokenizer: Tokenizer | None = None,
    *,
    batch_size: int = 64,
    **options,
) -> Iterator[tuple[int, Result]]:
    """(index, result) of each prompt as it ends, in batches of prompts of similar length. Options: as decode()."""
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        results = [Result(logprobs=[] if options.get("logprobs") else None) for _ in batch]
        batch_params = [params[i] for i in batch]
        for events in decode(model, [prompts[i] for i in batch], batch_params, tokenizer, **options):
            for event in events:
                result = results[event.index]
                result.token_ids.append(event.token_id)
                result.text += event.text
                if result.logprobs is not None:
                    result.logprobs.append(event.logprob)
                if event.finish_reason:
                    result.finish_reason = event.finish_reason
                    yield batch[event.index], result


def generate(model: MiniMindLM, prompts: list[list[int]], *args, **kwargs) -> list[Result]:
    """The results of generate_each(), in the order of the prompts."""
    return [result for _, result in sorted(generate_each(model, prompts, *args, **kwargs), key=lambda pair: pair[0])]


def generate_stream(
    model: MiniMindLM, prompt: list[int], params: SamplingParams, tokenizer: Tokenizer, **options
) -> Iterator[str]:
    """The answer to one prompt, piece by piece as it is generated. Options: as decode()."""
    for events in decode(model, [prompt], [params], tokenizer, **options):
        if events[0].text:
            yield events[0].text
