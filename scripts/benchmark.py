"""How fast this machine trains.

python scripts/benchmark.py train --preset small --seq_len 512 --seconds 60

Whole training steps (forward, backward, clipping, optimizer) on random tokens; the last line is one JSON object.
`mfu` is 6 * active parameters * tokens/s over the peak of a 2048^3 product in the same precision and process;
`mfu_with_attention` counts the attention scores too. `memory_mb` is what the peak in CPU memory rose by after import.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model.model import PRESETS, MiniMindLM
from trainer import cli, speed, trainer
from trainer.arguments import ArgumentParser
from trainer.optimizer import LEARNING_RATES, build_optimizers


def peak_rss_mb() -> float:
    """The most that this process has held in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def benchmark_train(args: argparse.Namespace) -> dict:
    device = trainer.find_device(args.device)
    dtype = trainer.find_dtype(device, args.dtype)
    peaks = [speed.matmul_peak(device, dtype)]
    baseline = peak_rss_mb()
    torch.manual_seed(0)
    model = MiniMindLM(PRESETS[args.preset]).to(device).train()
    optimizers = build_optimizers(model, args.optimizer)
    model.activation_checkpointing = bool(args.activation_checkpointing)
    if args.compile:
        model.compile_layers()
    ids = torch.randint(16, model.config.vocab_size, (args.batch_size, args.seq_len + 1), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = model(ids[:, :-1], labels=ids[:, 1:])
        loss = out.loss if out.aux_loss is None else out.loss + out.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        speed.synchronize(device)

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()
    times = []
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        print(
            f"\r{len(times)} steps, {ids[:, 1:].numel() / times[-1]:,.0f} tokens/s", end="", file=sys.stderr, flush=True
        )
    print(file=sys.stderr)
    rss = peak_rss_mb()
    peaks.append(speed.matmul_peak(device, dtype))
    peak, tokens_per_second = max(peaks), ids[:, 1:].numel() / statistics.median(times)
    return {
        "preset": args.preset, "parameters": model.num_parameters(), "active": model.num_parameters(active=True),
        "batch_size": args.batch_size, "seq_len": args.seq_len, "optimizer": args.optimizer, "dtype": str(dtype)[6:],
        "tokens_per_second": round(tokens_per_second, 1),
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "mfu": round(tokens_per_second * model.flops_per_token(args.seq_len, attention=False) / peak, 4),
        "mfu_with_attention": round(tokens_per_second * model.flops_per_token(args.seq_len) / peak, 4),
        "peak_rss_mb": round(rss), "memory_mb": round(rss - baseline),
        "activation_checkpointing": args.activation_checkpointing,
        "compile_seconds": round(first - statistics.median(times), 1) if args.compile else 0,
        "steps": len(times), "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="training speed")
    train.add_argument("--preset", choices=list(PRESETS), default="nano")
    train.add_argument("--seq_len", type=int, default=512)
    train.add_argument("--batch_size", type=int, default=8)
    train.add_argument("--seconds", type=float, default=60)
    train.add_argument("--optimizer", choices=list(LEARNING_RATES), default="adamw")
    train.add_argument("--compile", type=int, choices=(0, 1), default=1)
    train.add_argument("--activation_checkpointing", type=int, choices=(0, 1), default=0)
    train.add_argument("--device")
    train.add_argument("--dtype", choices=list(cli.DTYPES))
    print(json.dumps(benchmark_train(parser.parse_args())))


if __name__ == "__main__":
    cli.run(main)
