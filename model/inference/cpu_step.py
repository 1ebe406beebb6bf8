"""The decoding step on a CPU, compiled from cpu_step.cpp: torch's own kernels multiply one row by a matrix at a third
of the memory's speed, and spend as long again between the operations.

step = CpuStep(model)                              # fp32, or what quantize() left; seconds the first time, then cached
logits = step([token, ...], first_slot, cache)     # (B, vocab); writes the new keys and values into the cache

A row's logits are the same bits whatever the other rows are.
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

import torch
from torch import Tensor, nn

from model.inference.quantization import packed
from model.model import MiniMindLM

SOURCE = Path(__file__).resolve().parent / "cpu_step.cpp"
KINDS = {"plain": 0, "bf16": 1, "int8": 2, "int4": 3}


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("scale", c_void_p), ("rows", c_int64), ("cols", c_int64), ("kind", c_int64)]


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")
SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")


class Layer(Structure):
    _fields_ = [*((name, Matrix) for name in MATRICES), *((name, c_void_p) for name in NORMS)]


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in SIZES), ("eps", c_float), ("rope_factor", c_float), ("layer", POINTER(Layer)),
        ("embedding", Matrix), ("norm", c_void_p), ("inv_freq", c_void_p),
    ]  # fmt: skip


class CachePointers(Structure):
    _fields_ = [("k", c_void_p), ("v", c_void_p), *((f"{name}_stride", c_int64) for name in ("layer", "slot", "head"))]


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


def build() -> Path:
    """The compiled library, from the cache if it is there. RuntimeError if it cannot be compiled."""
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp"]
    if platform.machine() in ("x86_64", "AMD64"):
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            raise RuntimeError("the compiled step needs a CPU with AVX2")
        flags += ["-mavx2", "-mfma"]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("the compiled step needs a C++ compiler: install g++, or name one in CXX")
    key = hashlib.sha256(" ".join([compiler, *flags]).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = _cache_folder()
    library = folder / f"cpu_step_{key}.so"
    if not library.exists():
        print(f"note: compiling the decoding step, once, into {folder}", file=sys.stderr)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as file:
            pass
        done = subprocess.run([compiler, *flags, str(SOURCE), "-o", file.name], capture_output=True, errors="replace")
        if done.returncode:
            os.unlink(file.name)
            reason = done.stderr.strip().partition("\n")[0]
            raise RuntimeError(f"{compiler} cannot compile {SOURCE.name}: {reason}")
        os.replace(file.name, library)
    return library


@cache
def load_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    library.scratch_size.restype = c_int64
    library.scratch_size.argtypes = [POINTER(Model), c_int64, c_int64, c_int64]
    library.step.restype = None
    pointers = [c_void_p, c_void_p]
    library.step.argtypes = [POINTER(Model), CachePointers, *pointers, c_int64, c_int64, c_int64, *pointers]
    return library


class CpuStep:
    """The weights of a dense fp32 or quantised model on the CPU, as the library wants them; they are not copied.

    Raises ValueError if the model is of another kind, RuntimeError if the library cannot be compiled."""

    def __init__(self, model: MiniMindLM):
        c = model.config
        if c.is_moe:
            raise ValueError("the compiled step is for dense models")
        if model.model.norm.weight.device.type != "cpu" or model.model.norm.weight.dtype != torch.float32:
            raise ValueError("the compiled step is for fp32 or quantised models on the CPU")
        sizes = [c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim]
        rows = [c.vocab_size, c.num_key_value_heads * c.head_dim]
        if any(n % 32 for n in sizes) or any(n % 8 for n in rows) or c.head_dim % 16:
            raise ValueError(
                "the compiled step needs sizes that are multiples of 32, heads of 16 and a vocabulary of 8"
            )
        self.library, self.vocab_size = load_library(), c.vocab_size
        self.keep: list[Tensor] = []  # what the pointers point to
        self.layers = (Layer * c.num_hidden_layers)()
        for layer, block in zip(self.layers, model.model.layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            for name in MATRICES:
                owner = attention if hasattr(attention, f"{name}_proj") else mlp
                setattr(layer, name, self.matrix(getattr(owner, f"{name}_proj")))
            layer.input_norm = self.pointer(block.input_layernorm.weight)
            layer.post_norm = self.pointer(block.post_attention_layernorm.weight)
            if c.qk_norm:
                layer.q_norm = self.pointer(attention.q_norm.weight)
                layer.k_norm = self.pointer(attention.k_norm.weight)
        values = [c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
                  c.intermediate_size]  # fmt: skip
        self.model = Model(
            *values, c.rms_norm_eps, model.rope_factor, self.layers, self.matrix(model.model.embed_tokens)
        )
        self.model.norm = self.pointer(model.model.norm.weight)
        self.model.inv_freq = self.pointer(model.inv_freq)
        self.scratch = torch.empty(0)

    def pointer(self, tensor: Tensor) -> int:
        self.keep.append(tensor.detach().contiguous())
        return self.keep[-1].data_ptr()

    def matrix(self, layer: nn.Module) -> Matrix:
        kind, data, scale = packed(layer)
        rows = data.shape[0]
        cols = data.shape[1] * (2 if kind == "int4" else 1)
        return Matrix(self.pointer(data), None if scale is None else self.pointer(scale), rows, cols, KINDS[kind])

    def __call__(self, tokens: list[int], first_slot: int, kv_cache) -> Tensor:
        """Logits (B, vocab) fp32 after these tokens, each the next one of its slot, from first_slot on.

        kv_cache: a generation.KVCache in fp32."""
        B = len(tokens)
        positions = kv_cache.lengths[first_slot : first_slot + B]
        longest, threads = max(positions) + 1, torch.get_num_threads()
        kv_cache.reserve(longest)
        k, v = kv_cache.k, kv_cache.v
        strides = k.stride()
        offset = 4 * first_slot * strides[1]
        size = self.library.scratch_size(self.model, B, longest, threads)
        if size > len(self.scratch):
            self.scratch = torch.empty(2 * size)
        logits = torch.empty(B, self.vocab_size)
        numbers = c_int64 * B
        self.library.step(
            self.model, CachePointers(k.data_ptr() + offset, v.data_ptr() + offset, *strides[:3]), numbers(*tokens),
            numbers(*positions), B, longest, threads, self.scratch.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        return logits
