"""What a training would need: memory per GPU in each mode, tokens per second, hours and cost, before any GPU is rented.

    python scripts/plan.py --preset base --gpus 8 --gpu 3090
    python scripts/plan.py --preset v3-moe --gpu A100-80 --data_path corpus.jsonl --price 1.5 --seq_len 2048

Everything is computed from parameter and FLOP counts; what is assumed and not measured is printed below the figures.
"""

import argparse
from dataclasses import dataclass

import _path  # noqa: F401
import torch

import cli
from cli import ArgumentParser, UsageError
from dataset.files import DataError, DataFile
from dataset.sources import parse_sources
from model.model import PRESETS, MiniMindConfig, MiniMindLM
from trainer.optimizer import LEARNING_RATES, Muon, build_optimizers


@dataclass(frozen=True)
class GPU:
    """From the makers' datasheets."""

    tflops: float  # dense matrix products in bf16, in fp16 where there is no bf16, summed in fp32
    memory: int  # GB
    dtype: str = "bf16"


GPUS = {
    "T4": GPU(65, 16, "fp16"),
    "V100": GPU(125, 16, "fp16"),
    "V100-32": GPU(125, 32, "fp16"),
    "L4": GPU(121, 24),
    "3090": GPU(71, 24),
    "4090": GPU(165, 24),
    "A100-40": GPU(312, 40),
    "A100-80": GPU(312, 80),
    "H100": GPU(989, 80),
    "H200": GPU(989, 141),
}
OVERHEAD = 1.5e9  # bytes: CUDA context, kernels' workspaces and the gaps of the allocator
FREE_SHARE = 0.92  # of a GPU's memory that a plan may fill


# ------------------------------------------------------------------------------------------------ memory


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """What their state takes once they have stepped: AdamW keeps two values per parameter, Muon one."""
    return sum(
        p.numel() * p.element_size() * (1 if isinstance(optimizer, Muon) else 2)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    )


def block_bytes(config: MiniMindConfig, tokens: int, autocast: bool) -> int:
    """Bytes that one block keeps for its backward over this many tokens, not compiled.

    The residual stream and what the norms keep are fp32, all else is in the precision of the arithmetic. Attention is a
    fused kernel, which keeps no scores.
    """
    c, small = config, 2 if autocast else 4
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norms = 2 * c.hidden_size * (4 + 4 + small)  # input, normalised, output
    if c.qk_norm:
        norms += (q + kv) * (4 + 4)
    attention = (2 * q + 2 * kv) * small  # q, k, v, and what goes into o_proj
    experts = c.num_experts_per_tok + c.num_shared_experts if c.is_moe else 1
    mlp = experts * 4 * c.intermediate_size * small  # gate, silu(gate), up, their product
    if c.is_moe:  # rows sorted by expert, outputs, outputs in the old order
        mlp += c.num_experts_per_tok * 3 * c.hidden_size * small
    return tokens * (norms + attention + mlp)


def activation_bytes(config: MiniMindConfig, batch_size: int, seq_len: int, autocast: bool, checkpointing: bool) -> int:
    """The most that activations take: those of the blocks, and the logits with their gradient.

    With checkpointing the blocks' inputs are kept, and later the activations of one block at a time.
    """
    tokens = batch_size * seq_len
    block = block_bytes(config, tokens, autocast)
    inputs = config.num_hidden_layers * tokens * config.hidden_size * 4
    head = tokens * (config.vocab_size * 4 * 3 + config.hidden_size * 12)  # log-probabilities and two gradients
    if checkpointing:
        return inputs + max(block, head)
    return config.num_hidden_layers * block + head


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a model keeps between steps."""

    parameters: int
    largest_block: int  # parameters that one unit of ZeRO-3 or FSDP gathers
    optimizer: int


def sizes_of(config: MiniMindConfig, optimizer: str) -> tuple[MiniMindLM, Sizes]:
    """The model, without memory for its weights, and its sizes."""
    with torch.device("meta"):
        model = MiniMindLM(config)
    units = [*model.model.layers, model.model.embed_tokens]
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
    optimizers = build_optimizers(model, optimizer)
    return model, Sizes(model.num_parameters(), largest, state_bytes(optimizers))


def state_memory(mode: str, sizes: Sizes, gpus: int, autocast: bool) -> float:
    """Bytes per GPU of weights, gradients and optimizer state.

    One GPU, DDP and FSDP2: fp32 weights and gradients under autocast, whose casts are kept for the step; DDP adds its
    buckets. ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054: 16-bit weights and gradients, fp32 master weights.
    """
    P, state = sizes.parameters, sizes.optimizer
    casts = 2 * P * autocast
    gathered = 2 * sizes.largest_block * (2 + 2)  # this block's and the next one's weights; their gradients
    return {
        "one GPU": 8 * P + casts + state,
        "DDP": 12 * P + casts + state,
        "ZeRO-1": 4 * P + (4 * P + state) / gpus,
        "ZeRO-2": 2 * P + (6 * P + state) / gpus,
        "ZeRO-3": (8 * P + state) / gpus + gathered,
        "FSDP2": (8 * P + state) / gpus + gathered,
    }[mode]


MODES = ("one GPU", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")


def largest_batch(config: MiniMindConfig, seq_len: int, free: float, checkpointing: bool) -> int:
    """Rows per GPU whose activations fit into so many bytes; 0 if not even one does."""
    per_row = activation_bytes(config, 1, seq_len, True, checkpointing)
    return max(int(free // per_row), 0)


# ------------------------------------------------------------------------------------------------ time and cost


def count_tokens(args: argparse.Namespace) -> float:
    if args.data_path is None:
        return args.tokens
    try:
        files = [file for source in parse_sources([args.data_path]) for file in source.files]
        return sum(DataFile(file).text_size for file in files) / args.bytes_per_token * args.epochs
    except DataError as error:
        raise UsageError(f"--data_path {error}; or give --tokens") from None


def print_plan(args: argparse.Namespace) -> None:
    config, gpu = PRESETS[args.preset], GPUS[args.gpu]
    model, sizes = sizes_of(config, args.optimizer)
    active = model.num_parameters(active=True)
    print(
        f"{args.preset}: {sizes.parameters / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {args.optimizer}; "
        f"{args.gpus} x {args.gpu} ({gpu.tflops:g} TFLOP/s {gpu.dtype}, {gpu.memory} GB); "
        f"{args.batch_size} x {args.seq_len} tokens per GPU and step\n"
    )
    print(f"{'GB per GPU':<10} {'state':>7} | {'activations':>11} {'total':>7} {'max batch':>9} | with checkpointing")
    for mode in MODES:
        state = state_memory(mode, sizes, args.gpus, autocast=True) + OVERHEAD
        line = f"{mode:<10} {state / 1e9:7.2f}"
        for checkpointing in (False, True):
            used = activation_bytes(config, args.batch_size, args.seq_len, True, checkpointing)
            batch = largest_batch(config, args.seq_len, FREE_SHARE * gpu.memory * 1e9 - state, checkpointing)
            fits = f"{batch}" if batch else "none fits"
            line += f" | {used / 1e9:11.2f} {(state + used) / 1e9:7.2f} {fits:>9}"
        print(line)

    flops = model.flops_per_token(args.seq_len)
    tokens = count_tokens(args)
    print(f"\n{tokens:,.0f} tokens, {flops / 1e6:,.0f} MFLOP each (forward and backward)")
    for gpus in sorted({1, args.gpus}):
        for checkpointing in (False, True):
            work = flops * (4 / 3 if checkpointing else 1)  # the forward, a third of it, is computed twice
            rate = gpus * gpu.tflops * 1e12 * args.mfu / work
            hours = tokens / rate / 3600
            cost = f", cost {hours * gpus * args.price:,.2f}" if args.price else ""
            how = " with checkpointing" if checkpointing else ""
            print(f"{gpus} x {args.gpu}{how}: {rate:,.0f} tokens/s, {hours:,.2f} hours{cost}")
    print(
        f"\nAssumed, not measured: {args.mfu:.0%} of the peak (--mfu) in every mode, so no time for communication; "
        f"{OVERHEAD / 1e9:g} GB for\nCUDA and the allocator; {1 - FREE_SHARE:.0%} of the memory left free; "
        "peaks and sizes from datasheets; activations as without\ntorch.compile, which keeps fewer. "
        "On a CPU a block's share agrees with autograd's within\n"
        "20 %. No mode was measured on a GPU."
        + (f"\n{args.bytes_per_token:g} bytes per token (--bytes_per_token)." if args.data_path else "")
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="base")
    add("--gpus", type=int, default=1)
    add("--gpu", choices=list(GPUS), default="3090")
    add("--batch_size", type=int, default=16, help="rows per GPU and step")
    add("--seq_len", type=int, default=512)
    add("--optimizer", choices=list(LEARNING_RATES), default="adamw")
    add("--mfu", type=float, default=0.35, help="share of the peak that is reached: an assumption")
    add("--tokens", type=float, default=2e9, help="to train on, over all epochs")
    add("--data_path", help="count the tokens of this file instead: its bytes over --bytes_per_token")
    add("--bytes_per_token", type=float, default=4.0)
    add("--epochs", type=float, default=1.0, help="passes over --data_path")
    add("--price", type=float, help="of one GPU for an hour, in any currency")
    args = parser.parse_args()
    for name in ("gpus", "batch_size", "seq_len", "mfu", "tokens", "bytes_per_token", "epochs", "price"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value}: must be above 0")
    if args.mfu > 1:
        raise UsageError(f"--mfu {args.mfu}: it is a share of the peak, at most 1")
    print_plan(args)


if __name__ == "__main__":
    cli.run(main)
