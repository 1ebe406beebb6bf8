"""Compares a model with another, of ours or in other software: logits, and the greedy tokens after some prompts."""

import math

import _path  # noqa: F401
import torch
from torch import Tensor

from dataset.chat import render_chat
from dataset.tokenizer import ChatTokenizer
from model.checkpoint import CheckpointError
from model.export.llama_cpp import LlamaCpp
from model.inference.engine import SamplingParams, generate
from model.model import MiniMindLM, base_state_dict

TEXTS = [
    "The capital of France is",
    "小猫有一个",
    "7 + 15 =",
    "def add(a, b):\n    return",
    "One sunny day, 12,345 cats",
]
QUESTIONS = ["Who are you?", "你是谁？", "Sort these numbers: 7, 3, 9"]
ALL_TEXTS = TEXTS + QUESTIONS
NEW_TOKENS = 32
TOLERANCE = 1e-3  # of logits, both sides computing in fp32
# Kind of GGUF weights -> (tolerance of log-probabilities, share of greedy tokens that must agree). llama.cpp rounds the
# activations of each product to the precision of the weights too, which can send a token to another expert: then only
# the greedy tokens are judged, and the difference of log-probabilities is only shown.
LLAMA_CPP_LIMITS = {"f32": (1e-2, 1.0), "f16": (math.inf, 0.98), "bf16": (math.inf, 0.9), "q8_0": (math.inf, 0.9)}


def prompts_for(vocab_size: int, tokenizer: ChatTokenizer | None) -> list[list[int]]:
    """Texts and questions; or random tokens, if the tokenizer is not known."""
    if tokenizer is None:
        random = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (len(TEXTS), 12), generator=random).tolist()
    questions = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.encode(text).ids for text in TEXTS]
    try:
        return texts + [render_chat(tokenizer, question, add_generation_prompt=True)[0] for question in questions]
    except ValueError:  # it cannot hold a chat
        return texts


class Parity:
    """Collects the comparison of our model with another on the same tokens, position by position."""

    def __init__(self, what: str, unit: str = "logits"):
        self.what, self.unit = what, unit
        self.difference, self.same, self.total = 0.0, 0, 0

    def add(self, difference: float, same: int, total: int) -> None:
        # max() would drop a NaN
        self.difference = difference if difference != difference else max(self.difference, difference)
        self.same, self.total = self.same + same, self.total + total

    def __str__(self) -> str:
        return (
            f"{self.what}: max {self.unit} difference {self.difference:.2e}, "
            f"greedy agreement {self.same}/{self.total} tokens"
        )

    def require(self, tolerance: float = TOLERANCE, agreement: float = 1.0) -> None:
        """Print the figures; CheckpointError if they are worse than these."""
        print(self)
        if not self.difference <= tolerance or self.same < agreement * self.total:
            raise CheckpointError(
                f"parity does not hold: {self}; at most {tolerance:g} and at least {agreement:.0%} is allowed"
            )


@torch.no_grad()
def with_ours(what: str, ours: MiniMindLM, other: MiniMindLM, prompts: list[list[int]]) -> Parity:
    """Two models of ours; the first one's greedy tokens."""
    parity = Parity(what)
    greedy = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
    for prompt, result in zip(prompts, generate(ours, prompts, greedy, compiled=False), strict=True):
        ids, n = torch.tensor([prompt + result.token_ids]), len(result.token_ids)
        a, b = ours(ids).logits[0], other(ids).logits[0]
        parity.add((a - b).abs().max().item(), _same(b, ids[0], n), n)
    return parity


@torch.no_grad()
def with_transformers(what: str, ours: MiniMindLM, theirs, prompts: list[list[int]]) -> Parity:
    """The logits of transformers, and its greedy tokens (generate(), with its cache), against ours."""
    parity = Parity(what)
    for prompt in prompts:
        start = torch.tensor([prompt])
        ids = theirs.generate(
            input_ids=start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        a, b, n = ours(ids).logits[0], theirs(ids).logits[0], ids.shape[1] - len(prompt)
        parity.add((a - b).abs().max().item(), _same(a, ids[0], n), n)
    return parity


@torch.no_grad()
def with_llama_cpp(ours: MiniMindLM, engine: LlamaCpp, prompts: list[list[int]]) -> Parity:
    """llama.cpp's greedy tokens, and the log-probabilities of the likeliest 50 at each, against ours."""
    parity = Parity("llama.cpp", "log-probability")
    for prompt in prompts:
        tokens, probabilities = engine.greedy(prompt, NEW_TOKENS)
        logprobs = ours(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]  # (n, V)
        differences = [
            abs(row[i].item() - p) for row, top in zip(logprobs, probabilities, strict=True) for i, p in top.items()
        ]
        parity.add(max(differences, default=0.0), int((logprobs.argmax(-1) == torch.tensor(tokens)).sum()), len(tokens))
    return parity


def _same(logits: Tensor, ids: Tensor, n: int) -> int:
    """How many of the last n ids are the likeliest by the logits (T, V) before them."""
    return int((logits[-n - 1 : -1].argmax(-1) == ids[-n:]).sum())


def with_weights(model: MiniMindLM, weights: dict[str, Tensor]) -> MiniMindLM:
    """A plain model of the same shape."""
    plain = MiniMindLM(model.config).eval()
    plain.load_state_dict(weights)
    return plain


def rounded(model: MiniMindLM, dtype: torch.dtype, prompts: list[list[int]]) -> MiniMindLM:
    """The weights in that precision, computing in fp32; prints what the rounding itself does."""
    copy = with_weights(model, {name: w.to(dtype).float() for name, w in base_state_dict(model).items()})
    if dtype != torch.float32:
        print(with_ours(f"rounding to {str(dtype)[6:]}, for information", model, copy, prompts))
    return copy
