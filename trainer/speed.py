"""Faster forms of what model.py and the losses say plainly, and whether they pay: equal in tests/test_speed.py.

install(model, torch.bfloat16, device)      # kernels for this device and precision
compile_blocks(model)                       # torch.compile, block by block
"""

import contextlib
import ctypes
import math
import sys
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import UsageError
from model.model import Attention, Experts, MiniMindLM, attention, each_expert, lora_layers, packed_causal_mask

WORTH_COMPILING = 75  # seconds of training that win back the 5 to 25 that compiling takes
is_compiled = False  # whether the run of this process is: compile_if_worth() says so


# ------------------------------------------------------------------------------------------------ kernels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """F.cross_entropy(logits, labels): the mean of -log softmax(logits)[label] in nats, fp32; logits (N, vocab), labels
    (N,). It is 0, not 0 / 0, where there is no label. Compiled where the run is."""
    if is_compiled:
        total = _compiled_total()(logits, labels)
    else:
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / max(len(labels), 1)


class _Total(torch.autograd.Function):
    """logits (N, vocab), labels (N,) int64, none of them -100 -> the sum of logsumexp(logits) - logits[label], () fp32.
    Its gradient is softmax(logits), less 1 at the label: one pass over the logits, where torch.compile makes two of
    F.cross_entropy's. It is faster only when compiled."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        normaliser = logits.float().logsumexp(1)
        ctx.save_for_backward(logits, labels, normaliser)
        return (normaliser - logits.gather(1, labels[:, None]).squeeze(1)).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels, normaliser = ctx.saved_tensors
        column = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)  # as wide as a float
        probs = (logits.float() - normaliser[:, None]).exp()
        return (grad * (probs - (column == labels[:, None].int()).float())).to(logits.dtype), None


@cache
def _compiled_total() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_Total.apply, dynamic=True)  # the number of labels is another in each batch


def additive(mask: Tensor) -> Tensor:
    """A bool mask, True = may look, as what is added to scores: 0 there, -inf elsewhere; bf16, of the same shape."""
    return torch.zeros(mask.shape, dtype=torch.bfloat16, device=mask.device).masked_fill(~mask, float("-inf"))


def additive_packed_mask(segment_ids: Tensor) -> Tensor:
    """model.packed_causal_mask() as blocked_attention() reads it fastest: (B, T) -> (B, 1, T, T) bf16."""
    return additive(packed_causal_mask(segment_ids))


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block: int = 128) -> Tensor:
    """model.attention() as matrix products over blocks of queries, each against the keys up to its own end. mask (B or
    1, 1, T, T): bool, or what additive() makes of it, which a compiled block adds faster than it chooses.

    For training on a CPU, where torch's fused kernel takes 40 % of a compiled step in bf16, and with a mask multiplies
    what the mask hides: the products run at the machine's peak, the softmax between them is fused by torch.compile, and
    keys after the block are never touched. The query heads that share a key head are rows of one product.
    """
    B, H, T, D = q.shape
    KV = k.shape[1]
    G = H // KV
    q = (q * D**-0.5).reshape(B * KV, G, T, D)
    k, v = k.reshape(B * KV, T, D), v.reshape(B * KV, T, D)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask.dtype == torch.bool:
        mask = additive(mask)
    out = []
    for start in range(0, T, block):
        end = min(start + block, T)
        n = end - start
        scores = (q[:, :, start:end].reshape(B * KV, G * n, D) @ k[:, :end].transpose(1, 2)).view(B, KV * G, n, end)
        probs = (scores.float() + mask[:, :, start:end, :end]).softmax(-1).to(v.dtype).view(B * KV, G * n, end)
        out.append((probs @ v[:, :end]).view(B, H, n, D))
    return torch.cat(out, dim=2)


def padded_experts(experts: Experts, x: Tensor, ends: Tensor, block: int = 128) -> Tensor:
    """model.each_expert() with zeros after each expert's rows, up to a multiple of `block`.

    For bf16 on a CPU: oneDNN writes machine code for each number of rows that it has not seen, which takes as long as
    the products themselves, and nearly every batch gives every expert another."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    rows_of = zip(experts, x.split(sizes), strict=True)
    return torch.cat([expert(F.pad(rows, (0, 0, 0, -len(rows) % block)))[: len(rows)] for expert, rows in rows_of])


def grouped_experts(experts: Experts, x: Tensor, ends: Tensor) -> Tensor:
    """model.each_expert() as one kernel over all experts, in bf16: x (N, hidden) sorted by expert, ends (E,)."""
    x = x.bfloat16()
    gate = _grouped_linear(x, [expert.gate_proj for expert in experts], ends)
    up = _grouped_linear(x, [expert.up_proj for expert in experts], ends)
    return _grouped_linear(F.silu(gate) * up, [expert.down_proj for expert in experts], ends)


def _grouped_linear(x: Tensor, layers: list[nn.Linear], ends: Tensor) -> Tensor:
    """Each block of rows times the matrix of its layer: x (N, in), ends (E,) -> (N, out)."""
    weight = torch.stack([layer.weight.to(x.dtype) for layer in layers])  # (E, out, in)
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def install(model: MiniMindLM, dtype: torch.dtype, device: torch.device) -> None:
    """Give the model the forms that train fastest in this precision on this device, of those that torch has."""
    bf16, adapted, on_cpu = dtype == torch.bfloat16, bool(lora_layers(model)), device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    for layer in model.modules():
        if isinstance(layer, MiniMindLM):
            layer.packed_mask = additive_packed_mask if on_cpu else packed_causal_mask
        elif isinstance(layer, Attention):
            layer.attend = blocked_attention if on_cpu else attention
        elif isinstance(layer, Experts):
            # The kernel over all experts sees their weights alone, without an adapter.
            grouped = bf16 and hasattr(F, "grouped_mm") and not adapted
            layer.compute = padded_experts if bf16 and on_cpu else grouped_experts if grouped else each_expert


def uninstall(model: MiniMindLM) -> None:
    """The plain forms again: those of attention for training cannot read a cache."""
    for layer in model.modules():
        if isinstance(layer, MiniMindLM):
            layer.packed_mask = packed_causal_mask
        elif isinstance(layer, Attention):
            layer.attend = attention
        elif isinstance(layer, Experts):
            layer.compute = each_expert


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step. It hands large tensors back to the system otherwise, which gives
    them page by page and filled with zeros again: a tenth of a step."""
    mmap_threshold, trim_threshold = -3, -1  # names of malloc.h
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(mmap_threshold, 1 << 30)
            mallopt(trim_threshold, (1 << 31) - 1)


# ------------------------------------------------------------------------------------------------ compiling


def compile_blocks(model: MiniMindLM) -> None:
    """torch.compile each block on its own: all share one graph, so that compiling takes seconds rather than the minute
    that the unrolled model takes, at the same speed.

    Whether a size is dynamic is fixed: left to the compiler, it depends on the shapes seen before, and a resumed run,
    which sees others first, would round differently."""
    for block in model.model.layers:
        block.compile(dynamic=False)
    model.model.norm.compile(dynamic=True)  # of as many positions as there are labels


def compile_if_worth(
    model: MiniMindLM, wish: str, device: torch.device, expected_seconds: float, say: Callable[[str], None]
) -> bool:
    """Compile the model and cross_entropy() if `wish` is "1", or, on "auto", if the run is long enough to win back
    what it costs and the machine has what it takes; "0": everything runs as it is written. Returns what was done."""
    global is_compiled
    is_compiled = wish == "1" or (wish == "auto" and expected_seconds >= WORTH_COMPILING and device.type != "mps")
    if is_compiled:
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        except Exception as error:  # whatever a missing or broken C++ compiler raises, training goes on without it
            reason = str(error).strip().split("\n")[0][:150]
            if wish == "1":
                raise UsageError(f"--compile 1: torch.compile does not work here: {reason}") from None
            say(f"torch.compile does not work here, training goes on without: {reason}")
            is_compiled = False
    if is_compiled:
        compile_blocks(model)
    return is_compiled


# ------------------------------------------------------------------------------------------------ the machine


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, repeat: int = 5) -> float:
    """FLOP/s of a square matrix product on this machine, the best of `repeat`: what MFU is a share of."""
    size = size or (8192 if device.type == "cuda" else 2048)
    on_cpu = device.type == "cpu"  # on a card, small products take their time to be launched
    if on_cpu and size > 256 and 2 * size**3 / matmul_peak(device, dtype, 256, 2) > 5:  # it does not have this dtype
        size = 256
    generator = torch.Generator(device).manual_seed(0)  # its own: a resumed run measures again, and must not draw more
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    best = math.inf
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
