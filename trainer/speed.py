"""How fast the machine multiplies, and whether compiling the model pays."""

import math
import time
from typing import TYPE_CHECKING

import torch

from cli import UsageError

if TYPE_CHECKING:
    from trainer.trainer import Run


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, repeat: int = 5) -> float:
    """FLOP/s of a square matrix product on this machine, the best of `repeat`: what MFU is a share of."""
    size = size or (8192 if device.type == "cuda" else 2048)
    if size > 256 and 2 * size**3 / matmul_peak(device, dtype, 256, 2) > 5:  # a dtype that the hardware does not have
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


def compile_if_worth(run: "Run", expected_seconds: float) -> bool:
    """Compile the model's layers if the flag says so, or, on auto, if the run is long enough to win back the 5 to 25
    seconds it costs and the machine has what it takes. A resumed run stays with what was decided: compiled and eager
    code round differently."""
    wish = run.args.compile if run.compiled is None else str(int(run.compiled))
    if wish == "0" or run.device.type == "mps" or (wish == "auto" and expected_seconds < 75):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=run.device))
    except Exception as error:  # whatever a missing or broken C++ compiler raises, training goes on without it
        if wish == "1":
            raise UsageError(f"--compile 1: torch.compile does not work here: {_first_line(error)}") from None
        run.reporter.say(f"torch.compile does not work here, training goes on without: {_first_line(error)}")
        return False
    run.model.compile_layers()
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:150]
