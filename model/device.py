"""Which device a script computes on, and in which precision."""

import sys

import torch

from cli import UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def find_device(name: str | None = None) -> torch.device:
    """The device asked for, or cuda, then mps, then cpu. UsageError if it is not there."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name is None:
        name = available[0]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; here there is {', '.join(available)}") from None
    if device.type not in available:
        raise UsageError(f"--device {name}: not available here; use {' or '.join(available)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} such devices, counted from 0")
    return device


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
