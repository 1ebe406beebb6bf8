"""Many processes: how they find each other, and what they do with the model: nothing, DDP, or FSDP2.

processes = find_processes(device); join(processes)
parallel = Parallel(model, processes, ...)      # parallel.module is what the loss calls
with parallel.accumulating(last): loss = ...; parallel.backward(loss, last)
parallel.step(loss)

N processes compute what one with the same global batch does, but for the balancing loss of a MoE: it is the product of
two means over the tokens (MoEFeedForward), so its value over all tokens is not the mean of the processes' values; each
process balances its own tokens, as every batch of an accumulated step does.
"""

import contextlib
import copy
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cli import UsageError
from model.model import MiniMindLM

if dist.is_available():
    from torch.distributed.tensor import DTensor, distribute_tensor
else:  # some builds for Windows
    DTensor, distribute_tensor = (), None

JOIN_SECONDS = 60  # that a process waits for all others to start
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
REMEDY = "start with torchrun --nproc_per_node N, which sets them all, or unset them"


# ------------------------------------------------------------------------------------------------ processes


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, value: float | Tensor) -> float:
        """Sum over the processes."""
        if self.count == 1:
            return float(value)
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def agree(self, seconds: float, stop: bool = False) -> tuple[float, bool]:
        """Clocks and signals differ between processes; all follow the one that is furthest."""
        if self.count == 1:
            return seconds, stop
        both = torch.tensor([seconds, float(stop)], dtype=torch.float64, device=self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return both[0].item(), bool(both[1])

    def gather(self, value: Any) -> list:
        """The values of all processes, on each."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def require_same(self, what: str, found: Any) -> None:
        """UsageError unless all processes found the same: several machines must see the same files."""
        everyone = self.gather(found)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise UsageError(
                    f"{what}: {everyone[0]} for process 0, {other} for process {rank}; all machines must see the same "
                    "files: put --out_dir and the data on a disk they share, or copy them to each"
                )

    def random_states(self) -> list[dict]:
        """Those of all processes, on each."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return self.gather(state)

    def restore_random_states(self, states: list[dict]) -> None:
        if self.count != len(states) and self.is_main:
            print(
                f"note: {len(states)} processes before, {self.count} now: the order of the data goes on without a "
                "sample lost or repeated; the random numbers (dropout) and the size of a step cannot be the same",
                file=sys.stderr,
            )
        if self.rank < len(states):
            torch.set_rng_state(states[self.rank]["cpu"].cpu())
            if "cuda" in states[self.rank] and self.device.type == "cuda":
                torch.cuda.set_rng_state(states[self.rank]["cuda"].cpu(), self.device)


def find_processes(device: torch.device, flag: str | None = None) -> Processes:
    """Where the launcher put this process, not yet in touch with the others; alone without a launcher, which `flag`
    needs. UsageError if the environment makes no sense."""
    rank, count, local_rank = _from_environment()
    if flag and "RANK" not in os.environ:
        raise UsageError(f"{flag} needs a launcher, also on one device: torchrun --nproc_per_node N train_x.py {flag}")
    if device.type == "cuda" and (count > 1 or flag):
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"LOCAL_RANK={local_rank}, but there are {torch.cuda.device_count()} CUDA devices here: start as "
                "many processes as there are devices, with --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return Processes(rank, count, local_rank, device)


def _from_environment() -> tuple[int, int, int]:
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


def join(processes: Processes) -> None:
    """Meet the other processes. UsageError if they do not come."""
    rank, count = processes.rank, processes.count
    if not dist.is_available():
        raise UsageError("this PyTorch was built without torch.distributed: train in one process, without torchrun")
    try:
        # A minute to meet, but half an hour to wait for one that tokenises a large file.
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))))
        store.set(f"joined {rank}", "")
        store.wait([f"joined {other}" for other in range(count)], timedelta(seconds=JOIN_SECONDS))
    except (dist.DistError, ValueError, OSError):
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(
            f"WORLD_SIZE={count}, but not all of these processes met at MASTER_ADDR:MASTER_PORT {address} within "
            f"{JOIN_SECONDS} s: check the numbers, the address, and that each machine was started"
        ) from None
    store.set_timeout(timedelta(minutes=30))
    backend = "nccl" if processes.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(minutes=30))


# ------------------------------------------------------------------------------------------------ DDP and FSDP2


class Parallel:
    """Model and optimizers in one process, in several with whole copies (DDP), or in several that share them out
    (FSDP2). zero.py has the same methods by DeepSpeed."""

    def __init__(
        self,
        model: MiniMindLM,
        processes: Processes,
        make_optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]],
        dtype: torch.dtype,
        grad_clip: float,
        fsdp: bool = False,
    ):
        self.model, self.processes, self.grad_clip, self.fsdp = model, processes, grad_clip, fsdp
        self.module: nn.Module = model  # what the loss calls
        if fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            self.skeleton = skeleton(model)
            mesh = init_device_mesh(processes.device.type, (processes.count,))
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif processes.count > 1:
            ids = [processes.device.index] if processes.device.index is not None else None
            self.module = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        self.optimizers = make_optimizers(model)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == torch.float16)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one batch of a step; the processes exchange gradients after the last one."""
        if self.fsdp:
            self.model.set_requires_gradient_sync(last)
        elif self.processes.count > 1 and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.scaler.scale(loss * self.processes.count).backward()  # the gradients are averaged over the processes

    def step(self, loss: float) -> float:
        """Clip, step if loss and gradient are finite, and clear the gradients; returns their norm before."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = _whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)).item()
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

    def state_dict(self) -> dict:
        """Weights and optimizers as one process has them. All processes must call it."""
        optimizers = [_map(_whole, optimizer.state_dict()) for optimizer in self.optimizers]
        weights = {name: _whole(w) for name, w in self.model.state_dict().items()}
        return {"model": weights, "optimizers": optimizers, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """The optimizers' state of state_dict(); the weights are in the model before it is wrapped."""
        if "zero" in state:
            raise UsageError("--from_resume 1: that run was with --deepspeed; give the same file")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if self.fsdp:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                saved = saved | {"state": {i: _shard_like(params[i], s) for i, s in saved["state"].items()}}
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])

    def whole_model(self) -> MiniMindLM:
        """The model with all its weights, on rank 0. All processes must call it."""
        if not self.fsdp:
            return self.model
        return filled(self.skeleton, {name: _whole(w) for name, w in self.model.state_dict().items()})


def skeleton(model: MiniMindLM) -> MiniMindLM:
    """The same model without its weights."""
    return copy.deepcopy(model).to("meta")


def filled(empty: MiniMindLM, weights: dict[str, Tensor]) -> MiniMindLM:
    """A skeleton with weights again."""
    empty.load_state_dict(weights, assign=True)
    for part in empty.modules():
        if isinstance(part, MiniMindLM):
            part.set_rope()  # which no weights hold
    return empty


def _whole(value: Any) -> Any:
    """The full tensor of one that is shared out; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _map(function: Callable, value: Any) -> Any:
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
