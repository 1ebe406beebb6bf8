"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), for --deepspeed FILE alone: the processes share out the
optimizer's state (stage 1), the gradients too (2), the weights too (3).

The model stays fp32 and computes under autocast, as without DeepSpeed. --compile 1 works with stages 1 and 2.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cli import UsageError
from model.formats import CheckpointError
from model.model import Experts, MiniMindLM
from trainer.parallel import Processes, filled, skeleton

# In the file of --deepspeed these would do once more, or otherwise, what our flags say.
TAKEN = ("optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "train_batch_size")


def zero_config(path: str, batch_size: int, accumulation_steps: int, grad_clip: float) -> dict:
    """The file of --deepspeed, each "auto" filled in from our flags. UsageError if it cannot be used."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except OSError as error:
        raise UsageError(f"--deepspeed {path}: {error.strerror}; give configs/zero1.json, 2 or 3") from None
    except (ValueError, KeyError, TypeError):
        stage = None
    if stage not in (1, 2, 3):
        raise UsageError(f"--deepspeed {path}: it must be JSON with zero_optimization.stage 1, 2 or 3")
    for name in TAKEN:
        if name in config:
            raise UsageError(
                f"--deepspeed {path}: {name} is what our flags say (--optimizer, --learning_rate, --dtype, "
                "--batch_size): leave it out of the file"
            )
    automatic = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": grad_clip,
    }
    for name, value in automatic.items():
        if config.get(name, "auto") not in ("auto", value):
            raise UsageError(
                f'--deepspeed {path}: {name} {config[name]} is not that of our flags, {value}: write "auto"'
            )
    return {name: value for name, value in config.items() if not name.startswith("_")} | automatic


def check_flags(config: dict, path: str, optimizer: str, compile: str) -> None:
    """UsageError for flags that ZeRO cannot follow."""
    if optimizer == "muon":
        raise UsageError(
            f"--deepspeed {path}: ZeRO cuts the matrices into flat pieces, and Muon needs them whole: use --optimizer "
            "adamw, or --fsdp in place of --deepspeed"
        )
    if config["zero_optimization"]["stage"] == 3 and compile == "1":
        raise UsageError(
            f"--compile 1 does not work with --deepspeed {path}: under ZeRO 3 a layer has its weights only while it "
            "runs; leave --compile out, or use ZeRO 2 or --fsdp"
        )


class ZeroParallel:
    """The methods of Parallel, by DeepSpeed. Offload to main memory works with torch's AdamW, which needs no op of
    DeepSpeed's own."""

    def __init__(
        self,
        model: MiniMindLM,
        processes: Processes,
        make_optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]],
        dtype: torch.dtype,
        config: dict,
        path: str,
    ):
        if dtype == torch.float16:
            raise UsageError("--deepspeed with fp16 is not supported: use --dtype bf16 or fp32, or --fsdp")
        os.environ.setdefault("DS_ACCELERATOR", processes.device.type)
        try:
            import deepspeed
        except ImportError:
            raise UsageError("--deepspeed: the package is missing: pip install deepspeed") from None
        deepspeed.utils.logger.setLevel("ERROR")
        config = config | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        if dtype != torch.float32:
            config["torch_autocast"] = {"enabled": True, "dtype": str(dtype).removeprefix("torch.")}
        self.model, self.skeleton, self.processes, self.deepspeed = model, skeleton(model), processes, deepspeed
        self.stage = config["zero_optimization"]["stage"]
        if self.stage == 3 and model.config.is_moe:  # which experts are asked for differs between the processes
            deepspeed.utils.set_z3_leaf_modules(model, [Experts])
        self.optimizers = make_optimizers(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        try:
            self.module, self.zero, _, _ = deepspeed.initialize(
                model=model, model_parameters=trained, optimizer=self.optimizers[0], config=config,
                dist_init_required=False,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            raise
        except (ValueError, AssertionError, RuntimeError) as error:  # the file's mistakes, and what it cannot compile
            said = " ".join(str(error).split())[:300]
            raise UsageError(
                f"--deepspeed {path}: DeepSpeed says: {said} (check the file; on a CPU, and for "
                "some offload, it compiles C++, which needs a compiler and ninja)"
            ) from error

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # backward() says it

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)  # how many batches a step has may differ
        self.module.backward(loss * self.processes.count, scale_wrt_gas=False)
        if not last:
            self.module.step()

    def step(self, loss: float) -> float:
        """As Parallel.step(), but a step that is not finite cannot be undone: CheckpointError."""
        norm = math.nan
        if math.isfinite(loss):
            self.module.step()
            norm = float(self.module.get_global_grad_norm())
        if not math.isfinite(norm):
            raise CheckpointError(
                "loss or gradient is not finite: lower --learning_rate or look at the data; --from_resume 1 goes on "
                "from the last state"
            )
        return norm

    def gives_up(self) -> bool:
        return True

    def _pieces(self) -> list[Tensor]:
        """This process's flat pieces of the weights, which the optimizer steps."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.zero, name))

    def _weights(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return self.model.state_dict()
        weights = {}
        for name, p in self.model.named_parameters():
            with self.deepspeed.zero.GatheredParameters(p):
                weights[name] = p.detach().cpu().clone()
        return weights

    def state_dict(self) -> dict:
        """Weights as one process has them; the optimizer's state in as many pieces as there are processes."""
        state = self.optimizers[0].state
        mine = [{name: _on_cpu(value) for name, value in state[piece].items()} for piece in self._pieces()]
        pieces = [None] * self.processes.count
        dist.gather_object(mine, pieces if self.processes.is_main else None)
        return {"model": self._weights(), "zero": {"stage": self.stage, "pieces": pieces}}

    def load_state_dict(self, state: dict) -> None:
        if "zero" not in state:
            raise UsageError("--from_resume 1: that run was without --deepspeed; leave it out")
        count, stage = len(state["zero"]["pieces"]), state["zero"]["stage"]
        if count != self.processes.count or stage != self.stage:
            raise UsageError(
                f"--from_resume 1: this state of ZeRO {stage} is in {count} pieces, one for each process: go on "
                f"with the same stage and {count} processes (there are {self.processes.count}), or start anew"
            )
        for piece, saved in zip(self._pieces(), state["zero"]["pieces"][self.processes.rank], strict=True):
            self.optimizers[0].state[piece] = {
                name: value.to(piece.device) if name != "step" else value for name, value in saved.items()
            }

    def whole_model(self) -> MiniMindLM:
        return filled(self.skeleton, self._weights())


def _on_cpu(value):
    return value.detach().cpu() if isinstance(value, Tensor) else value
