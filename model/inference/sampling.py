"""Which token comes next: SamplingParams say how, Sampler chooses for all rows of a step at once.

sampler = Sampler([SamplingState(params, prompt, vocab_size, device) for params, prompt in ...])
tokens = sampler(logits)  # (B, vocab) -> B ids
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

CACHED = 1 << 17  # logits whose sampling stays in the second-level cache
SUM_BLOCK = 64  # probabilities added up together
RANDOM_BLOCK = 64  # random numbers drawn at a time


class Constraint(Protocol):
    """What a sequence may say, such as text of a JSON schema. A constraint belongs to one sequence."""

    def mask(self) -> Tensor:
        """Which tokens may come next, (vocab,) bool. None of them: the text is complete, only a stop token may come."""

    def accept(self, token: int) -> None:
        """This token came."""


COLDEST = 1e-5  # logits divided by much less are infinite, and as probabilities not numbers


@dataclass
class SamplingParams:
    """How one sequence is continued. The order is that of transformers: penalties, bias, constraint, temperature,
    top-k, top-p, min-p. `temperature` 0, or nearly that, takes the likeliest token. `seed` gives the same text whatever
    else is in the batch; None draws one from torch's generator. `stop_token_ids` None: the model's end-of-sequence
    token."""

    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of all tokens of prompt and answer: logits divided (positive) or multiplied
    seed: int | None = None
    max_new_tokens: int = 256
    min_new_tokens: int = 0  # no stop token before; a constraint that is complete ends the text all the same
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] | None = None
    presence_penalty: float = 0.0  # OpenAI's: subtracted once for a token that the answer has,
    frequency_penalty: float = 0.0  # and this as often as it has it
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to these tokens' logits
    top_logprobs: int | None = None  # n = log-probability of each token and of the n likeliest; None = none at all
    constraint: Constraint | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        checks = [
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0 and finite"),
            ("top_k", self.top_k >= 0, "at least 0 (0 = off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 and finite"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "between 0 and max_new_tokens",
            ),
            ("stop", all(self.stop), "without empty strings"),
            ("presence_penalty", abs(self.presence_penalty) <= 100, "between -100 and 100"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 100, "between -100 and 100"),
            ("logit_bias", all(abs(bias) <= 100 for bias in self.logit_bias.values()), "between -100 and 100"),
            ("top_logprobs", self.top_logprobs is None or self.top_logprobs >= 0, "at least 0, or None"),
        ]
        for name, good, needed in checks:
            if not good:
                raise ValueError(f"{name} {getattr(self, name)} must be {needed}")
        if self.temperature < COLDEST:
            self.temperature = 0.0


class SamplingState:
    """What the sampling of one sequence remembers: its random numbers, and the tokens that its penalties need."""

    def __init__(
        self, params: SamplingParams, prompt: list[int], vocab_size: int, device: torch.device, stop_ids: set[int]
    ):
        self.params, self.stop_ids = params, sorted(i for i in stop_ids if i < vocab_size)
        seed = int(torch.randint(1 << 62, ())) if params.seed is None else params.seed
        self.generator = torch.Generator().manual_seed(seed % (1 << 64))
        self.randoms: list[float] = []
        self.before_stop = params.min_new_tokens if self.stop_ids else 0  # tokens until one that stops may come
        self.seen = self.counts = None  # (vocab,) what the repetition, and the other two penalties look at
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        self.bias = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            self.bias = torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device)

    @property
    def adjusts(self) -> bool:
        """By more than a bias."""
        return self.before_stop > 0 or any(x is not None for x in (self.seen, self.counts, self.params.constraint))

    def random(self) -> float:
        """The next random number, in [0, 1)."""
        if not self.randoms:
            self.randoms = torch.rand(RANDOM_BLOCK, generator=self.generator).tolist()[::-1]
        return self.randoms.pop()

    def adjust(self, logits: Tensor) -> Tensor:
        """Penalties, bias and constraint on logits (vocab,) fp32.

        Repetition penalty: Keskar et al. 2019, arXiv:1909.05858. Presence and frequency: OpenAI's API reference."""
        p = self.params
        if self.seen is not None:
            penalised = torch.where(logits < 0, logits * p.repetition_penalty, logits / p.repetition_penalty)
            logits = torch.where(self.seen, penalised, logits)
        if self.counts is not None:
            logits = logits - p.frequency_penalty * self.counts - p.presence_penalty * (self.counts > 0)
        if self.bias is not None:
            logits = logits.index_add(0, *self.bias)
        if p.constraint is not None:
            allowed = p.constraint.mask().to(logits.device)
            if not allowed.any():
                allowed = torch.zeros_like(allowed).index_fill(0, torch.tensor(self.stop_ids, device=logits.device), 1)
            logits = logits.masked_fill(~allowed, float("-inf"))
        if self.before_stop > 0:
            going_on = logits.index_fill(0, torch.tensor(self.stop_ids, device=logits.device), float("-inf"))
            logits = going_on if going_on.isfinite().any() else logits
        return logits

    def accept(self, token: int) -> None:
        self.before_stop -= 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.params.constraint is not None and token not in self.stop_ids:
            self.params.constraint.accept(token)


class Sampler:
    """Logits (B, vocab) -> token ids: each row by its own parameters, all rows at once."""

    def __init__(self, states: list[SamplingState], vocab_size: int, device: torch.device):
        def column(values: list, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]  # (B, 1)

        self.states = states
        params = [state.params for state in states]
        self.adjusting = [row for row, state in enumerate(states) if state.adjusts]
        self.biased = [row for row, state in enumerate(states) if state.bias and not state.adjusts]
        if self.biased:
            ids, values = zip(*(states[row].bias for row in self.biased), strict=True)
            rows = [torch.full_like(some, row) for row, some in zip(self.biased, ids, strict=True)]
            self.bias = (torch.cat(rows), torch.cat(ids)), torch.cat(values)
        self.greedy = column([p.temperature == 0 for p in params], torch.bool)
        self.temperature = column([p.temperature or 1.0 for p in params])
        self.top_k = column([min(p.top_k or vocab_size, vocab_size) for p in params], torch.long)
        self.top_p = column([p.top_p if p.top_p < 1 else float("inf") for p in params])
        self.min_p = column([p.min_p for p in params])
        self.any_greedy, self.all_greedy = bool(self.greedy.any()), bool(self.greedy.all())
        self.any_temperature = any(p.temperature not in (0, 1) for p in params)
        self.any_top_k = any(0 < p.top_k < vocab_size for p in params)
        self.any_top_p = any(p.top_p < 1 for p in params)
        self.any_min_p = any(p.min_p > 0 for p in params)

    def __call__(self, logits: Tensor) -> list[int]:
        """The next token of each row."""
        logits = self.adjust(logits.float())
        if self.all_greedy:
            tokens = logits.argmax(-1)
        else:
            tokens = self.draw(self.probabilities(logits))
            if self.any_greedy:
                tokens = torch.where(self.greedy[:, 0], logits.argmax(-1), tokens)
        tokens = tokens.tolist()
        for row in self.adjusting:
            self.states[row].accept(tokens[row])
        return tokens

    def adjust(self, logits: Tensor) -> Tensor:
        """Penalties, bias and constraints of the rows that have some; a bias alone for all such rows at once."""
        if self.biased:
            logits = logits.index_put(*self.bias, accumulate=True)
        if not self.adjusting:
            return logits
        adjusted = torch.stack([self.states[row].adjust(logits[row]) for row in self.adjusting])
        return logits.index_copy(0, torch.tensor(self.adjusting, device=logits.device), adjusted)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Temperature, then top-k: (B, vocab)."""
        if self.any_temperature:
            logits = logits / self.temperature
        if self.any_top_k:
            ordered = logits.topk(int(self.top_k.max()), dim=-1).values
            logits = logits.masked_fill(logits < ordered.gather(1, self.top_k - 1), float("-inf"))
        return logits.softmax(-1)

    def draw(self, probs: Tensor) -> Tensor:
        """A token of each row of probs (B, vocab), by top-p (Holtzman et al. 2020, arXiv:1904.09751) and min-p (Nguyen
        et al. 2024, arXiv:2407.01082), which is relative to the likeliest token and so the same before top-p.

        Top-p without sorting: draw, and draw again among likelier ones if the token is not in the nucleus."""
        left = probs
        if self.any_min_p:
            left = probs.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), 0)
        tokens = sample(left, self.random(range(len(probs)), probs.device))
        if not self.any_top_p:
            return tokens
        rows = outside_nucleus(probs, tokens, self.top_p).nonzero()[:, 0]
        while len(rows):
            own = probs[rows]
            drawn = own.gather(1, tokens[rows, None])
            tokens[rows] = sample(left[rows].masked_fill(own <= drawn, 0), self.random(rows.tolist(), probs.device))
            rows = rows[outside_nucleus(own, tokens[rows], self.top_p[rows])]
        return tokens

    def random(self, rows: Iterable[int], device: torch.device) -> Tensor:
        """The next random number of each of these rows."""
        return torch.tensor([self.states[row].random() for row in rows], device=device)


def make_samplers(states: list[SamplingState], vocab_size: int, device: torch.device) -> list[Sampler]:
    """One for all rows; on a CPU for as many as fit its cache each, as their intermediate results do then."""
    rows = max(1, CACHED // vocab_size) if device.type == "cpu" else len(states)
    return [Sampler(states[at : at + rows], vocab_size, device) for at in range(0, len(states), rows)]


def outside_nucleus(probs: Tensor, tokens: Tensor, top_p: Tensor) -> Tensor:
    """Of tokens (B,) drawn from probs (B, vocab): whether likelier ones have top_p (B, 1) of the mass by themselves."""
    own = probs.gather(1, tokens[:, None])
    likelier = torch.nn.functional.threshold(probs / own, 1.0, 0.0)  # each row in units of its token's probability
    return (likelier.sum(-1, keepdim=True) * own >= top_p)[:, 0]


def sample(probs: Tensor, random: Tensor) -> Tensor:
    """One token of each row of probs (B, vocab), by inverting the cumulative distribution at random (B,) in [0, 1): the
    block of the token first, then its place there, as adding up a whole row is a chain of as many additions."""
    missing = -probs.shape[-1] % SUM_BLOCK
    probs = torch.nn.functional.pad(probs, (0, missing)) if missing else probs
    blocks = probs.unflatten(-1, (-1, SUM_BLOCK))
    sums = blocks.sum(-1)
    at = random[:, None] * sums.sum(-1, keepdim=True)
    block, at = invert(sums, at)
    place, _ = invert(blocks[torch.arange(len(probs), device=probs.device), block[:, 0]], at)
    return (block * SUM_BLOCK + place)[:, 0]


def invert(weights: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of each row of weights (B, n) passes at (B, 1), and what is left of `at` there: (B, 1).
    The weight found is above 0, whatever was rounded."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total))).clamp(min=0)
    found = torch.searchsorted(cumulative, at, right=True).clamp(max=weights.shape[-1] - 1)
    return found, at - (cumulative - weights).gather(1, found)
