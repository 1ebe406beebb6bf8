"""In which precision a device computes, and when its memory is full."""

import errno
import sys

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FULL_MEMORY = ("out of memory", "t allocate memory", "not enough memory", "bad_alloc", "alloc_failed")
FULL_MEMORY += ("failed to map segment",)  # of a package that is loaded late


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 where the hardware computes in it (CUDA SM80+, CPU with AVX512-BF16 or AMX, Apple), else fp32."""
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif kind == "cpu":
        # ATEN_CPU_CAPABILITY=avx2 makes torch compute as on a CPU without: then this says so too.
        old = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
        fast = not old and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    else:
        fast = kind == "mps"
    return torch.bfloat16 if fast else torch.float32


def training_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """bf16 where the hardware multiplies it, fp16 (with loss scaling) on older CUDA, else fp32; `name` overrides."""
    fast = compute_dtype(device)
    if name:
        if device.type == "cpu" and name != "fp32" and DTYPES[name] != fast:
            print(
                f"note: --dtype {name}: this CPU has no {name} arithmetic, fp32 is many times faster", file=sys.stderr
            )
        return DTYPES[name]
    return torch.float16 if device.type == "cuda" and fast == torch.float32 else fast


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that the memory of the machine or of a device is full. torch raises a plain RuntimeError on a
    CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | ImportError) and any(words in str(error).lower() for words in FULL_MEMORY)
