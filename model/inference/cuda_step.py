"""The next token of running sequences on a CUDA card, as one recorded graph: to launch the few hundred small kernels of
a step one by one takes ten times as long as the card needs to compute them.

step = CudaStep(model)
logits = step([token, ...], first_slot, cache)      # (B, vocab) after one new token of each slot

It computes what the plain forward does, for few sizes: so many rows, and so many positions of the cache that are read,
powers of two as far as there are so many. A size is recorded when it first comes in a cache, and again when the cache
has grown; that takes as long as three plain steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.inference.kv_cache import CacheWindow, KVCache
from model.model import MiniMindLM, active_adapter

SHORTEST = 256  # positions that are read at least
MOST = 64  # sizes that are kept


class Recorded(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # (2, B) int64: the new tokens, and their positions
    logits: Tensor  # (B, vocab)


def require_recordable(model: MiniMindLM) -> None:
    """Raises ValueError if a step of this model cannot be recorded."""
    if model.config.is_moe:
        raise ValueError("how many rows each expert of a MoE gets is another number in each step")


class CudaStep:
    """The recorded steps of one model, for one cache at a time. Raises what require_recordable() does."""

    def __init__(self, model: MiniMindLM):
        require_recordable(model)
        self.model = model
        self.recorded: dict[tuple, Recorded] = {}
        self.keys: Tensor | None = None  # of the cache that the graphs have the addresses of
        self.device = model.inv_freq.device
        # One after the other, the graphs may work in the same memory.
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def __call__(self, tokens: list[int], first: int, cache: KVCache, adapter: str | None = None) -> Tensor:
        """Logits (B, vocab) after these tokens, one of each slot from `first` on; writes their keys and values into the
        cache, whose lengths stay as they are."""
        lengths = cache.lengths[first : first + len(tokens)]
        cache.reserve(max(lengths) + 1)
        if self.keys is not cache.k or len(self.recorded) > MOST:
            self.recorded.clear()
            self.keys = cache.k
        # Rows that fill up to a power of two write where their slots' next tokens will: before those can be seen.
        filled = cache.lengths[first : first + power_of_two(len(tokens))]
        if max(filled) < cache.capacity:
            lengths = filled
        read = min(cache.capacity, power_of_two(max(SHORTEST, max(lengths) + 1)))
        inputs = torch.tensor([tokens + [0] * (len(lengths) - len(tokens)), lengths])
        key = (first, len(lengths), read, adapter)
        if key not in self.recorded:
            self.recorded[key] = self.record(inputs.to(cache.k.device), first, read, cache, adapter)
        step = self.recorded[key]
        step.inputs.copy_(inputs)
        step.graph.replay()
        return step.logits[: len(tokens)].clone()  # the next replay writes there again

    def record(self, inputs: Tensor, first: int, read: int, cache: KVCache, adapter: str | None) -> Recorded:
        rows = slice(first, first + inputs.shape[1])

        def compute() -> Tensor:
            ids, positions = inputs[0, :, None], inputs[1, :, None]  # (B, 1)
            mask = torch.arange(read, device=inputs.device) <= positions[..., None]
            window = CacheWindow(cache.k[:, rows], cache.v[:, rows], positions, mask[:, None], None, read)
            return self.model(ids, cache=window).logits[:, 0]

        with torch.cuda.device(self.device), active_adapter(self.model, adapter):
            compute()  # what libraries set up when they are first called must not be recorded
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                logits = compute()
        return Recorded(graph, inputs, logits)


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
