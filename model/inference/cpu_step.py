"""The forward for generation on a CPU, compiled from cpu_step.cpp: torch's own kernels multiply one row by a matrix at
a third of the memory's speed, and spend as long again between the operations.

step = CpuStep(model)                            # fp32, or what quantize() left; seconds the first time, then cached
cache = KVCache(config, slots, capacity, "cpu", step.cache_dtype, step.lanes)
logits = step([[token, ...], ...], first_slot, cache)  # (B, vocab) after the last token of each slot's new ones

A token's logits are the same bits whatever else is computed with it, and whether it is part of a prompt or not. With
AVX512-VNNI the inputs of bf16 matrices are rounded to bf16, and those of int8 and int4 ones to int8, one scale a row,
and a quantised model's keys and values to bf16; with AMX the products of bf16 and int8 are made in tiles (cpu_tiles.h).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.inference.kv_cache import KVCache
from model.inference.quantization import packed, quantized_kind
from model.model import LoRALinear, MiniMindLM

SOURCE = Path(__file__).resolve().parent / "cpu_step.cpp"
BLOCK = 128  # rows that one call computes: what the products read of them stays in a core's cache
KINDS = {"plain": 0, "bf16": 1, "int8": 2, "int4": 3}


class Matrix(Structure):
    held: list[Tensor]  # what the pointers point to

    _fields_ = [("data", c_void_p), ("scale", c_void_p), ("rows", c_int64), ("cols", c_int64), ("kind", c_int64)]


class Linear(Structure):
    _fields_ = [("weight", Matrix), ("a", Matrix), ("b", Matrix)]


class FeedForward(Structure):
    _fields_ = [(name, Linear) for name in ("gate", "up", "down")]


class Layer(Structure):
    _fields_ = [
        *((name, Linear) for name in ("q", "k", "v", "o")), ("router", Matrix), ("feed_forwards", POINTER(FeedForward)),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
    ]  # fmt: skip


SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "experts", "experts_per_row", "shared")


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in SIZES), ("normalise", c_int64), ("eps", c_float), ("rope_factor", c_float),
        ("layer", POINTER(Layer)), ("embedding", Matrix), ("norm", c_void_p), ("inv_freq", c_void_p),
    ]  # fmt: skip


class CachePointers(Structure):
    _fields_ = [
        ("k", c_void_p), ("v", c_void_p), *((f"{name}_stride", c_int64) for name in ("layer", "slot", "head")),
        ("in_bf16", c_int64),
    ]  # fmt: skip


class Rows(Structure):
    _fields_ = [
        *((name, POINTER(c_int64)) for name in ("tokens", "slots", "positions", "wanted")),
        ("count", c_int64), ("wanted_count", c_int64),
    ]  # fmt: skip


def _cache_folder() -> Path:
    """MINIMIND_CACHE if it is set, else the first that can be written to: out/cache, the user's cache folder, a
    temporary one. RuntimeError if none can."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = f"minimind-{os.getuid()}" if hasattr(os, "getuid") else "minimind"  # whose library is loaded is its code
    folders = [SOURCE.parents[2] / "out" / "cache", Path(user) / "minimind", Path(tempfile.gettempdir()) / own]
    if os.environ.get("MINIMIND_CACHE"):
        folders = [Path(os.environ["MINIMIND_CACHE"])]
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        stranger = folder.name == own and hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()
        if os.access(folder, os.W_OK) and not stranger:
            return folder
    raise RuntimeError(f"no folder to keep the compiled step in can be written to ({folders[0]}): set MINIMIND_CACHE")


def _vector_flags() -> list[str]:
    """What the compiler may use of this CPU. RuntimeError if it lacks AVX2."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        raise RuntimeError("the compiled step needs a CPU with AVX2")
    flags = ["-mavx2", "-mfma"]
    can = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot say
    if capability == "AVX512" and can.get("avx512_vnni"):
        flags += [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
        flags += ["-mavx512bf16"] * can["avx512_bf16"]
        if can.get("amx_int8") and can.get("amx_bf16") and sys.platform == "linux":
            flags += [f"-mamx-{part}" for part in ("tile", "int8", "bf16")]
    return flags


def build() -> Path:
    """The compiled library, from the cache if it is there. RuntimeError if it cannot be compiled."""
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", *_vector_flags()]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("the compiled step needs a C++ compiler: install g++, or name one in CXX")
    source = b"".join(file.read_bytes() for file in [SOURCE, *sorted(SOURCE.parent.glob("cpu_*.h"))])
    key = hashlib.sha256(" ".join([compiler, *flags]).encode() + source).hexdigest()[:16]
    folder = _cache_folder()
    library = folder / f"cpu_step_{key}.so"
    if not library.exists():
        print(f"note: compiling the decoding step, once, into {folder}", file=sys.stderr)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as file:
            pass
        done = subprocess.run([compiler, *flags, str(SOURCE), "-o", file.name], capture_output=True, errors="replace")
        if done.returncode:
            os.unlink(file.name)
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise RuntimeError(f"{compiler} cannot compile {SOURCE.name}: {reason}")
        os.replace(file.name, library)
    return library


@cache
def load_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    numbers = [c_int64] * 3  # longest, rank, threads
    library.lanes.restype = library.tiles.restype = library.scratch_size.restype = c_int64
    library.scratch_size.argtypes = [POINTER(Model), c_int64, *numbers]
    library.step.restype = None
    library.step.argtypes = [POINTER(Model), CachePointers, Rows, *numbers, c_void_p, c_void_p]
    return library


QUANTIZED: WeakKeyDictionary[nn.Module, dict[tuple, Matrix]] = WeakKeyDictionary()  # packed once for all steps


def library_for(model: MiniMindLM) -> ctypes.CDLL:
    """Raises ValueError if the step cannot run this model, RuntimeError or OSError if it cannot be compiled or kept."""
    c, weight = model.config, model.model.norm.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError("the compiled step is for fp32 or quantised models on the CPU")
    sizes = [c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim]
    if any(n % 32 for n in sizes) or c.head_dim % 16:
        raise ValueError("the compiled step needs sizes that are multiples of 32, and heads of 16")
    return load_library()


class CpuStep:
    """The weights of an fp32 or quantised model on the CPU, as the library wants them: with 16 lanes a copy, in panels
    (cpu_panels.h), otherwise as they are. Raises what library_for() does."""

    def __init__(self, model: MiniMindLM):
        self.library, self.source = library_for(model), model
        self.lanes = self.library.lanes()
        narrow = self.lanes == 16 and quantized_kind(model) is not None
        self.cache_dtype = torch.bfloat16 if narrow else torch.float32  # of keys and values
        self.keep: list = []  # what the pointers point to
        self.plain: dict[nn.Module, Matrix] = {}
        self.models: dict[str | None, Model] = {}  # by adapter
        self.rank = 0
        self.model_with(None)
        self.scratch = torch.empty(0)

    def model_with(self, adapter: str | None) -> Model:
        """The model with this adapter, or None: with the weights alone. All share the weights."""
        if adapter in self.models:
            return self.models[adapter]
        model, c = self.source, self.source.config
        layers = (Layer * c.num_hidden_layers)()
        for layer, block in zip(layers, model.model.layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            for name in ("q", "k", "v", "o"):
                setattr(layer, name, self.linear(getattr(attention, f"{name}_proj"), adapter))
            networks = [*mlp.experts, *mlp.shared_experts] if c.is_moe else [mlp]
            projections = [(f.gate_proj, f.up_proj, f.down_proj) for f in networks]
            layer.feed_forwards = (FeedForward * len(networks))(
                *(FeedForward(*(self.linear(p, adapter) for p in each)) for each in projections)
            )
            if c.is_moe:
                layer.router = self.router(mlp.gate, adapter)
            layer.input_norm = self.pointer(block.input_layernorm.weight)
            layer.post_norm = self.pointer(block.post_attention_layernorm.weight)
            if c.qk_norm:
                layer.q_norm = self.pointer(attention.q_norm.weight)
                layer.k_norm = self.pointer(attention.k_norm.weight)
        shared = c.num_shared_experts if c.is_moe else 1
        self.models[adapter] = Model(
            c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
            c.intermediate_size, c.num_experts, c.num_experts_per_tok, shared, c.norm_topk_prob,
            c.rms_norm_eps, model.rope_factor, layers, self.matrix(model.model.embed_tokens),
            self.pointer(model.model.norm.weight), self.pointer(model.inv_freq),
        )  # fmt: skip
        return self.models[adapter]

    def pointer(self, tensor: Tensor) -> int:
        self.keep.append(tensor.detach().contiguous())
        return self.keep[-1].data_ptr()

    def linear(self, layer: nn.Linear, adapter: str | None) -> Linear:
        if not isinstance(layer, LoRALinear) or adapter not in layer.configs:
            return Linear(self.matrix(layer))
        A, B = layer.matrices(adapter)
        missing = -A.shape[0] % 32
        self.rank = max(self.rank, A.shape[0] + missing)
        a = self.pack("plain", F.pad(A, (0, 0, 0, missing)), None)  # (rank, in)
        b = self.pack("plain", F.pad(B * layer.configs[adapter].scaling, (0, missing)), None)  # (out, rank)
        self.keep += [a, b]
        return Linear(self.matrix(layer), a, b)

    def router(self, layer: nn.Linear, adapter: str | None) -> Matrix:
        if not isinstance(layer, LoRALinear) or adapter not in layer.configs:
            return self.matrix(layer)
        A, B = layer.matrices(adapter)
        self.keep.append(self.pack("plain", layer.weight + layer.configs[adapter].scaling * B @ A, None))
        return self.keep[-1]

    def matrix(self, layer: nn.Module) -> Matrix:
        kind, data, scale = packed(layer)
        if kind == "plain":  # training changes these: they are read anew by each step
            if layer not in self.plain:
                self.plain[layer] = self.pack(kind, data, scale)
            return self.plain[layer]
        known, key = QUANTIZED.setdefault(layer, {}), (self.lanes, data.data_ptr())
        if key not in known:
            known[key] = self.pack(kind, data, scale)
        self.keep.append(known[key])
        return known[key]

    def pack(self, kind: str, data: Tensor, scale: Tensor | None) -> Matrix:
        """data (N, in) fp32, bf16 or int8, or (N, in / 2) int4 pairs; scale (N, 1) or (N, in / 32)."""
        rows, cols = -(-data.shape[0] // 16) * 16, data.shape[1] * (2 if kind == "int4" else 1)
        data = padded(data.detach(), rows)
        scale = None if scale is None else padded(scale.detach(), rows)
        if self.lanes == 16:
            data = data.view(torch.uint8) ^ 128 if kind == "int8" else data  # plus 128
            data = panels(data.contiguous().view(torch.int32))
            scale = panels(scale) if kind == "int4" else scale
        held = [data.contiguous(), *([] if scale is None else [scale.contiguous()])]
        matrix = Matrix(*(tensor.data_ptr() for tensor in held), *[None] * (2 - len(held)), rows, cols, KINDS[kind])
        matrix.held = held
        return matrix

    def __call__(self, new: list[list[int]], first_slot: int, kv_cache: KVCache, adapter: str | None = None) -> Tensor:
        """Logits (B, vocab) fp32 after the last of each slot's new tokens, from first_slot on; writes their keys and
        values into the cache, whose lengths stay as they are.

        kv_cache: with this step's cache_dtype and lanes."""
        held = kv_cache.lengths[first_slot : first_slot + len(new)]
        longest = max(n + len(tokens) for n, tokens in zip(held, new, strict=True))
        kv_cache.reserve(longest)
        rows = [
            (token, slot, position, position == n + len(tokens) - 1)
            for slot, (n, tokens) in enumerate(zip(held, new, strict=True), first_slot)
            for position, token in enumerate(tokens, n)
        ]
        vocab, model = self.source.config.vocab_size, self.model_with(adapter)
        logits = torch.empty(len(new), model.embedding.rows)
        done = 0
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            done += self.run(model, block, longest, kv_cache, logits[done:])
        return logits[:, :vocab]

    def run(self, model: Model, rows: list[tuple], longest: int, kv_cache: KVCache, logits: Tensor) -> int:
        """One call of the library for rows of (token, slot, position, whether logits are wanted); how many were."""
        threads, count, (k, v) = torch.get_num_threads(), len(rows), (kv_cache.k, kv_cache.v)
        size = self.library.scratch_size(model, count, longest, self.rank, threads)
        if size > len(self.scratch):
            self.scratch = torch.empty(2 * size)
        tokens, slots, positions, _ = zip(*rows, strict=True)
        wanted = [i for i, row in enumerate(rows) if row[3]]
        arrays = [(c_int64 * len(numbers))(*numbers) for numbers in (tokens, slots, positions, wanted)]
        self.library.step(
            model, CachePointers(k.data_ptr(), v.data_ptr(), *k.stride()[:3], k.dtype == torch.bfloat16),
            Rows(*arrays, count, len(wanted)), longest, self.rank, threads, self.scratch.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        return len(wanted)


def padded(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if rows > x.shape[0] else x


def panels(words: Tensor) -> Tensor:
    """(N, n) words of 4 bytes, in panels of 64 rows and what is left: the first of each of its rows, the second, ..."""
    return torch.cat([panel.T.flatten() for panel in words.split(64)])
