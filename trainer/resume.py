"""When two command lines are the same run: what may differ, what may not, and what to say.

identity(args)                                      # what a state and finished weights record
state, finished = find_earlier(weights, args, config, processes)
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from cli import UsageError
from model import checkpoint
from model.adapters import fingerprint
from model.model import MiniMindConfig, MiniMindLM
from trainer.outputs import copies, release
from trainer.parallel import Processes

STATE_VERSION = 4  # of what Run.state_dict() gives

# Where and how a run computes and what it tells: the result is the same.
MACHINE = ("from_resume", "device", "num_workers", "log_interval", "use_wandb", "wandb_project", "out_dir", "keep")
MACHINE += ("tracker", "activation_checkpointing", "fsdp", "local_rank", "cache_dir")
# Recorded, and free to differ: how often it saves and measures; the paths, whose contents count (Run.inputs); the
# preset, for which the sizes stand, and what the name of the weights says.
FREE = ("save_interval", "val_interval", "val_tokens", "eval_tasks", "save_weight", "preset", "use_moe")
FREE += ("data_path", "val_path", "from_weight", "teacher", "tokenizer")
ROUNDING = ("batch_size", "accumulation_steps", "compile")  # free too, but the result is another one


def identity(args: argparse.Namespace) -> dict:
    """The arguments that decide what comes out of a run."""
    return {name: value for name, value in vars(args).items() if name not in MACHINE}


def find_earlier(
    weights: Path, args: argparse.Namespace, config: MiniMindConfig, processes: Processes
) -> tuple[dict | None, dict | None]:
    """(the newest state to go on from, the meta of `weights` if they are what the run would end with); None for what
    there is not. UsageError if these files belong to another run, or to one that was interrupted and is not asked for.
    """
    folder = weights.with_name(weights.stem + "_resume")
    anew = f"start anew with another --save_weight (or remove {folder})"
    if not args.from_resume:
        step = checkpoint.resume_step(folder)
        processes.require_same(f"state in {folder}", step)
        if step is not None:
            raise UsageError(f"an interrupted run is at step {step} in {folder}: --from_resume 1 goes on, or {anew}")
        return None, None
    state = checkpoint.load_resume(folder)
    if state is not None and state.get("version") != STATE_VERSION:
        raise UsageError(
            f"--from_resume 1: the state in {folder} is of another version of these scripts: go on with that "
            f"version, or {anew}"
        )
    meta = checkpoint.load_meta(weights) if state is None and weights.exists() else {}
    finished = bool(checkpoint.run_arguments(meta))
    found = f"step {state['progress']['step']}" if state else "finished" if finished else "none"
    processes.require_same(f"--from_resume 1: state in {folder}", found)
    if state:
        _require_same(state, args, config, anew)
    elif finished:
        names = _differing(checkpoint.run_arguments(meta), args)
        if names:
            raise UsageError(
                f"--from_resume 1: {weights} is complete, with {_flags(checkpoint.run_arguments(meta), names)}: to "
                f"train it further, --from_weight {weights} without --from_resume; for another one, another "
                "--save_weight or --out_dir"
            )
        return None, meta
    elif processes.is_main:
        print(f"--from_resume 1: no state in {folder}, the run starts anew", file=sys.stderr)
    return state, None


def _differing(was: dict, args: argparse.Namespace) -> list[str]:
    """The arguments that were others, and may not be. What either side does not know is not compared."""
    now = {name: value for name, value in vars(args).items() if name not in MACHINE + FREE + ROUNDING}
    unknown = [name for name in ("hidden_size", "num_hidden_layers") if was.get(name) is None]  # by older versions
    return [name for name, value in now.items() if was.get(name, value) != value and name not in unknown]


def _flags(was: dict, names: list[str]) -> str:
    return ", ".join(f"no --{name}" if was[name] is None else f"--{name} {was[name]}" for name in names)


def _require_same(state: dict, args: argparse.Namespace, config: MiniMindConfig, anew: str) -> None:
    was = state["identity"]
    names = _differing(was, args)
    if names:
        packed = " (its place in the data counts rows, which are packed to that length)" * ("max_seq_len" in names)
        raise UsageError(
            f"--from_resume 1: the interrupted run had {_flags(was, names)}{packed}; give the same, or {anew}"
        )
    if state["config"] != config.to_dict():
        raise UsageError(f"--from_resume 1: the interrupted run had a model of another shape; give the same, or {anew}")


def began_with(earlier: dict, inputs: dict, began_at: Path | None, weights: Path) -> MiniMindLM | None:
    """A run that trains its own earlier weights further has replaced them at its end: the model that it began with,
    from the copy of them; None if nothing was replaced. earlier: its state or meta; inputs becomes what it was."""
    wanted = earlier.get("inputs", {}).get("from_weight")
    if wanted in (None, inputs["from_weight"]) or began_at is None:
        return None
    if not weights.exists() or not began_at.samefile(weights):
        return None
    for copy in copies(weights):
        model, _ = checkpoint.load(copy)
        if fingerprint(model) == wanted:
            inputs["from_weight"] = wanted
            return model.train()
    if "progress" not in earlier:  # the run is complete, and needs it no more
        inputs["from_weight"] = wanted
    return None


def require_same_inputs(
    earlier: dict, inputs: dict, args: argparse.Namespace, weights: Path, processes: Processes
) -> None:
    """UsageError if a file has another content than it had for the run that goes on or is complete, or another one for
    another process. earlier: a state or a meta, with the Run.inputs of then."""
    what = "the interrupted run" if "progress" in earlier else str(weights)
    for name, content in inputs.items():
        processes.require_same(f"contents of --{name}", content)
        was = earlier.get("inputs", {}).get(name, content)
        if was == content:
            continue
        given = getattr(args, name, None) or ("(the starter corpus)" if name in ("data_path", "val_path") else "")
        fault = f"its contents are not those that {what} was trained with (the name does not matter)"
        remedy = "give that one again"
        if was is None:
            fault, remedy = f"{what} had none", "leave it out"
        elif content is None:
            given, fault = "is not given", f"{what} had one"
        raise UsageError(f"--{name} {given}: {fault}: {remedy}, or start anew with another --save_weight")


def end_as_complete(weights: Path, processes: Processes) -> NoReturn:
    if processes.is_main:
        checkpoint.remove_resume(weights.with_name(weights.stem + "_resume"))  # empty: a kill came as it tidied up
        release(weights)
        print(
            f"{weights} is complete: --from_weight {weights} trains it further; without --from_resume it is trained "
            "anew, and this one kept as a copy"
        )
    sys.exit(0)


def note_on(was: dict, args: argparse.Namespace) -> str | None:
    """What is no longer exact if an interrupted run goes on with other arguments; None if all is."""
    names = [name for name in ROUNDING if was.get(name, getattr(args, name)) != getattr(args, name)]
    if not names:
        return None
    before, after = (of["batch_size"] * of["accumulation_steps"] for of in (was, vars(args)))
    how = "by rounding, and by what dropout draws"
    if before != after:
        how = f"for a step is {after} rows now, {before} before"
        if before % args.batch_size == 0:
            how += f" (--accumulation_steps {before // args.batch_size} keeps that)"
    return (
        f"note: the run had {_flags(was, names)}: no row is lost or repeated, but the weights will differ from those "
        f"of an uninterrupted run, {how}"
    )
