"""Experiment trackers that a run's log goes to as well, each a package of its own: --tracker NAME.

tracker = start_tracker("tensorboard", "--tracker tensorboard", "MiniMind", "pretrain_256", vars(args), "out", step=0)
tracker.log({"loss": 2.5}, 10); tracker.finish()

They keep what they get in the out_dir and want neither account nor network; Weights & Biases does after
WANDB_MODE=offline. SWANLAB_MODE=online and TRACKIO_SPACE_ID upload.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cli import UsageError


class Tracker(NamedTuple):
    log: Callable[[dict[str, Any], int], None]  # figures, step
    finish: Callable[[], None]


def start_tracker(name: str, flag: str, project: str, run: str, config: dict, out_dir: str, step: int) -> Tracker:
    """flag: how it was asked for. step: of the state that an interrupted run goes on from, else 0. UsageError if the
    package is missing or does not start."""
    try:
        return TRACKERS[name](project, run, config, Path(out_dir).absolute(), step)
    except ImportError as error:
        package = (error.name or name).partition(".")[0]
        raise UsageError(f"{flag}: the package is missing: pip install {package}") from None
    except Exception as error:  # no account, no network: each has classes of its own
        text = str(error).strip().split("\n")[0]
        remedy = "set WANDB_MODE=offline to log without an account" if name == "wandb" else "leave it out"
        raise UsageError(f"{flag}: {text}; {remedy}") from None


def _wandb(project: str, run: str, config: dict, out_dir: Path, step: int) -> Tracker:
    import wandb

    started = wandb.init(project=project, name=run, config=config, dir=str(out_dir))
    return Tracker(lambda row, step: started.log(row, step=step), started.finish)


def _swanlab(project: str, run: str, config: dict, out_dir: Path, step: int) -> Tracker:
    import swanlab

    mode = os.environ.get("SWANLAB_MODE", "offline")  # `swanlab sync FOLDER` uploads it later
    swanlab.init(project=project, name=run, config=config, log_dir=str(out_dir / "swanlab"), mode=mode)
    return Tracker(lambda row, step: swanlab.log(numbers(row), step=step), swanlab.finish)


def _trackio(project: str, run: str, config: dict, out_dir: Path, step: int) -> Tracker:
    os.environ.setdefault("TRACKIO_DIR", str(out_dir / "trackio"))  # it reads it while it is imported
    import trackio

    resume = "allow" if step else "never"
    started = trackio.init(project=project, name=run, config=config, embed=False, resume=resume)
    return Tracker(lambda row, step: started.log(numbers(row), step=step), started.finish)


def _tensorboard(project: str, run: str, config: dict, out_dir: Path, step: int) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(name="tensorboard") from None
    writer = SummaryWriter(str(out_dir / "tensorboard" / run), purge_step=step or None)
    writer.add_text("arguments", "\n\n".join(f"{key}: {value}" for key, value in config.items()), step)

    def log(row: dict, step: int) -> None:
        for key, value in numbers(row).items():
            writer.add_scalar(key, value, step)

    return Tracker(log, writer.close)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What a curve can be drawn of: a list as one value each, NAME/0, NAME/1, ...; nothing for None."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, list):
            flat |= numbers({f"{key}/{i}": part for i, part in enumerate(value)})
        elif isinstance(value, int | float):
            flat[key] = value
    return flat


TRACKERS = {"wandb": _wandb, "swanlab": _swanlab, "trackio": _trackio, "tensorboard": _tensorboard}
