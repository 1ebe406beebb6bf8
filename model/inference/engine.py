"""One engine for all generation: slots with a KV cache, chunked prefill, continuous batching, prefix reuse, adapters.

results = generate(model, [[0, 17, 4], [0, 8]], SamplingParams(temperature=0.7, top_p=0.9), tokenizer)
for piece in generate_stream(model, prompt_ids, SamplingParams(), tokenizer): print(piece, end="", flush=True)

engine = Engine(model, tokenizer, slots=8)
request = engine.add(prompt_ids, SamplingParams())
while engine.busy:
    for event in engine.step(): ...   # requests may be added and cancelled between any two steps
"""

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.inference.cpu_step import CpuStep, library_for
from model.inference.cuda_step import CudaStep, require_recordable
from model.inference.kv_cache import KVCache
from model.inference.sampling import Sampler, SamplingParams, SamplingState, make_samplers
from model.inference.text_stream import TextStream
from model.model import MiniMindLM, active_adapter, lora_layers

PREFILL_CHUNK = 512  # tokens of prompts that one step takes
FIRST_CAPACITY = 256  # tokens of each slot to begin with: the cache doubles when it has to
WORTH_COPYING = 16  # tokens of a prompt that are taken from another slot's cache
WORTH_WAITING = 64  # tokens more than can be copied now, if a step later they can


# ------------------------------------------------------------------------------------------------ engine


class Event(NamedTuple):
    """One new token of one request."""

    index: int  # the request's number
    token_id: int
    text: str  # what can be shown now; "" without a tokenizer
    finish_reason: str | None  # "stop" (stop token or string), "length", None: goes on
    logprob: float | None  # of the token by the model alone: before penalties, temperature and filters
    top_logprobs: list[tuple[int, float]] | None  # the likeliest tokens, also by the model alone


@dataclass(eq=False)
class Sequence:
    """A request, waiting or running."""

    number: int
    ids: list[int]  # prompt and answer
    params: SamplingParams
    adapter: str | None
    end: int  # tokens of prompt and answer at most
    stream: TextStream | None
    state: SamplingState


@dataclass(eq=False)
class Slot:
    """A row of the cache: the tokens whose keys and values it holds, also after their sequence has ended."""

    tokens: list[int] = field(default_factory=list)
    adapter: str | None = None  # which computed them
    sequence: Sequence | None = None
    used: int = 0  # the step in which it was last used

    @property
    def pending(self) -> int:
        """Tokens of its sequence that the cache does not hold yet; 1 while it decodes."""
        return len(self.sequence.ids) - len(self.tokens) if self.sequence else 0

    @property
    def order(self) -> tuple[int, str]:
        """Slots that decode come first, those of one adapter side by side; then those in prefill, then the free."""
        if self.sequence is None:
            return 2, ""
        return int(self.pending > 1), self.adapter or ""


class Engine:
    """Continues any number of prompts; each joins and leaves whenever it likes.

    What a request gets does not depend on what else runs: each row of a step is computed and sampled on its own. With
    torch's kernels this holds in fp32 token for token, but for near ties: they add up in another order for another
    number of rows, which moves logits by about 1e-6 of their size. The compiled step has one order for all.

    slots: sequences that run at once, the others wait in order. max_len: prompt and answer together, at most (default
    and limit: the model's max_position_embeddings). prefill_chunk: tokens of prompts that one step takes, so that a
    long prompt holds up the others by no more than that. compiled: what decoding_step() takes, or has returned.
    Not for several threads at once. The weights must not change while requests run or caches are to be reused.
    """

    def __init__(
        self,
        model: MiniMindLM,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        max_len: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        compiled: CpuStep | CudaStep | bool | None = None,
    ):
        if slots < 1 or prefill_chunk < 1:
            raise ValueError(f"slots {slots} and prefill_chunk {prefill_chunk} must be at least 1")
        self.model, self.tokenizer, self.prefill_chunk = model.eval(), tokenizer, prefill_chunk
        self.max_len = min(max_len or model.config.max_position_embeddings, model.config.max_position_embeddings)
        weight = model.model.norm.weight
        capacity = min(self.max_len, FIRST_CAPACITY)
        fast = compiled if isinstance(compiled, CpuStep | CudaStep) else decoding_step(model, compiled)
        self.cpu_step = fast if isinstance(fast, CpuStep) else None
        self.cuda_step = fast if isinstance(fast, CudaStep) else None
        of_cache = (self.cpu_step.cache_dtype, self.cpu_step.lanes) if self.cpu_step else (weight.dtype, None)
        self.cache = KVCache(model.config, slots, capacity, weight.device, *of_cache)
        self.slots = [Slot() for _ in range(slots)]  # in the order of the cache's rows
        self.queue: deque[Sequence] = deque()
        self.lora_layers = list(lora_layers(model).values())  # with the adapters that requests may name
        self.sampled: list[SamplingState] = []  # whom the samplers are for
        self.samplers: list[Sampler] = []
        self.requests = self.steps = 0  # so far

    @property
    def running(self) -> int:
        return sum(slot.sequence is not None for slot in self.slots)

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def busy(self) -> bool:
        return self.waiting > 0 or self.running > 0

    def add(self, prompt: list[int], params: SamplingParams, adapter: str | None = None) -> int:
        """A new request, which joins at the next step; returns its number. adapter: the name of one of the model's
        LoRA adapters; None = the one that is active in the model, if any. Raises ValueError for what cannot be served:
        an empty prompt, one that leaves no room for an answer, unknown tokens or adapters."""
        vocab = self.model.config.vocab_size
        if not prompt:
            raise ValueError("the prompt is empty: at least one token is needed to continue from")
        if len(prompt) >= self.max_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but at most {self.max_len - 1} fit a context of {self.max_len}"
            )
        for what, ids in (("prompt", prompt), ("logit_bias", params.logit_bias)):
            if unknown := [i for i in ids if not 0 <= i < vocab]:
                raise ValueError(f"{what}: there is no token {unknown[0]}; the vocabulary has {vocab}")
        if params.top_logprobs is not None and params.top_logprobs > vocab:
            raise ValueError(f"top_logprobs {params.top_logprobs}: the vocabulary has {vocab} tokens")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        layers = self.lora_layers
        if adapter is None:
            adapter = next((layer.active for layer in layers if layer.adapts), None)
        else:
            if not any(adapter in layer.configs for layer in layers):
                known = sorted({name for layer in layers for name in layer.configs})
                raise ValueError(f"there is no adapter {adapter}; the model has {', '.join(known) or 'none'}")
            if any(layer.unmerged is not None for layer in layers):
                raise ValueError(f"adapter {adapter}: another one is merged into the weights; unmerge it first")
        stop_ids = {self.model.config.eos_token_id} if params.stop_token_ids is None else set(params.stop_token_ids)
        stream = TextStream(self.tokenizer, params.stop) if self.tokenizer else None
        state = SamplingState(params, prompt, vocab, self.cache.k.device, stop_ids)
        end = min(len(prompt) + params.max_new_tokens, self.max_len)
        self.queue.append(Sequence(self.requests, list(prompt), params, adapter, end, stream, state))
        self.requests += 1
        return self.requests - 1

    @torch.inference_mode()
    def cancel(self, request: int) -> None:
        """Forget a request and free its slot at once. One that has ended, or never was, is ignored."""
        self.queue = deque(sequence for sequence in self.queue if sequence.number != request)
        for slot in self.slots:
            if slot.sequence and slot.sequence.number == request:
                slot.sequence = None
        self._arrange()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for each running sequence, and one chunk of prefill; [] if there is nothing to say."""
        self.steps += 1
        ready = [slot for slot in self.slots if slot.pending == 1]
        logits = [self._forward(list(group)) for _, group in groupby(ready, key=lambda slot: slot.adapter)]
        if batch := self._next_prefill():
            logits.append(self._forward(batch))
            ready += [slot for slot in batch if slot.pending == 0]
        if not ready:
            return []
        events = self._sample([slot.sequence for slot in ready], torch.cat(logits) if len(logits) > 1 else logits[0])
        for slot, event in zip(ready, events, strict=True):
            slot.used = self.steps
            if event.finish_reason:
                slot.sequence = None
        if batch or any(event.finish_reason for event in events):
            self._arrange()
        return events

    def _arrange(self) -> None:
        """Move slots to where their `order` wants them, with as few copies as possible: so each forward finds its rows
        side by side and reads the cache in place."""
        has = [slot.order for slot in self.slots]
        for row, wanted in enumerate(sorted(has)):
            if has[row] != wanted:
                other = max(i for i in range(row + 1, len(has)) if has[i] == wanted)
                self.cache.swap(row, other)
                for items in (self.slots, has):
                    items[row], items[other] = items[other], items[row]

    def _next_prefill(self) -> list[Slot]:
        """The slots whose prompts are computed in this step: the one that is under way, and as many new ones as fit."""
        batch = [slot for slot in self.slots if slot.pending > 1]
        if not batch and not self.queue:
            return []
        longest = max((min(slot.pending, self.prefill_chunk) for slot in batch), default=0)
        while self.queue and self.running < len(self.slots):
            sequence = self.queue[0]
            donor, reused = self._longest_prefix(sequence)
            longest = max(longest, min(len(sequence.ids) - reused, self.prefill_chunk))
            if batch and (
                (len(batch) + 1) * longest > self.prefill_chunk
                or sequence.adapter != batch[0].adapter
                # What one of the batch computes now can be copied in the next step.
                or any(common_prefix(slot.sequence.ids, sequence.ids) > reused + WORTH_WAITING for slot in batch)
            ):
                break
            batch.append(self._admit(self.queue.popleft(), donor, reused))
        self._arrange()
        # A slot whose prompt was cached but for its last token decodes from the next step on.
        return [slot for slot in self.slots if slot.pending > 1]

    def _longest_prefix(self, sequence: Sequence) -> tuple[Slot, int]:
        """The slot whose cache begins with the most tokens of the prompt, and how many; the last token is always
        computed, as its logits are needed."""
        held = [
            common_prefix(slot.tokens, sequence.ids[:-1]) if slot.adapter == sequence.adapter else 0
            for slot in self.slots
        ]
        best = max(range(len(held)), key=held.__getitem__)
        return self.slots[best], held[best] if held[best] >= WORTH_COPYING else 0

    def _admit(self, sequence: Sequence, donor: Slot, reused: int) -> Slot:
        """Give the sequence a free slot that holds what the donor's cache has of its prompt."""
        free = [slot for slot in self.slots if slot.sequence is None]
        # A slot that would lose most of what it holds gives a copy, and can be continued later.
        if donor in free and (2 * reused >= len(donor.tokens) or len(free) == 1):
            slot = donor
        else:
            slot = min((slot for slot in free if slot is not donor), key=lambda slot: slot.used)
        row = self.slots.index(slot)
        if slot is not donor and reused:
            self.cache.copy(self.slots.index(donor), row, reused)
        self.cache.lengths[row] = reused
        slot.tokens, slot.adapter = sequence.ids[:reused], sequence.adapter
        slot.sequence, slot.used = sequence, self.steps
        return slot

    # ------------------------------------------------------------------------------------------------ one step

    def _forward(self, slots: list[Slot]) -> Tensor:
        """Compute the pending tokens, at most a chunk, of slots that are side by side and have one adapter; logits of
        those that then have none pending, (n, vocab)."""
        first = self.slots.index(slots[0])
        new = [slot.sequence.ids[len(slot.tokens) :][: self.prefill_chunk] for slot in slots]
        if self.cpu_step:
            logits = self.cpu_step(new, first, self.cache, slots[0].adapter)
            ended = [len(tokens) == slot.pending for slot, tokens in zip(slots, new, strict=True)]
            self._hold(first, new)
            return logits if all(ended) else logits[ended]
        T = max(map(len, new))
        if self.cuda_step and all(slot.pending == 1 for slot in slots):
            logits = self.cuda_step([token for (token,) in new], first, self.cache, slots[0].adapter)
            self._hold(first, new)
            return logits
        device = self.cache.k.device
        ids = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens in new], device=device)  # (B, T)
        wanted = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (slot, tokens) in enumerate(zip(slots, new, strict=True)):
            wanted[row, len(tokens) - 1] = len(tokens) == slot.pending
        with active_adapter(self.model, slots[0].adapter):
            window = self.cache.window(first, len(slots), T)
            logits = self.model(ids, cache=window, logits_at=wanted.to(device)).logits
        self._hold(first, new)
        return logits

    def _hold(self, first: int, new: list[list[int]]) -> None:
        """The cache has these tokens now, of the slots from `first` on."""
        for row, tokens in enumerate(new, first):
            self.slots[row].tokens += tokens
            self.cache.lengths[row] += len(tokens)

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[Event]:
        """The next token of each sequence from logits (B, vocab), and what it means."""
        if not logits.amax(-1).isfinite().all():  # nan and inf both show in the maximum
            raise ValueError("the model's logits are not finite: damaged weights, or too large for their dtype")
        states = [sequence.state for sequence in sequences]
        if states != self.sampled:
            self.sampled, self.samplers = states, make_samplers(states, logits.shape[-1], logits.device)
        logprobs = self._logprobs(sequences, logits)
        parts = logits.split([len(sampler.states) for sampler in self.samplers])
        tokens = [token for sampler, part in zip(self.samplers, parts, strict=True) for token in sampler(part)]
        events = []
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            sequence.ids.append(token)
            reason, text, stream = None, "", sequence.stream
            if token in sequence.state.stop_ids:
                reason = "stop"
            elif stream:
                text = stream.push(token)
                reason = "stop" if stream.stopped else None
            if reason is None and len(sequence.ids) == sequence.end:
                reason = "length"
            if reason and stream:
                text += stream.close(cut=reason == "length")
            own = top = None
            if row in logprobs:
                own = float(logprobs[row][token])
                values, ids = logprobs[row].topk(sequence.params.top_logprobs)
                top = list(zip(ids.tolist(), values.tolist(), strict=True))
            events.append(Event(sequence.number, token, text, reason, own, top))
        return events

    def _logprobs(self, sequences: list[Sequence], logits: Tensor) -> dict[int, Tensor]:
        """Log-probabilities (vocab,) of the rows that want some."""
        wanted = [row for row, sequence in enumerate(sequences) if sequence.params.top_logprobs is not None]
        return {row: logits[row].float().log_softmax(-1) for row in wanted}


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def decoding_step(model: MiniMindLM, compiled: bool | None = None) -> CpuStep | CudaStep | None:
    """What computes several times as fast as torch's way: the compiled step on a CPU, recorded graphs on a CUDA card;
    None: nothing does. `compiled` as step_works()."""
    if not step_works(model, compiled):
        return None
    return CudaStep(model) if model.inv_freq.is_cuda else CpuStep(model)


def step_works(model: MiniMindLM, compiled: bool | None) -> bool:
    """Whether there is a faster step to take.

    compiled None: wherever it works; a model on a CUDA card, or in fp32 or packed on a CPU, that has to do without is
    told so, once. True: raises OSError, RuntimeError or ValueError where it does not work. False: never."""
    if compiled is False:
        return False
    weight = model.model.norm.weight
    on_card = weight.device.type == "cuda"
    try:
        (require_recordable if on_card else library_for)(model)
    except (OSError, RuntimeError, ValueError) as error:
        if compiled:
            raise
        if on_card or (weight.device.type == "cpu" and weight.dtype == torch.float32):
            kind = "recorded graphs" if on_card else "the compiled step"
            _say_once(f"note: computing without {kind}, which is slower: {error}")
        return False
    return True


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


# ------------------------------------------------------------------------------------------------ many prompts at once


@dataclass
class Result:
    """One finished sequence. `token_ids` hold all that was generated, also the stop token or string; `text` ends before
    it, and is "" without a tokenizer."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[float] | None = None  # of the tokens, if top_logprobs was given


def decode(
    model: MiniMindLM,
    prompts: list[list[int]],
    params: SamplingParams | list[SamplingParams],
    tokenizer: Tokenizer | None = None,
    *,
    batch_size: int = 64,
    **options,
) -> Iterator[list[Event]]:
    """Continue all prompts, `batch_size` at once; yields the events of each step, whose index is the prompt's number.

    Options: as Engine's. Raises ValueError for a prompt that cannot be served.
    """
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    training = model.training
    slots = max(1, min(batch_size, len(prompts)))
    try:
        engine = Engine(model, tokenizer, slots=slots, **options)
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            try:
                engine.add(prompt, p)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from None
        while engine.busy:
            if events := engine.step():
                yield events
    finally:
        model.train(training)


def generate_each(model: MiniMindLM, prompts: list[list[int]], *args, **kwargs) -> Iterator[tuple[int, Result]]:
    """(index, result) of each prompt as it ends. Arguments: as decode()."""
    results = [Result() for _ in prompts]
    for events in decode(model, prompts, *args, **kwargs):
        for event in events:
            result = results[event.index]
            result.token_ids.append(event.token_id)
            result.text += event.text
            if event.logprob is not None:
                result.logprobs = result.logprobs or []
                result.logprobs.append(event.logprob)
            if event.finish_reason:
                result.finish_reason = event.finish_reason
                yield event.index, result


def generate(model: MiniMindLM, prompts: list[list[int]], *args, **kwargs) -> list[Result]:
    """The results of generate_each(), in the order of the prompts."""
    return [result for _, result in sorted(generate_each(model, prompts, *args, **kwargs), key=lambda pair: pair[0])]


def generate_stream(
    model: MiniMindLM, prompt: list[int], params: SamplingParams, tokenizer: Tokenizer, **options
) -> Iterator[str]:
    """The answer to one prompt, piece by piece as it is generated. Options: as decode()."""
    for events in decode(model, [prompt], params, tokenizer, **options):
        if events[0].text:
            yield events[0].text
