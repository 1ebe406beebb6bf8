"""How likely a model finds given continuations: what multiple-choice questions and bits per byte are made of.

items = [Item(context_ids, [ids_of_choice_a, ids_of_choice_b])]
scores = score_items(model, items)      # scores[0][1].logprob: log p(choice b | context) in nats

What texts begin with is computed once: a context for all of its continuations, which lie side by side in one row and
do not see each other, and the beginning that all contexts share for all rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.model import MiniMindLM

BATCH_TOKENS = 4096  # of a forward, padding included
LOGITS = 1 << 25  # of a forward at most: 128 MiB in fp32
WORTH_SHARING = 8  # tokens that all contexts begin with
TOGETHER = 4096  # items that are prepared at a time


@dataclass
class Item:
    """A context, at least one token, and the continuations that are scored after it, each at least one token."""

    context: list[int]
    continuations: list[list[int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is read: the last token of a continuation is only predicted."""
        return len(self.context) + max(map(len, self.continuations)) - 1


class Score(NamedTuple):
    """Of one continuation: the sum of its tokens' log-probabilities in nats, and whether each was the likeliest."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class SharedBeginning:
    """The model's Cache for rows that go on after the same tokens and branch: keys and values of the beginning by
    layer, (1, KV, P, D), and who may look at whom."""

    keys: list[Tensor]
    values: list[Tensor]
    positions: Tensor  # (B, T)
    mask: Tensor | None  # (B, 1, T, P + T) bool

    def layer(self, index: int) -> "SharedLayer":
        return SharedLayer(self, index)


class SharedLayer(NamedTuple):
    """One layer of it: the model's LayerCache."""

    beginning: SharedBeginning
    index: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, KV, T, D) after those of the beginning: (B, KV, P + T, D)."""
        keys, values, B = self.beginning.keys, self.beginning.values, k.shape[0]
        if self.beginning.mask is None:  # this is the beginning
            keys.append(k)
            values.append(v)
        elif keys:
            k = torch.cat([keys[self.index].expand(B, -1, -1, -1), k], 2)
            v = torch.cat([values[self.index].expand(B, -1, -1, -1), v], 2)
        return k, v


@torch.no_grad()
def score_items(
    model: MiniMindLM, items: list[Item], show: Callable[[int], None] = lambda done: None
) -> list[list[Score]]:
    """The scores of every item's continuations, in order. show(items so far) is called after each batch."""
    scores: list[list[Score]] = [[]] * len(items)
    done = 0
    for start in range(0, len(items), TOGETHER):
        part = range(start, min(start + TOGETHER, len(items)))
        shared = common_beginning([items[i].context for i in part])
        beginning = _read_beginning(model, items[start].context[:shared])
        for batch in _batches(items, part, shared, model.config.vocab_size):
            for i, score in zip(batch, _score_batch(model, [items[i] for i in batch], beginning, shared), strict=True):
                scores[i] = score
            done += len(batch)
            show(done)
    return scores


def common_beginning(contexts: list[list[int]]) -> int:
    """How many tokens all contexts begin with, but for the last of each; 0 if it is not worth sharing."""
    first, last = min(contexts), max(contexts)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    n = min(n, min(map(len, contexts)) - 1)
    return n if n >= WORTH_SHARING and len(contexts) > 1 else 0


def _read_beginning(model: MiniMindLM, ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    device = model.inv_freq.device
    read = SharedBeginning([], [], torch.arange(len(ids), device=device)[None], None)
    if ids:
        nowhere = torch.zeros(1, len(ids), dtype=torch.bool, device=device)
        model(torch.tensor([ids], device=device), logits_at=nowhere, cache=read)
    return read.keys, read.values


def _row_length(item: Item, shared: int) -> int:
    return len(item.context) - shared + sum(len(ids) - 1 for ids in item.continuations)


def _batches(items: list[Item], part: range, shared: int, vocab_size: int) -> Iterator[list[int]]:
    """Numbers of items of about the same length, the longest first."""
    batch: list[int] = []
    longest = wanted = 0
    for i in sorted(part, key=lambda i: -_row_length(items[i], shared)):
        logits = 1 + sum(len(ids) - 1 for ids in items[i].continuations)
        full = longest * (len(batch) + 1) > BATCH_TOKENS or (wanted + logits) * vocab_size > LOGITS
        if batch and full:
            yield batch
            batch, wanted = [], 0
        longest = longest if batch else _row_length(items[i], shared)
        batch.append(i)
        wanted += logits
    if batch:
        yield batch


def _score_batch(
    model: MiniMindLM, items: list[Item], beginning: tuple[list[Tensor], list[Tensor]], shared: int
) -> list[list[Score]]:
    """Each item is one row: the rest of its context, then its continuations, each of which sees the context and
    itself."""
    B, T = len(items), max(_row_length(item, shared) for item in items)
    ids = torch.zeros(B, T, dtype=torch.int64)
    positions = torch.zeros(B, T, dtype=torch.int64)
    branch = torch.full((B, T), -1)  # -1: context, and the padding that nobody looks at; n: continuation n
    targets = []  # (row, place whose logits predict it, token) of every token of every continuation
    for row, item in enumerate(items):
        n = at = len(item.context) - shared
        ids[row, :n] = torch.tensor(item.context[shared:])
        positions[row, :n] = torch.arange(shared, shared + n)
        for number, continuation in enumerate(item.continuations):
            m = len(continuation) - 1
            ids[row, at : at + m] = torch.tensor(continuation[:-1], dtype=torch.int64)
            positions[row, at : at + m] = torch.arange(shared + n, shared + n + m)
            branch[row, at : at + m] = number
            places = [n - 1, *range(at, at + m)]
            targets += [(row, place, token) for place, token in zip(places, continuation, strict=True)]
            at += m
    rows, places, tokens = torch.tensor(targets).T
    wanted = torch.zeros(B, T, dtype=torch.bool)
    wanted[rows, places] = True
    mask = torch.ones(T, T, dtype=torch.bool).tril() & (
        (branch[:, None, :] == -1) | (branch[:, None, :] == branch[:, :, None])
    )
    mask = torch.cat([torch.ones(B, T, shared, dtype=torch.bool), mask], 2)[:, None]  # (B, 1, T, P + T)
    device = model.inv_freq.device
    cache = SharedBeginning(*beginning, positions.to(device), mask.to(device))
    logits = model(ids.to(device), logits_at=wanted.to(device), cache=cache).logits.float()  # (N, vocab)
    which = (wanted.flatten().cumsum(0) - 1).view(B, T)[rows, places].to(device)
    tokens = tokens.to(device)
    logprobs = logits[which, tokens] - logits.logsumexp(-1)[which]
    return _collect(items, logprobs.tolist(), (logits.argmax(-1)[which] == tokens).tolist())


def _collect(items: list[Item], logprobs: list[float], greedy: list[bool]) -> list[list[Score]]:
    """Sums over each continuation of what stands token by token, one item after the other."""
    scores, at = [], 0
    for item in items:
        scores.append([])
        for continuation in item.continuations:
            end = at + len(continuation)
            scores[-1].append(Score(sum(logprobs[at:end]), all(greedy[at:end])))
            at = end
    return scores
