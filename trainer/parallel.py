"""Many processes: how they find each other, and what wraps the model: nothing, DDP, FSDP2 or DeepSpeed's ZeRO.

rank, world_size, local_rank = processes(); join(rank, world_size, device)
engine = start(run)      # engine.model is what the loss sees; then accumulating(), backward(), step(), state()

Both engines give the loop the same few methods, and weights and resume state on rank 0 in our one format.

--compile 1 gives the same under DDP, FSDP2 and ZeRO 2 (1e-5 in fp32); ZeRO 3 cannot be compiled.

N processes compute what one with the same global batch does, but for the balancing loss of a MoE: it is the product of
two means over the tokens (MoEFeedForward), so its value over all tokens is not the mean of the processes' values; each
process balances its own tokens, as every batch of an accumulated step does.
"""

import contextlib
import copy
import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cli import UsageError
from model.checkpoint import CheckpointError
from model.model import Experts, MiniMindLM
from trainer.optimizer import build_optimizers

if TYPE_CHECKING:
    from trainer.trainer import Run

JOIN_SECONDS = 60  # that a process waits for all others to start
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# In the file of --deepspeed these would do once more, or otherwise, what our flags say.
TAKEN = ("optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "train_batch_size")
REMEDY = "start with torchrun --nproc_per_node N, which sets them all, or unset them"


def processes() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the variables that torchrun and deepspeed set; (0, 1, 0) without a launcher.

    UsageError if some are missing or make no sense."""
    if not any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return 0, 1, 0
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        given = ", ".join(name for name in VARIABLES if name in os.environ)
        raise UsageError(f"{given} set in the environment, but not {', '.join(missing)}: {REMEDY}")
    numbers = {name: os.environ[name] for name in VARIABLES if name != "MASTER_ADDR"}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise UsageError(f"{name}={value} in the environment is not a number: {REMEDY}")
    rank, world_size, local_rank = (int(numbers[name]) for name in VARIABLES[:3])
    if not max(rank, local_rank) < world_size:
        raise UsageError(f"RANK={rank} and LOCAL_RANK={local_rank} must be below WORLD_SIZE={world_size}: {REMEDY}")
    return rank, world_size, local_rank


def join(rank: int, world_size: int, device: torch.device) -> None:
    """Meet the other processes. UsageError if they do not come."""
    try:
        # A minute to meet, but half an hour to wait for one that tokenises a large file.
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))))
        store.set(f"joined {rank}", "")
        store.wait([f"joined {other}" for other in range(world_size)], timedelta(seconds=JOIN_SECONDS))
    except (dist.DistError, ValueError, OSError):
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(
            f"WORLD_SIZE={world_size}, but not all of these processes met at MASTER_ADDR:MASTER_PORT {address} within "
            f"{JOIN_SECONDS} s: check the numbers, the address, and that each machine was started"
        ) from None
    store.set_timeout(timedelta(minutes=30))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))


def require_same(run: "Run", what: str, found) -> None:
    """UsageError unless all processes found the same: several machines must see the same files. All must call it."""
    everyone = [None] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(everyone, found)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise UsageError(
                f"{what}: {everyone[0]} for process 0, {other} for process {rank}; all machines must see the same "
                "files: put --out_dir and the data on a disk they share, or copy them to each"
            )


def start(run: "Run") -> "Engine | ZeroEngine":
    """Wrap run.model, whose weights are those to begin with; take the optimizers' state from run.resume."""
    engine = (ZeroEngine if run.args.deepspeed else Engine)(run)
    if run.resume:
        engine.restore(run.resume)
    return engine


def check(args, world_size: int) -> None:
    """UsageError for engines that do not fit each other, the optimizer or the number of processes."""
    if args.fsdp and args.deepspeed:
        raise UsageError("--fsdp and --deepspeed are two ways to do the same: leave one out")
    flag = "--fsdp" if args.fsdp else f"--deepspeed {args.deepspeed}" if args.deepspeed else None
    if flag and "RANK" not in os.environ:
        raise UsageError(f"{flag} needs a launcher, also on one device: torchrun --nproc_per_node N train_x.py {flag}")
    if args.deepspeed:
        if args.optimizer == "muon":
            raise UsageError(
                f"{flag}: ZeRO cuts the matrices into flat pieces, and Muon needs them whole: use --optimizer adamw, "
                "or --fsdp in place of --deepspeed"
            )
        if zero_config(args)["zero_optimization"]["stage"] == 3:
            if args.compile == "1":
                raise UsageError(
                    f"--compile 1 does not work with {flag}: under ZeRO 3 a layer has its weights only while it runs; "
                    "leave --compile out, or use ZeRO 2 or --fsdp"
                )
            args.compile = "0"


def zero_config(args) -> dict:
    """The file of --deepspeed, each "auto" filled in from our flags. UsageError if it cannot be used."""
    try:
        config = json.loads(Path(args.deepspeed).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except OSError as error:
        raise UsageError(f"--deepspeed {args.deepspeed}: {error.strerror}; give configs/zero1.json, 2 or 3") from None
    except (ValueError, KeyError, TypeError):
        stage = None
    if stage not in (1, 2, 3):
        raise UsageError(f"--deepspeed {args.deepspeed}: it must be JSON with zero_optimization.stage 1, 2 or 3")
    for name in TAKEN:
        if name in config:
            raise UsageError(
                f"--deepspeed {args.deepspeed}: {name} is what our flags say (--optimizer, --learning_rate, --dtype, "
                "--batch_size): leave it out of the file"
            )
    automatic = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.accumulation_steps,
        "gradient_clipping": args.grad_clip,
    }
    for name, value in automatic.items():
        if config.get(name, "auto") not in ("auto", value):
            raise UsageError(
                f'--deepspeed {args.deepspeed}: {name} {config[name]} is not that of our flags, {value}: write "auto"'
            )
    return {name: value for name, value in config.items() if not name.startswith("_")} | automatic


# ------------------------------------------------------------------------------------------------ torch's own engines


class Engine:
    """One process, several with whole copies (DDP), or several that share the weights out among them (FSDP2)."""

    def __init__(self, run: "Run"):
        self.run, self.model = run, run.model
        self.plain = run.model  # of which whole_model() is filled; its sizes are always those of the whole
        if run.args.fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            self.plain = _skeleton(run.model)
            mesh = init_device_mesh(run.device.type, (run.world_size,))
            for block in run.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(run.model, mesh=mesh)
        elif run.world_size > 1:
            ids = [run.device.index] if run.device.index is not None else None
            self.model = nn.parallel.DistributedDataParallel(run.model, device_ids=ids)
        args = run.args
        self.optimizers = build_optimizers(run.model, args.optimizer, args.learning_rate, args.weight_decay)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one batch of a step; the processes exchange gradients after the last one."""
        if self.run.args.fsdp:
            self.run.model.set_requires_gradient_sync(last)
        elif self.run.world_size > 1 and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.scaler.scale(loss * self.run.world_size).backward()  # the engines average over the processes

    def step(self, loss: float) -> float:
        """Clip, step if loss and gradient are finite, and clear the gradients; returns their norm before."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.run.model.parameters(), self.run.args.grad_clip)
        norm = _whole(norm).item()
        if math.isfinite(loss) and math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def gives_up(self) -> bool:
        """Whether steps that are not finite cannot be the search for a loss scale."""
        return self.scaler.get_scale() <= 1

    def state(self) -> dict:
        """Weights and optimizers as one process has them. All processes must call it."""
        optimizers = [_map(_whole, optimizer.state_dict()) for optimizer in self.optimizers]
        weights = {name: _whole(w) for name, w in self.run.model.state_dict().items()}
        return {"model": weights, "optimizers": optimizers, "scaler": self.scaler.state_dict()}

    def restore(self, state: dict) -> None:
        if "zero" in state:
            raise UsageError("--from_resume 1: that run was with --deepspeed; give the same file")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if self.run.args.fsdp:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                saved = saved | {"state": {i: _shard_like(params[i], s) for i, s in saved["state"].items()}}
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])

    def whole_model(self) -> MiniMindLM:
        """The model with all its weights, on rank 0. All processes must call it."""
        if self.plain is self.run.model:
            return self.plain
        return _filled(self.plain, {name: _whole(w) for name, w in self.run.model.state_dict().items()})


def _skeleton(model: MiniMindLM) -> MiniMindLM:
    """The same model without its weights."""
    return copy.deepcopy(model).to("meta")


def _filled(skeleton: MiniMindLM, weights: dict[str, Tensor]) -> MiniMindLM:
    skeleton.load_state_dict(weights, assign=True)
    return skeleton


def _whole(value):
    """The full tensor of one that is shared out; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _map(function, value):
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_map(function, v) for v in value]
    return function(value)


def _shard_like(p: DTensor, state: dict) -> dict:
    """An optimizer's state of one parameter, shared out as the parameter is; every process has the whole one."""
    return {
        name: distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        if isinstance(value, Tensor) and value.shape == p.shape
        else value
        for name, value in state.items()
    }


# ------------------------------------------------------------------------------------------------ DeepSpeed


class ZeroEngine:
    """ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): the processes share out the optimizer's state (1), the
    gradients too (2), the weights too (3). The model stays fp32 and computes under autocast, as without DeepSpeed.

    Run with torchrun and with `deepspeed --num_accelerators 2 train_x.py` (its --bind_cores_to_rank needs numactl), on
    CPUs; offload to main memory with torch's AdamW, which needs no op of DeepSpeed's; offload to NVMe was not run."""

    def __init__(self, run: "Run"):
        if run.dtype == torch.float16:
            raise UsageError("--deepspeed with fp16 is not supported: use --dtype bf16 or fp32, or --fsdp")
        os.environ.setdefault("DS_ACCELERATOR", run.device.type)
        try:
            import deepspeed
        except ImportError:
            raise UsageError("--deepspeed: the package is missing: pip install deepspeed") from None
        deepspeed.utils.logger.setLevel("ERROR")
        args = run.args
        config = zero_config(args) | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        if run.dtype != torch.float32:
            config["torch_autocast"] = {"enabled": True, "dtype": str(run.dtype).removeprefix("torch.")}
        self.run, self.plain, self.deepspeed = run, _skeleton(run.model), deepspeed
        self.stage = config["zero_optimization"]["stage"]
        if self.stage == 3 and run.model.config.is_moe:  # which experts are asked for differs between the processes
            deepspeed.utils.set_z3_leaf_modules(run.model, [Experts])
        [adamw] = build_optimizers(run.model, args.optimizer, args.learning_rate, args.weight_decay)
        trained = [p for p in run.model.parameters() if p.requires_grad]
        try:
            self.model, self.optimizer, _, _ = deepspeed.initialize(
                model=run.model, model_parameters=trained, optimizer=adamw, config=config, dist_init_required=False
            )
        except torch.OutOfMemoryError:
            raise
        except (ValueError, AssertionError, RuntimeError) as error:  # the file's mistakes, and what it cannot compile
            said = " ".join(str(error).split())[:300]
            raise UsageError(
                f"--deepspeed {args.deepspeed}: DeepSpeed says: {said} (check the file; on a CPU, and for "
                "some offload, it compiles C++, which needs a compiler and ninja)"
            ) from error
        self.optimizers = [adamw]

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # DeepSpeed counts the batches itself

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.backward(loss * self.run.world_size, scale_wrt_gas=False)
        if not last:
            self.model.step()

    def step(self, loss: float) -> float:
        """As Engine.step(), but a step that is not finite cannot be undone: CheckpointError."""
        if math.isfinite(loss):
            self.model.step()
            norm = float(self.model.get_global_grad_norm())
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise CheckpointError(
                f"loss or gradient is not finite: lower --learning_rate (now {self.run.args.learning_rate}) or look at "
                "the data; --from_resume 1 goes on from the last state"
            )
        return norm

    def gives_up(self) -> bool:
        return True

    def _pieces(self) -> list[Tensor]:
        """This process's flat pieces of the weights, which the optimizer steps."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, name))

    def _weights(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return self.run.model.state_dict()
        weights = {}
        for name, p in self.run.model.named_parameters():
            with self.deepspeed.zero.GatheredParameters(p):
                weights[name] = p.detach().cpu().clone()
        return weights

    def state(self) -> dict:
        """Weights as one process has them; the optimizer's state in as many pieces as there are processes."""
        mine = [_map(_on_cpu, dict(self.optimizers[0].state[piece])) for piece in self._pieces()]
        pieces = [None] * self.run.world_size
        dist.gather_object(mine, pieces if self.run.is_main else None)
        return {"model": self._weights(), "zero": {"stage": self.stage, "pieces": pieces}}

    def restore(self, state: dict) -> None:
        if "zero" not in state:
            raise UsageError("--from_resume 1: that run was without --deepspeed; leave it out")
        processes, stage = len(state["zero"]["pieces"]), state["zero"]["stage"]
        if processes != self.run.world_size or stage != self.stage:
            raise UsageError(
                f"--from_resume 1: this state of ZeRO {stage} is in {processes} pieces, one for each process: go on "
                f"with the same stage and {processes} processes (there are {self.run.world_size}), or start anew"
            )
        for piece, saved in zip(self._pieces(), state["zero"]["pieces"][self.run.rank], strict=True):
            self.optimizers[0].state[piece] = {
                name: value.to(piece.device) if name != "step" else value for name, value in saved.items()
            }

    def whole_model(self) -> MiniMindLM:
        return _filled(self.plain, self._weights())


def _on_cpu(value):
    return value.detach().cpu() if isinstance(value, Tensor) else value
