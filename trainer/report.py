"""What a run tells: progress on the terminal, the JSONL metrics log, a tracker, the loss curve as a picture."""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from model.files import write_bytes
from model.model import MiniMindLM
from trainer.outputs import copies
from trainer.parallel import Processes
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.trackers import Tracker, start_tracker

LINE_SECONDS = 10  # between progress lines where standard error is a file


class ModelSizes(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int  # those that work on one token
    trained: int
    head: int  # of the output layer

    @classmethod
    def of(cls, model: MiniMindLM) -> "ModelSizes":
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        head = model.config.vocab_size * model.config.hidden_size
        return cls(model.num_parameters(), model.num_parameters(active=True), trained, head)


class Reporter:
    """Speaks on the main process only. In the log, the loss is the mean since the line before; the learning rate, the
    gradient's norm and the metrics are those of the last step, the metrics of its last batch."""

    def __init__(self, name: str, weights: Path, processes: Processes, log_interval: int):
        self.name, self.weights, self.processes, self.log_interval = name, weights, processes, log_interval
        self.on = processes.is_main
        self.log_path, self.picture = weights.with_suffix(".jsonl"), weights.with_suffix(".png")
        self.tty = sys.stderr.isatty()
        self.last_line = 0.0
        self.rate = self.mfu = 0.0
        self.val: dict[str, float] = {}
        self.tracker: Tracker | None = None
        self.log_failed = False

    def say(self, text: str) -> None:
        if self.on:
            print(f"\r\033[K{text}" if self.tty else text, file=sys.stderr, flush=True)

    def start(
        self,
        progress: Progress,
        sizes: ModelSizes,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool,
        peak: float,
    ) -> None:
        """`peak`: FLOP/s of one device."""
        self.mark, self.sizes = (progress.seconds, progress.positions, progress.tokens), sizes
        if not self.on:
            return
        # A frozen weight hands the gradient on (2 FLOPs, after 2 in the forward) but has none of its own (2 more).
        per_weight = 4 + 2 * sizes.trained / sizes.total
        # Per position and per label: the output layer works only where there is something to learn.
        self.head_flops = per_weight * sizes.head
        self.body_flops = per_weight * sizes.active - self.head_flops
        self.peak = peak * self.processes.count
        cut_log(self.log_path, progress.step)
        of_which = f" ({sizes.active / 1e6:.2f} M active)" if sizes.active != sizes.total else ""
        how = "compiled" if compiled else "not compiled"
        self.say(
            f"{self.name}: {sizes.total / 1e6:.2f} M parameters{of_which}, {device.type} "
            f"{str(dtype).removeprefix('torch.')}, {how}, peak {peak / 1e9:,.0f} GFLOP/s"
        )

    def start_tracker(self, args: argparse.Namespace, step: int) -> None:
        """The one that the flags name, if they do. step: of the state that the run goes on from."""
        name = args.tracker or ("wandb" if args.use_wandb else None)
        if self.on and name:
            flag = f"--tracker {name}" if args.tracker else "--use_wandb"
            run = self.weights.stem
            self.tracker = start_tracker(name, flag, args.wandb_project, run, vars(args), args.out_dir, step)

    def begin_record(self, progress: Progress, facts: dict) -> None:
        """facts: as RunRecord takes them."""
        if self.on:
            self.record = RunRecord(self.weights.with_suffix(".run.json"), facts)
            if progress.step:
                self.record.goes_on()
            self._write_record(progress, "running")

    def _write_record(self, progress: Progress, state: str) -> None:
        losses = progress.last_losses
        figures = self.figures(progress) | {"loss": sum(losses) / len(losses) if losses else None}
        fault = self.record.write(state, figures)
        if fault:
            self.say(f"warning: {fault}")

    def step(self, progress: Progress, share, loss, grad_norm, learning_rate, metrics) -> None:
        """After an update. share: of the budget, before it."""
        if not self.on:
            return
        if math.isfinite(loss):
            progress.note_loss(loss)
        interval = progress.step % self.log_interval == 0
        if interval:
            self._measure(progress)
            row = {
                "step": progress.step, "loss": sum(progress.window) / len(progress.window) if progress.window else None,
                "learning_rate": learning_rate, "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "tokens": progress.tokens, "seconds": round(progress.seconds, 2),
                "tokens_per_second": round(self.rate, 1), "mfu": round(self.mfu, 4),
            }  # fmt: skip
            row |= {k: v.tolist() if hasattr(v, "tolist") else v for k, v in metrics.items()}
            self._log(row)
            progress.window = []
        now = time.perf_counter()
        if (self.tty and interval) or now - self.last_line > LINE_SECONDS:
            self.last_line = now
            self._progress_line(progress, share, loss)

    def _measure(self, progress: Progress) -> None:
        """Speed since the last time."""
        now = (progress.seconds, progress.positions, progress.tokens)
        seconds, positions, tokens = (after - before for after, before in zip(now, self.mark, strict=True))
        self.mark = now
        self.rate = positions / max(seconds, 1e-9)
        flops = positions * self.body_flops + tokens * self.head_flops
        self.mfu = flops / max(seconds, 1e-9) / self.peak

    def _progress_line(self, progress: Progress, share: float, loss: float) -> None:
        speed = f"{self.rate:,.0f} tokens/s  MFU {self.mfu:.2f}  " if self.rate else ""
        left = ""
        if share > 0:
            eta = progress.seconds / share * (1 - share)
            left = f"{int(eta // 60)}:{int(eta % 60):02d} left"
        done = int(share * 20)
        val = f"  val {self._val_figure('bits/byte')}" if self.val else ""
        line = (
            f"[{'#' * done}{'.' * (20 - done)}] {share:4.0%}  step {progress.step}  loss {loss:.3f}{val}  {speed}{left}"
        )
        print(f"\r\033[K{line}" if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def _val_figure(self, unit: str) -> str:
        if "val_bpb" in self.val:
            return f"{self.val['val_bpb']:.3f} {unit}"
        if "val_accuracy" in self.val:
            return f"accuracy {self.val['val_accuracy']:.1%}"
        name, value = next(iter(self.val.items()))
        return f"{name.removeprefix('val_')} {value:.3f}"

    def validation(self, progress: Progress, figures: dict[str, float]) -> None:
        self.val = figures
        self._log({"step": progress.step, "seconds": round(progress.seconds, 2), "tokens": progress.tokens} | self.val)

    def _log(self, row: dict) -> None:
        if not self.on:
            return
        try:
            with open(self.log_path, "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
        except OSError as error:  # not worth losing the run for
            if not self.log_failed:
                self.say(f"warning: cannot write {self.log_path}: {error.strerror}; the training goes on")
            self.log_failed = True
        if self.tracker:
            try:
                self.tracker.log({k: v for k, v in row.items() if k != "step"}, row["step"])
            except Exception as error:  # whatever it is, it is no fault of the training
                self.say(f"warning: the tracker has failed ({error}); the training goes on without it")
                self.tracker = None

    def interrupted(self, progress: Progress, more: list[str]) -> None:
        """more: arguments that the command has to have besides."""
        if not self.on:
            return
        self._write_record(progress, "interrupted")
        given = list(zip(["", *sys.argv], sys.argv, strict=False))  # each argument with the one before it
        argv = [text for before, text in given if "--from_resume" not in (before, text.partition("=")[0])]
        argv += [*more, "--from_resume", "1"]
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # torchrun's word for its nodes
        launcher, where = "python", ""
        if "RANK" in os.environ:
            launcher = f"torchrun --nproc_per_node {self.processes.count // machines}"
        if machines > 1:
            launcher += f" --nnodes {machines} --node_rank {os.environ['GROUP_RANK']}"
            launcher += f" --master_addr {os.environ['MASTER_ADDR']} --master_port {os.environ['MASTER_PORT']}"
            where = " on each machine, with its own --node_rank"
        flags = (subprocess.list2cmdline if os.name == "nt" else shlex.join)(argv)
        self.say(f"stopped at step {progress.step}, nothing is lost. Go on{where} with:\n  {launcher} {flags}")

    def figures(self, progress: Progress) -> dict:
        """What is worth knowing about the weights."""
        figures = {"steps": progress.step, "tokens": progress.tokens} | self.val
        return figures | {"seconds": round(progress.seconds, 1), "skipped": progress.skipped}

    def finish(self, progress: Progress, advice: list[str]) -> None:
        """The picture and the last lines, after the weights are safe."""
        if self.tty:
            print(file=sys.stderr)
        self._write_record(progress, "finished")
        skipped = f", {progress.skipped} steps skipped" if progress.skipped else ""
        val = ""
        if self.val:
            loss = f" (loss {self.val['val_loss']:.3f})" if "val_loss" in self.val else ""
            val = f", val {self._val_figure('bits per byte')}{loss}"
        try:
            picture = f", {self.picture.name}" if draw_curve(self.log_path, self.picture) else ""
        except OSError as error:  # not worth calling the run failed
            picture = f"; warning: cannot draw {self.picture}: {error.strerror}"
        earlier = [f"; the ones before are kept: {copy.name}" for copy in copies(self.weights)[:1]]
        lines = [
            f"{self.name}: {progress.step} steps, {progress.tokens:,} tokens in {progress.seconds / 60:.1f} min{val}"
            f"{skipped}",
            f"wrote {self.weights}, {self.log_path.name}{picture}{''.join(earlier)}",
        ]
        self.say("\n".join(lines + advice))
        if self.tracker:
            self.tracker.finish()


def read_log(path: Path) -> Iterator[dict]:
    """The rows of a metrics log, without those that a killed process or a full disk left in part."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def cut_log(path: Path, step: int) -> None:
    """Keep the rows up to this step: those after the state that is resumed will be written again. 0 starts anew."""
    rows = read_log(path) if step and path.exists() else []
    # A validation at this very step is not in the state yet: it comes after the saving.
    kept = [row for row in rows if row["step"] < step or (row["step"] == step and "loss" in row)]
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def draw_curve(log_path: Path, picture: Path) -> bool:
    """Training loss and validation figure (bits per byte, else accuracy) over tokens, as a PNG. False without
    matplotlib."""
    plt = pyplot()
    if plt is None:
        return False
    rows = list(read_log(log_path))
    train = [(r["tokens"], r["loss"]) for r in rows if r.get("loss") is not None]
    measured = {name for r in rows for name in r}
    figure, left = plt.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        left.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1)
    left.set_xlabel("tokens trained on")
    left.set_ylabel("training loss", color="tab:blue")
    for name, label in (("val_bpb", "bits per byte"), ("val_accuracy", "accuracy")):
        if name in measured:
            val = [(r["tokens"], r[name]) for r in rows if name in r]
            right = left.twinx()
            right.plot(*zip(*val, strict=True), color="tab:orange", marker="o", markersize=3)
            right.set_ylabel(f"validation {label}", color="tab:orange")
            _from_zero(right)
            end = f"{val[-1][1]:.3f}"
            right.annotate(end, val[-1], textcoords="offset points", xytext=(-10, 8), color="tab:orange")
            asked = [(r["tokens"], r["val_answer_bpb"]) for r in rows if "val_answer_bpb" in r]
            if asked and name == "val_bpb":
                right.plot(*zip(*asked, strict=True), color="tab:green", marker="s", markersize=3)
                right.annotate(f"answers {asked[-1][1]:.3f}", asked[-1], textcoords="offset points", xytext=(-60, 8),
                    color="tab:green")  # fmt: skip
            break
    _from_zero(left)
    left.set_title(log_path.stem)
    left.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
    return True


def compare_curves(log_paths: list[Path], name: str, label: str, picture: Path) -> bool:
    """One figure of several runs over tokens, as a PNG. False without matplotlib."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for path in log_paths:
        points = [(row["tokens"], row[name]) for row in read_log(path) if name in row]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=path.stem)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel(label)
    _from_zero(axes)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
    return True


def _from_zero(axes) -> None:
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # a flat curve would lie on the frame


def pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
