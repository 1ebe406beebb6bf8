"""What every train_*.py shares: set-up (device, precision, processes, resume) and the one training loop.

args = cli.arguments("pretrain", __doc__).parse_args()
run = trainer.setup("pretrain", args)
...
trainer.train(run, loss_fn, train_rows, val_rows, tokenizer)
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cli import UsageError
from dataset.lm_dataset import batches, token_bytes, validation_batches
from dataset.starter.corpus import ensure_starter
from model import checkpoint
from model.device import find_device, training_dtype
from model.model import PRESETS, MiniMindConfig, MiniMindLM
from trainer import parallel
from trainer.arguments import check, identity
from trainer.interrupt import Interrupt
from trainer.optimizer import LEARNING_RATES, learning_rate_scale, set_learning_rate
from trainer.report import Reporter
from trainer.speed import compile_if_worth, matmul_peak

MAX_BAD_STEPS = 5  # non-finite steps in a row before a run gives up
SAVE_SECONDS = 120  # between resume states, unless --save_interval says otherwise,
SAVE_SHARE = 0.01  # or longer, so that they take no more of the time than this

LossFn = Callable[[nn.Module, dict], tuple[Tensor, dict[str, float | Tensor]]]
SaveFn = Callable[[Path, MiniMindLM, dict], None]


# ------------------------------------------------------------------------------------------------ set-up


@dataclass
class Run:
    """Everything about a run that is not its data or its loss."""

    stage: str
    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    model: MiniMindLM
    rank: int = 0
    world_size: int = 1
    resume: dict | None = None
    compiled: bool | None = None  # None = not decided yet
    reporter: Reporter | None = None
    meta: dict = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def path(self, suffix: str) -> Path:
        """out/<stage>_<hidden>[_moe]<suffix>"""
        weights = checkpoint.checkpoint_path(self.args.out_dir, self.stage, self.model.config)
        return weights.with_name(weights.stem + suffix)


def setup(stage: str, args: argparse.Namespace, minutes: float, rate: float = 1.0) -> Run:
    """Processes, device, seed, and the model: new, from --from_weight, or from the resume state.

    `minutes` is the budget on the starter corpus when no flag gives one; `rate` the stage's share of the learning rate
    of a training from nothing."""
    check(args)
    if args.epochs is args.steps is args.minutes is None:
        args.minutes, args.epochs = (minutes, None) if args.data_path is None else (None, 1.0)
    rank, world_size, local_rank = parallel.processes()
    parallel.check(args, world_size)
    device = find_device(args.device)
    if world_size > 1 or args.fsdp or args.deepspeed:
        if device.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise UsageError(
                    f"LOCAL_RANK={local_rank}, but there are {torch.cuda.device_count()} CUDA devices here: start as "
                    "many processes as there are devices, with --nproc_per_node"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        parallel.join(rank, world_size, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)

    model = _starting_model(args)
    if args.learning_rate is None:  # wide matrices want smaller steps (Yang et al. 2022, arXiv:2203.03466)
        args.learning_rate = rate * LEARNING_RATES[args.optimizer] * 256 / model.config.hidden_size
    run = Run(args.save_weight or stage, args, device, training_dtype(device, args.dtype), model, rank, world_size)
    try:
        run.path(".pth").parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out_dir {args.out_dir}: cannot be made: {error.strerror}; choose another folder") from None
    if not os.access(run.path(".pth").parent, os.W_OK):
        raise UsageError(f"--out_dir {args.out_dir}: cannot be written to; choose another folder")
    if args.from_resume:
        run.resume = checkpoint.load_resume(run.path("_resume"))
        finished = run.resume is None and _is_finished(run)
        found = f"step {run.resume['progress']['step']}" if run.resume else "finished" if finished else "none"
        parallel.require_same(run, f"--from_resume 1: state in {run.path('_resume')}", found)
        if finished:
            if run.is_main:
                checkpoint.remove_resume(run.path("_resume"))  # empty, of a run that was killed as it tidied up
                print(f"{run.path('.pth')} is complete; without --from_resume it is trained anew")
            sys.exit(0)
        if run.resume is None and run.is_main:
            print(f"--from_resume 1: no state in {run.path('_resume')}, the run starts anew", file=sys.stderr)
    run.model.to(device)
    run.model.activation_checkpointing = bool(args.activation_checkpointing)
    if rank:
        torch.manual_seed(args.seed + rank)  # the weights are equal by now, what is dropped out must not be
    return run


def _starting_model(args: argparse.Namespace) -> MiniMindLM:
    if args.from_weight != "none":
        path = checkpoint.find_weights(args.out_dir, args.from_weight, args.hidden_size, bool(args.use_moe))
        model, _ = checkpoint.load(path)
        has = {name: getattr(model.config, name) for name in ("hidden_size", "num_hidden_layers", "num_experts")}
        wanted = {name: getattr(PRESETS[args.preset], name) for name in has} if args.preset else {}
        wanted |= {name: vars(args)[name] for name in ("hidden_size", "num_hidden_layers") if vars(args)[name]}
        if any(has[name] != value for name, value in wanted.items()) or (args.use_moe and not model.config.is_moe):
            sizes = ", ".join(f"{name} {value}" for name, value in has.items())
            flags = [f"--{name}" for name in ("preset", "hidden_size", "num_hidden_layers") if vars(args)[name]]
            flags = " and ".join(flags + ["--use_moe"] * args.use_moe)
            raise UsageError(f"{flags} cannot change the shape of {path}, which has {sizes}: leave out {flags}")
        return model.train()
    values = PRESETS[args.preset or "nano"].to_dict()
    if args.hidden_size and args.hidden_size != values["hidden_size"]:
        # Keep the proportions: the SwiGLU widths are about 8/3 of hidden_size, in multiples of 64.
        values |= {"hidden_size": args.hidden_size, "head_dim": None}
        values["intermediate_size"] = 64 * math.ceil(args.hidden_size * 8 / 3 / 64)
    if args.num_hidden_layers:
        values["num_hidden_layers"] = args.num_hidden_layers
    if args.use_moe and not values["num_experts"]:
        values |= {"num_experts": 4, "num_experts_per_tok": 1, "qk_norm": True}
    try:
        return MiniMindLM(MiniMindConfig.from_dict(values))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _is_finished(run: Run) -> bool:
    path = run.path(".pth")
    return path.exists() and checkpoint.load_meta(path).get("finished") == identity(run.args)


def datasets(args: argparse.Namespace, stage: str, make: Callable, tokenizer) -> tuple:
    """Training and validation rows by make(path, tokenizer, seq_len): of --data_path and --val_path (None without), or
    of the starter corpus' files for the stage."""
    paths = [args.data_path, args.val_path]
    if args.data_path is None:
        starter = ensure_starter()
        paths = [starter / f"{stage}.jsonl", args.val_path or starter / f"{stage}_val.jsonl"]
    quiet = os.environ.get("RANK", "0") != "0"
    return tuple(make(path, tokenizer, args.max_seq_len, quiet=quiet) if path else None for path in paths)


def with_balance(out, loss: Tensor, metrics: dict) -> tuple[Tensor, dict]:
    """What a loss_fn returns; a MoE adds its load-balancing loss and the share of the tokens that each expert got."""
    if out.aux_loss is None:
        return loss, metrics
    return loss + out.aux_loss, metrics | {"aux_loss": out.aux_loss, "expert_load": out.expert_load.mean(0)}


# ------------------------------------------------------------------------------------------------ budget


@dataclass
class Progress:
    """Where a run stands; saved with the resume state."""

    step: int = 0
    samples: int = 0  # rows taken from the stream, over all processes
    tokens: int = 0  # labels trained on
    slots: int = 0  # positions computed
    seconds: float = 0.0
    skipped: int = 0  # batches without labels, and steps whose loss or gradient was not finite
    next_val: float = 0.0  # share of the budget at which the next validation is due
    window: list[float] = field(default_factory=list)  # losses since the last line of the metrics log

    def share(self, args: argparse.Namespace, rows: int) -> float:
        """Of the budget that is used up; 1.0 or more ends the run."""
        shares = [0.0]
        if args.steps is not None:
            shares.append(self.step / max(args.steps, 1))
        if args.epochs is not None:
            shares.append(self.samples / max(math.ceil(args.epochs * rows), 1))
        if args.minutes is not None:
            shares.append(self.seconds / max(args.minutes * 60, 1e-9))
        return max(shares)


# ------------------------------------------------------------------------------------------------ the loop


def train(run: Run, loss_fn: LossFn, train_rows, val_rows, tokenizer, save: SaveFn = checkpoint.save) -> None:
    """Train run.model until the budget is used up; write weights, resume state, metrics log and curve.

    loss_fn(model, batch) -> (loss, metrics): the mean loss over the batch's `weight` items, and further figures to log.
    Bits per byte are measured from the metric `cross_entropy` if there is one, else from the loss; a loss that is not a
    mean over tokens has none.
    save(path, model, meta): writes what was trained.
    """
    args, device = run.args, run.device
    parallel.require_same(run, f"rows of --data_path {args.data_path}", len(train_rows))
    progress = Progress()
    if run.resume:
        progress = _load(run)
    engine = parallel.start(run)
    if run.resume:
        _restore_rng(run)
    run.reporter = reporter = Reporter(run, progress)

    peak = matmul_peak(device, run.dtype)
    slots = args.batch_size * args.max_seq_len * args.accumulation_steps * run.world_size
    share_of_peak = 0.25  # a guess, only to decide about compiling
    expected = (args.minutes or math.inf) * 60
    if args.steps or args.epochs:
        steps = args.steps or args.epochs * len(train_rows) * args.max_seq_len / slots
        flops = steps * slots * 6 * engine.plain.num_parameters(active=True)
        expected = min(expected, flops / (peak * share_of_peak))
    expected, _ = _agree(run, expected, False)
    run.compiled = compile_if_worth(run, expected)
    reporter.start(engine.plain, run.compiled, peak)

    stream = batches(
        train_rows, args.batch_size, seed=args.seed, start_sample=progress.samples, rank=run.rank,
        world_size=run.world_size, num_workers=args.num_workers,
    )  # fmt: skip
    bytes_of = token_bytes(tokenizer).to(device)
    interrupt, bad_steps = Interrupt(), 0
    clock = time.perf_counter() - progress.seconds
    last_save, pause, stop = progress.seconds, SAVE_SECONDS, False
    saved = progress.step  # of the newest resume state; 0 = there is none
    while True:
        share = progress.share(args, len(train_rows))
        due = progress.step % args.val_interval == 0 if args.val_interval else share + 1e-9 >= progress.next_val
        if val_rows is not None and (due or share >= 1) and not stop:
            progress.next_val = 0.1 * (math.floor(share * 10 + 1e-6) + 1)
            reporter.validation(progress, validate(run, loss_fn, val_rows, bytes_of))
        if stop or share >= 1:
            break

        learning_rate = set_learning_rate(engine.optimizers, learning_rate_scale(share, args.warmup, 0.0, args.decay))
        micro_batches = [_to_device(next(stream), device) for _ in range(args.accumulation_steps)]
        weight = _total(run, sum(batch["weight"] for batch in micro_batches))
        progress.samples += args.batch_size * args.accumulation_steps * run.world_size
        progress.slots += slots
        progress.step += 1
        if weight == 0:
            progress.skipped += 1
            progress.seconds, stop = _agree(run, time.perf_counter() - clock, interrupt.asked)
            reporter.say(f"step {progress.step}: no token in the batch is to be learnt from; skipped")
            continue

        total_loss, metrics = torch.zeros((), device=device), {}
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with engine.accumulating(last):
                with run.autocast():
                    loss, metrics = loss_fn(engine.model, batch)
                # Each token counts the same, whichever batch or process it is in.
                loss = loss * (batch["weight"] / weight)
                engine.backward(loss, last)
            total_loss += loss.detach()
        loss_value = _total(run, total_loss)
        norm_value = engine.step(loss_value)
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            progress.tokens += int(_total(run, sum(batch["tokens"] for batch in micro_batches)))
            bad_steps = 0
        else:
            progress.skipped += 1
            bad_steps += 1
            reporter.say(f"step {progress.step}: loss {loss_value}, gradient norm {norm_value}; step skipped")
        if bad_steps >= MAX_BAD_STEPS and engine.gives_up():
            raise checkpoint.CheckpointError(
                f"{bad_steps} steps in a row were not finite: lower --learning_rate (now {args.learning_rate}) or look "
                f"at the data; the weights in {args.out_dir} are as they were"
            )

        progress.seconds, stop = _agree(run, time.perf_counter() - clock, interrupt.asked)
        reporter.step(progress, share, loss_value, norm_value, learning_rate, metrics)
        due = progress.step % args.save_interval == 0 if args.save_interval else False
        if due or (not args.save_interval and progress.seconds - last_save > pause):
            last_save, start = progress.seconds, time.perf_counter()
            try:
                _save_resume(run, progress, engine)
                saved = progress.step
            except checkpoint.CheckpointError as error:
                reporter.say(f"warning: {error}")
            seconds, _ = _agree(run, time.perf_counter() - start, False)
            pause = max(SAVE_SECONDS, seconds / SAVE_SHARE)

    try:
        if stop:
            _save_resume(run, progress, engine)
            reporter.interrupted(progress)
            sys.exit(130)
        model = engine.whole_model()
        if run.is_main:
            save(run.path(".pth"), model, reporter.figures(progress) | {"finished": identity(args)})
    except checkpoint.CheckpointError as error:
        remedy = f"; --from_resume 1 goes on from the state of step {saved}" if saved else ""
        raise checkpoint.CheckpointError(f"{error}{remedy}") from None
    if run.is_main:
        reporter.finish(progress)
        checkpoint.remove_resume(run.path("_resume"))


@torch.compiler.set_stance("force_eager")  # a graph without gradients would take longer to compile than it saves
@torch.no_grad()
def validate(run: Run, loss_fn: LossFn, rows, bytes_of: Tensor) -> dict[str, float]:
    """val_loss, val_bpb (bits per byte, if the loss is a mean over tokens) and val_<name> of each scalar metric, over
    the first rows, up to --val_tokens in all."""
    args = run.args
    sums: dict[str, float] = {}
    weight, tokens, n_bytes = 0, 0, 0
    if args.val_tokens:
        rows = rows.select(range(min(len(rows), max(1, args.val_tokens // args.max_seq_len))))
    run.model.eval()
    for batch in validation_batches(rows, args.batch_size):
        batch = _to_device(batch, run.device)
        with run.autocast():
            loss, metrics = loss_fn(run.model, batch)
        # How well a MoE balances its experts is no part of how well it knows the text.
        figures = {"loss": loss - metrics.pop("aux_loss", 0.0)}
        figures |= {name: value for name, value in metrics.items() if torch.as_tensor(value).ndim == 0}
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + float(value) * batch["weight"]
        weight += batch["weight"]
        tokens += batch["tokens"]
        labels = batch["labels"]
        n_bytes += bytes_of[labels[labels >= 0]].sum().item()
    run.model.train()
    means = {f"val_{name}": value / max(weight, 1) for name, value in sums.items()}
    if weight == tokens:
        means["val_bpb"] = sums.get("cross_entropy", sums["loss"]) / math.log(2) / max(n_bytes, 1)
    return means


def _to_device(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _total(run: Run, value: float | Tensor) -> float:
    """Sum over the processes."""
    if run.world_size == 1:
        return float(value)
    total = torch.as_tensor(value, dtype=torch.float64, device=run.device)
    dist.all_reduce(total)
    return total.item()


def _agree(run: Run, seconds: float, stop: bool) -> tuple[float, bool]:
    """Clocks and signals differ between processes; all follow the one that is furthest."""
    if run.world_size == 1:
        return seconds, stop
    both = torch.tensor([seconds, float(stop)], dtype=torch.float64, device=run.device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return both[0].item(), bool(both[1])


# ------------------------------------------------------------------------------------------------ resume


def _rng_state(device: torch.device) -> dict:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _save_resume(run: Run, progress: Progress, engine) -> None:
    state = engine.state()
    rng = [_rng_state(run.device)]
    if run.world_size > 1:
        rng = [None] * run.world_size
        dist.all_gather_object(rng, _rng_state(run.device))
    if not run.is_main:
        return
    state |= {
        "config": run.model.config.to_dict(),
        "compiled": run.compiled,
        "rng": rng,
        "progress": vars(progress).copy(),
        "arguments": vars(run.args).copy(),
        "identity": identity(run.args),
    }
    checkpoint.save_resume(run.path("_resume"), state, progress.step, run.args.keep)


def _load(run: Run) -> Progress:
    """The weights of the interrupted run, and where it stood. UsageError if it had other arguments."""
    state = run.resume
    changed = [k for k, v in identity(run.args).items() if state["identity"].get(k, v) != v]
    if changed:
        old = state["identity"]
        was = ", ".join(f"no --{k}" if old[k] is None else f"--{k} {old[k]}" for k in changed)
        raise UsageError(
            f"--from_resume 1: the interrupted run had {was}; give the same, or leave --from_resume out to start anew"
        )
    run.model.load_state_dict(state["model"])
    run.compiled = state.get("compiled")
    return Progress(**state["progress"])


def _restore_rng(run: Run) -> None:
    """After all that draws random numbers, such as the set-up of an engine."""
    states = run.resume["rng"]
    if run.world_size != len(states) and run.is_main:
        print(
            f"note: {len(states)} processes before, {run.world_size} now: the order of the data goes on without a "
            "sample lost or repeated; the random numbers (dropout) and the size of a step cannot be the same",
            file=sys.stderr,
        )
    if run.rank < len(states):
        rng = states[run.rank]
        torch.set_rng_state(rng["cpu"].cpu())
        if "cuda" in rng and run.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"].cpu(), run.device)
    run.resume = None  # half a gigabyte that is no longer needed
