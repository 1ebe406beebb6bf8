"""Keys and values of the tokens so far, preallocated, and the window on them that one forward of the model sees.

cache = KVCache(config, slots=8, capacity=256, device="cpu", dtype=torch.float32)
window = cache.window(first=0, count=2, T=5)        # what model(ids (2, 5), cache=window) reads and writes
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.model import MiniMindConfig

READ_BLOCK = 64  # the cache is read up to the longest sequence, rounded up to this, for aligned attention kernels


class KVCache:
    """Keys and values of all layers, preallocated; every slot holds one sequence and has its own length.

    lanes: None for what windows read; for the compiled step its lanes, positions that lie side by side."""

    def __init__(
        self,
        config: MiniMindConfig,
        slots: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
        lanes: int | None = None,
    ):
        c, self.lanes, self.block = config, lanes, lanes or 1
        first = (c.num_hidden_layers, slots, c.num_key_value_heads, -(-capacity // self.block))
        of_keys, of_values = ((c.head_dim, lanes), (lanes, c.head_dim)) if lanes else ((c.head_dim,), (c.head_dim,))
        self.k = torch.zeros(first + of_keys, device=device, dtype=dtype)  # (layers, slots, KV, S, D), or blocks:
        self.v = torch.zeros(first + of_values, device=device, dtype=dtype)  # (..., S / lanes, D, lanes; lanes, D)
        self.lengths = [0] * slots

    @property
    def capacity(self) -> int:
        return self.k.shape[3] * self.block

    def reserve(self, tokens: int) -> None:
        """Room for so many tokens in each slot; twice as many as before at least, so that copying stays rare."""
        if tokens > self.capacity:
            more = -(-(max(tokens, 2 * self.capacity) - self.capacity) // self.block)
            inner = (0, 0) * (self.k.ndim - 4)
            # Both or, where memory runs out, neither: the capacity is that of the keys.
            self.k, self.v = (torch.nn.functional.pad(cache, (*inner, 0, more)) for cache in (self.k, self.v))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of one slot into another, which then holds these."""
        n = -(-tokens // self.block)
        for cache in (self.k, self.v):
            cache[:, target, :, :n] = cache[:, source, :, :n]
        self.lengths[target] = tokens

    def swap(self, a: int, b: int) -> None:
        n = -(-max(self.lengths[a], self.lengths[b]) // self.block)
        for cache in (self.k, self.v):
            cache[:, [a, b], :, :n] = cache[:, [b, a], :, :n]
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]

    def window(self, first: int, count: int, T: int) -> "CacheWindow":
        """What a forward of T new tokens in each of `count` neighbouring slots needs; the lengths stay as they are."""
        lengths = self.lengths[first : first + count]
        longest = max(lengths)
        self.reserve(longest + T)
        read = min(self.capacity, -(-(longest + T) // READ_BLOCK) * READ_BLOCK)
        rows = slice(first, first + count)
        device = self.k.device
        positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        start = longest if min(lengths) == longest else None
        mask = None if start == 0 else (torch.arange(read, device=device) <= positions[..., None])[:, None]
        return CacheWindow(self.k[:, rows], self.v[:, rows], positions, mask, start, read)


@dataclass(frozen=True)
class CacheWindow:
    """Some slots of a KVCache during one forward of T tokens: the model's Cache.

    Each sequence writes at its own length, and a query at position p sees the keys j <= p. So prompts of different
    lengths are simply padded on the right: what padding wrote is overwritten before it can be seen."""

    k: Tensor  # (layers, B, KV, S, D), a view
    v: Tensor
    positions: Tensor  # (B, T)
    mask: Tensor | None  # (B, 1, T, read) bool; None in an empty cache: plain causal attention
    start: int | None  # where all rows write, if at one place
    read: int  # positions that are read

    def layer(self, index: int) -> "CachedLayer":
        return CachedLayer(self, self.k[index], self.v[index])


class CachedLayer(NamedTuple):
    """One layer of a window: the model's LayerCache."""

    window: CacheWindow
    keys: Tensor  # (B, KV, S, D)
    values: Tensor

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, KV, T, D) of the new tokens; returns all that they may attend to, (B, KV, read, D)."""
        start, read, T = self.window.start, self.window.read, k.shape[2]
        if start is not None:
            self.keys[:, :, start : start + T] = k
            self.values[:, :, start : start + T] = v
            if start == 0:
                return k, v
        else:
            rows, at = torch.arange(k.shape[0], device=k.device)[:, None], self.window.positions
            self.keys[rows, :, at] = k.transpose(1, 2).to(self.keys.dtype)  # (B, T, KV, D)
            self.values[rows, :, at] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, :read], self.values[:, :, :read]
