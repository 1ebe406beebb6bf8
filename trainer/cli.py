"""The command line that all train_*.py share, and how a script ends when something is wrong.

args = cli.arguments("pretrain", __doc__).parse_args()
if __name__ == "__main__": cli.run(main)
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dataset.lm_dataset import DataError
from model import checkpoint
from model.model import PRESETS
from trainer.arguments import ArgumentParser
from trainer.optimizer import LEARNING_RATES

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def arguments(stage: str, description: str, **defaults) -> argparse.ArgumentParser:
    """The flags that all train scripts have; `defaults` replaces the values that differ from stage to stage."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=list(PRESETS), help="shape of a new model (default: nano)")
    add("--hidden_size", type=int, help="instead of the preset's")
    add("--num_hidden_layers", type=int, help="instead of the preset's")
    add("--use_moe", type=int, choices=(0, 1), default=0, help="1 = 4 experts in place of each feed-forward")
    add("--from_weight", default="none", help="weights to start from: a stage such as pretrain, a path, or none")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", help="JSONL file (default: the starter corpus)")
    add("--val_path", help="held-out JSONL file (default: the starter corpus's, or none with your own --data_path)")
    add("--max_seq_len", type=int, default=256, help="tokens in a row")
    add("--num_workers", type=int, default=0, help="processes that prepare batches")
    add("--val_tokens", type=int, default=32_768, help="validate on at most this many tokens, 0 = all")

    add = parser.add_argument_group(
        "budget (the first that is used up ends the run; default: a few minutes, or one epoch of your own --data_path)"
    ).add_argument
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="optimizer steps")
    add("--minutes", type=float, help="wall-clock minutes of training, compilation included")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=int, default=16, help="rows per step, process and accumulation")
    add("--accumulation_steps", type=int, default=1, help="batches whose gradients make one step")
    add("--optimizer", choices=list(LEARNING_RATES), default="muon")
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    add("--learning_rate", type=float, help=f"default: 256 / hidden_size times {rates}, less after the SFT")
    add("--weight_decay", type=float, default=0.1)
    add("--warmup", type=float, default=0.02, help="share of the budget in which the learning rate rises")
    add("--decay", type=float, default=0.8, help="share of the budget, at its end, in which it falls to zero")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=42)

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=list(DTYPES), help="precision of the arithmetic (default: bf16 where the hardware does it)")
    add("--activation_checkpointing", type=int, choices=(0, 1), default=0, help="1 = less memory, a third more time")
    add("--fsdp", action="store_true", help="under torchrun: share out weights and optimizer (FSDP2)")
    add("--deepspeed", metavar="FILE", help="under torchrun or deepspeed: ZeRO, e.g. configs/zero2.json")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher gives it; LOCAL_RANK is what counts
    add("--compile", choices=("auto", "0", "1"), default="auto", help="torch.compile; auto = if the run is long enough")

    add = parser.add_argument_group("output").add_argument
    add("--out_dir", default=str(ROOT / "out"))
    add("--save_weight", metavar="NAME", help=f"write out_dir/NAME_HIDDEN.pth (default: {stage})")
    add("--from_resume", type=int, choices=(0, 1), default=0, help="1 = go on where an interrupted run was")
    add("--save_interval", type=int, default=0, help="steps between resume states (default: every two minutes)")
    add("--keep", type=int, default=1, help="resume states to keep")
    add("--val_interval", type=int, default=0, help="steps between validations (default: ten in a run)")
    add("--log_interval", type=int, default=10, help="steps between lines of the metrics log")
    add("--use_wandb", action="store_true", help="log to Weights & Biases too (WANDB_MODE=offline works)")
    add("--wandb_project", default="MiniMind")
    parser.set_defaults(**defaults)
    return parser


def run(function: Callable[[], None]) -> None:
    """Call a script's main: an expected error becomes one line, and processes are left cleanly."""
    try:
        function()
    except (DataError, checkpoint.CheckpointError) as error:
        code = _fail(str(error), 1)
    except UsageError as error:
        code = _fail(str(error), 2)
    except OSError as error:  # of the machine, not of the program: a full disk, no permission
        code = _fail(str(error), 1)
    except torch.OutOfMemoryError:
        remedy = "lower --batch_size (and raise --accumulation_steps) or --max_seq_len, or --activation_checkpointing 1"
        code = _fail(f"out of memory: {remedy}", 1)
    except KeyboardInterrupt:  # before the training began; from then on Interrupt takes it
        code = _fail("stopped before the training began", 130)
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        code = _fail("another process of this run has ended; its own message says why. --from_resume 1 goes on", 1)
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # leaving the group in order would wait for the others, which may be waiting for this one
    sys.exit(code)


def _is_lost(error: RuntimeError) -> bool:
    """Whether the connection to another process broke. Gloo raises plain RuntimeErrors."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


class UsageError(Exception):
    """Arguments that do not fit together; run() prints it and exits with 2."""


def _fail(text: str, code: int) -> int:
    if os.environ.get("RANK", "0") != "0":
        # Most faults are found by all processes: the launcher ends the others once the first has told of it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    print(f"error: {text}", file=sys.stderr)
    return code


def check(args: argparse.Namespace) -> None:
    """UsageError for a number that makes no sense."""
    lowest = dict.fromkeys(("batch_size", "accumulation_steps", "log_interval", "max_seq_len", "keep"), 1)
    lowest |= dict.fromkeys(("hidden_size", "num_hidden_layers", "steps"), 1)
    lowest |= dict.fromkeys(("num_workers", "val_tokens", "save_interval", "val_interval"), 0)
    lowest |= dict.fromkeys(("weight_decay", "warmup", "decay"), 0)
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise UsageError(f"--{name} {value}: must be at least {low}")
    for name in ("epochs", "minutes", "learning_rate", "grad_clip"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value}: must be above 0")
    for name in ("warmup", "decay"):
        if getattr(args, name) > 1:
            raise UsageError(f"--{name} {getattr(args, name)}: it is a share of the run, at most 1")


def identity(args: argparse.Namespace) -> dict:
    """The arguments that decide what comes out of a run."""
    machine = ("from_resume", "device", "num_workers", "log_interval", "use_wandb", "wandb_project", "out_dir", "keep")
    machine += ("activation_checkpointing", "fsdp", "local_rank")  # the same result in less memory
    return {k: v for k, v in vars(args).items() if k not in machine}


class Interrupt:
    """Ctrl-C and SIGTERM ask for an orderly end; a second one ends at once."""

    def __init__(self):
        self.asked, self.when = False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        # torchrun passes on to its processes a Ctrl-C that the terminal has already sent them: that is one, not two.
        if self.asked and time.monotonic() - self.when > 1:
            sys.exit(128 + number)
        if not self.asked:
            self.asked, self.when = True, time.monotonic()
