"""One training run: its set-up, and the verbs that the loop of a train script is made of.

    run = Run("full_sft", args, minutes=5.75)                 # device, precision, processes, model, resume
    train_rows, val_rows = run.rows(sft_dataset, "sft")
    for micro_batches in run.steps(train_rows):               # until the budget is used up
        if run.validation_due:
            run.validate(sft_loss, val_rows)
        for batch in micro_batches:
            loss, metrics = sft_loss(run.model, batch)
            run.backward(loss, batch)                         # every token counts the same
        run.update(metrics)                                   # clip, optimizer, schedule; logs and saves when due
    run.validate(sft_loss, val_rows)
    run.finish()

Another kind of loop is made of the same verbs: draws(rows) gives the rows of each step as they are, accumulate(batches)
begins an update on batches that the script made itself, and as many updates as it likes may follow; log_validation()
takes any figures.
"""

import argparse
import contextlib
import copy
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cli import find_device
from dataset.lm_dataset import batches, bytes_per_token, cache_folders, row_count, summary, validation_batches
from dataset.mixing import Mixture
from model import checkpoint
from model.adapters import fingerprint
from model.checkpoint import CheckpointError
from model.device import training_dtype
from trainer import outputs, parallel
from trainer.advice import Outcome, advice
from trainer.answers import AnswerProbe
from trainer.arguments import ROOT, budget_of, check, data_paths, starting_model, zero_config_of
from trainer.caches import describe_compiled, use_cache_dir
from trainer.interrupt import Interrupt
from trainer.optimizer import LEARNING_RATES, build_optimizers, learning_rate_scale, set_learning_rate
from trainer.parallel import Parallel
from trainer.progress import Progress
from trainer.record import facts_of
from trainer.report import ModelSizes, Reporter
from trainer.resume import (
    STATE_VERSION,
    began_with,
    end_as_complete,
    find_earlier,
    identity,
    note_on,
    require_same_inputs,
)
from trainer.speed import compile_if_worth, install, matmul_peak

MAX_BAD_STEPS = 5  # non-finite steps in a row before a run gives up
SAVE_SECONDS = 120  # between resume states, unless --save_interval says otherwise,
SAVE_SHARE = 0.01  # or longer, so that they take no more of the time than this

LossFn = Callable[[nn.Module, dict], tuple[Tensor, dict[str, float | Tensor]]]
SaveFn = Callable[..., None]  # of path, model, meta and, by name, tokenizer


class Run:
    """`model` is the one that a loss calls: plain until steps() begins, then whatever shares it among the processes.

    minutes: the budget on the starter corpus when no flag gives one. learning_rate_factor: times the learning rate of
    a training from random weights. Ends the process where --from_resume 1 finds that the run is complete."""

    def __init__(self, stage: str, args: argparse.Namespace, *, minutes: float, learning_rate_factor: float = 1.0):
        check(args)
        self.method, self.stage, self.args = stage, args.save_weight or stage, args
        self.budget = budget_of(args, minutes)
        self.zero = zero_config_of(args)
        self.processes = self._find_processes()
        self.device = self.processes.device
        self.dtype = training_dtype(self.device, args.dtype)
        if self.device.type == "cuda" and self.dtype != torch.float32:
            torch.set_float32_matmul_precision("high")  # what autocast leaves in fp32 may be TF32
        torch.manual_seed(args.seed)
        self.cache_dir = use_cache_dir(args.cache_dir)
        self.model: nn.Module
        self.model, self.tokenizer, self.began_at = starting_model(args)
        # What the run is made of, by flag: a hash of the contents, None where there is nothing.
        self.inputs = {"from_weight": None if self.began_at is None else fingerprint(self.model)}
        self.inputs["tokenizer"] = self.tokenizer.chat_hash
        self.data: dict[str, dict | None] = {}  # for the record: path and figures of each file of rows
        before = checkpoint.load_meta(self.began_at) if self.began_at else {}
        # What the weights could read before, they still can.
        self.context = max(args.max_seq_len, self.began_at and checkpoint.context_of(before, self.tokenizer) or 0)
        if args.learning_rate is None:  # wide matrices want smaller steps (Yang et al. 2022, arXiv:2203.03466)
            args.learning_rate = (
                learning_rate_factor * LEARNING_RATES[args.optimizer] * 256 / self.model.config.hidden_size
            )
        self.config = self.model.config
        args.hidden_size, args.num_hidden_layers = self.config.hidden_size, self.config.num_hidden_layers
        args.use_moe = int(self.config.is_moe)
        outputs.claim(self.path(".pth"), f"--out_dir {args.out_dir}", self.processes)
        self.resume, self.finished = find_earlier(self.path(".pth"), args, self.config, self.processes)
        earlier = self.resume or self.finished or {}
        self.model = began_with(earlier, self.inputs, self.began_at, self.path(".pth")) or self.model
        self.model.to(self.device)
        install(self.model, self.dtype, self.device)
        self.model.activation_checkpointing = bool(args.activation_checkpointing)
        if self.processes.rank:  # the weights are equal by now, what is dropped out must not be
            torch.manual_seed(args.seed + self.processes.rank)
        in_chat = stage not in ("pretrain", "unlikelihood")
        self.probe = AnswerProbe(args.eval_tasks, self.tokenizer, in_chat) if args.eval_tasks else None
        self.progress, self.compiled = Progress(), None
        self.share = 0.0  # of the budget that is used up
        self.reporter = Reporter(self.stage, self.path(".pth"), self.processes, args.log_interval)
        self.parallel: Parallel | None = None  # once steps() has begun
        self._start: tuple[dict[str, Tensor], float] | None = None  # of average_with()

    # -------------------------------------------------------------------------------------------- verbs

    def rows(self, make: Callable, starter: str) -> tuple:
        """Training and validation rows by make(path, tokenizer, seq_len): of --data_path and --val_path (None without),
        or of the starter corpus' files of that name."""
        paths = data_paths(self.args, starter)
        options = dict(seq_len=self.args.max_seq_len, cache_dir=self.cache_dir, quiet=not self.processes.is_main)
        rows: list = []
        for path in paths:
            keep = set().union(*(cache_folders(part) for part in rows if part is not None))
            rows.append(make(path, self.tokenizer, **options, keep=keep) if path else None)
        for flag, path, part in zip(("data_path", "val_path"), paths, rows, strict=True):
            figures = None if part is None else summary(part)  # not `part and`: its length may have to be waited for
            self.inputs[flag] = figures and figures["sha256"]
            place = " ".join(source.name for source in path) if isinstance(path, list) else str(path)
            self.data[flag] = figures and {"path": place} | figures
        return tuple(rows)

    def steps(self, rows) -> Iterator[Iterator[dict]]:
        """The micro-batches of one step after the other, until the budget is used up, from where a killed run stood.
        Ctrl-C and SIGTERM end it after a step, with a resume state and exit status 130."""
        for draw in self.draws(rows):
            micro_batches = self.accumulate([draw() for _ in range(self.args.accumulation_steps)])
            if self._weight == 0:
                self.skip("no token in the batch is to be learnt from")
            else:
                yield micro_batches

    def draws(self, rows) -> Iterator[Callable]:
        """For a loop that makes its batches itself: one step after the other as steps() has them, each a function that
        gives the next --batch_size rows of this process, as often as it is called. All processes must call it equally
        often."""
        stream = self._begin(rows)

        def draw():
            self.progress.samples += self.args.batch_size * self.processes.count
            return next(stream)

        while self.share < 1:
            yield draw
            self._save_if_due()
            if self._stop:
                self._end_early()

    def accumulate(self, micro_batches: list[dict]) -> Iterator[dict]:
        """Begin an update on these batches: each of them on the device, while its loss is computed and given to
        backward(). A batch has `weight`, the number of items whose mean its loss is, and `tokens`, those it trains."""
        self._weight = self.processes.total(sum(batch["weight"] for batch in micro_batches))
        self._tokens = int(self.processes.total(sum(batch["tokens"] for batch in micro_batches)))
        self._loss = torch.zeros((), device=self.device)
        self.progress.positions += sum(batch["input_ids"].numel() for batch in micro_batches) * self.processes.count
        return self._in_autocast(micro_batches)

    def _in_autocast(self, micro_batches: list[dict]) -> Iterator[dict]:
        """Each batch in turn: what the caller computes until it asks for the next one is under autocast, and after the
        last one the processes exchange gradients."""
        for i, batch in enumerate(micro_batches):
            self._last = i == len(micro_batches) - 1
            # One autocast for each batch: it keeps the weights that it has rounded, and update() changes them.
            with self.parallel.accumulating(self._last), self.autocast():
                yield self.to_device(batch)

    def backward(self, loss: Tensor, batch: dict) -> None:
        """Add the gradient of the batch's mean loss, so that each item counts the same in whichever batch or process
        it is."""
        loss = loss * (batch["weight"] / self._weight)
        with torch.autocast(self.device.type, enabled=False):
            self.parallel.backward(loss, self._last)
        self._loss += loss.detach()

    def update(self, metrics: dict[str, float | Tensor]) -> None:
        """Clip, step, schedule; a step whose loss or gradient is not finite changes nothing. metrics: for the log."""
        args, progress = self.args, self.progress
        scale = learning_rate_scale(self.share, args.warmup, 0.0, args.decay)
        learning_rate = set_learning_rate(self.parallel.optimizers, scale)
        loss = self.processes.total(self._loss)
        norm = self.parallel.step(loss)
        progress.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            progress.tokens += self._tokens
            self._bad_steps = 0
        else:
            progress.skipped += 1
            self._bad_steps += 1
            self.reporter.say(f"step {progress.step}: loss {loss}, gradient norm {norm}; step skipped")
        if self._bad_steps >= MAX_BAD_STEPS and self.parallel.gives_up():
            raise CheckpointError(
                f"{self._bad_steps} steps in a row were not finite: lower --learning_rate (now {args.learning_rate}) "
                f"or look at the data; the weights in {args.out_dir} are as they were"
            )
        share = self.share
        self._tick()
        self.reporter.step(progress, share, loss, norm, learning_rate, metrics)

    @property
    def validation_due(self) -> bool:
        if interval := self.args.val_interval:
            return self.progress.step // interval > self.progress.validated_step // interval
        return self.share + 1e-9 >= self.progress.next_validation

    def validate(self, loss_fn: LossFn, rows) -> None:
        """Log what evaluate() finds, and how the questions of --eval_tasks go; without either, nothing."""
        figures = {} if rows is None else self.evaluate(loss_fn, rows)
        if self.probe:
            figures |= self.probe.ask(self._measured_model(), self.dtype, self.reporter)
        self.log_validation(figures)

    def log_validation(self, figures: dict[str, float]) -> None:
        """Log figures named val_..., and count this validation as done."""
        self.progress.validated_step = self.progress.step
        self.progress.next_validation = 0.1 * (math.floor(self.share * 10 + 1e-6) + 1)
        if figures:
            self.reporter.validation(self.progress, figures)

    def finish(self, save: SaveFn = checkpoint.save) -> None:
        """Write the weights, by save(path, model, meta, tokenizer=...), and the curve; remove the resume states."""
        model = self.whole_model()
        if not self.processes.is_main:
            return
        weights = self.path(".pth")
        meta = {"stage": self.stage, **self.reporter.figures(self.progress), "arguments": identity(self.args)}
        meta |= {"method": self.method, "inputs": self.inputs, "context": self.context}
        if isinstance(self._data, Mixture):
            meta["sources"] = self._data.record()
            self.reporter.say(f"sources of --data_path:\n{self._data.describe(self.progress.samples)}")
        with self._remedy():
            outputs.keep_others(weights, meta["arguments"])
            save(weights, model, meta, tokenizer=self.tokenizer)
        self.reporter.finish(self.progress, self._advice())
        checkpoint.remove_resume(self.path("_resume"))
        outputs.release(weights)

    def _advice(self) -> list[str]:
        args, progress = self.args, self.progress
        name, flags = self.stage, ""
        if getattr(args, "lora_name", None):
            name = str(self.path(".pth")) if args.save_weight else args.lora_name
            flags += "" if args.from_weight == "full_sft" else f" --weight {shlex.quote(args.from_weight)}"
        elif "/" in name:
            name = str(self.path(".pth"))
        flags += " --use_moe 1" * (self.method == "pretrain" and self.config.is_moe)
        flags += "" if args.out_dir == str(ROOT / "out") else f" --out_dir {shlex.quote(args.out_dir)}"
        batch = args.batch_size * args.accumulation_steps * self.processes.count
        losses = (progress.first_losses, progress.last_losses)
        own_data, validated = args.data_path is not None, bool(self.reporter.val)
        limits = [f"--{limit} {vars(args)[limit]}" for limit in ("steps", "minutes") if vars(args)[limit]]
        outcome = Outcome(progress.step, self._rows, batch, *losses, own_data, validated, " and ".join(limits))
        return advice(self.method, shlex.quote(name), flags, outcome)

    # -------------------------------------------------------------------------------------------- set-up

    def path(self, suffix: str) -> Path:
        """out/<stage>_<hidden>[_moe]<suffix>"""
        weights = checkpoint.checkpoint_path(self.args.out_dir, self.stage, self.config)
        return weights.with_name(weights.stem + suffix)

    def _find_processes(self) -> parallel.Processes:
        args = self.args
        flag = "--fsdp" if args.fsdp else f"--deepspeed {args.deepspeed}" if args.deepspeed else None
        processes = parallel.find_processes(find_device(args.device), flag)
        if processes.count > 1 or flag:
            parallel.join(processes)
        return processes

    def _begin(self, rows) -> Iterator[dict]:
        """Share the model out, resume, compile; the stream of batches."""
        args, processes = self.args, self.processes
        self._rows, self._data = row_count(rows, exact=self.budget.epochs is not None), rows
        processes.require_same(f"rows of --data_path {args.data_path}", self._rows)
        require_same_inputs(self.resume or self.finished or {}, self.inputs, args, self.path(".pth"), processes)
        if self.finished:
            end_as_complete(self.path(".pth"), processes)
        if self.resume is None:
            self._distribute()
            copy = outputs.keep_earlier(self.path(".pth")) if processes.is_main else None
            if copy:
                flag = f"--from_weight {shlex.quote(str(self.path('.pth')))}"
                goes_on = self.began_at and self.began_at.samefile(self.path(".pth"))
                further = "" if goes_on else f"; {flag} trains it further"
                self.reporter.say(
                    f"note: {self.path('.pth')} is there: kept as {copy.name} when the new one is written{further}"
                )
        else:
            self.load_state_dict(self.resume)
            self.resume = None  # frees half a gigabyte
        model, peak = self.parallel.model, matmul_peak(self.device, self.dtype)
        expected, _ = processes.agree(self._expected_seconds(peak))
        wish = args.compile if self.compiled is None else str(int(self.compiled))
        self.compiled = compile_if_worth(model, wish, self.device, expected, self.reporter.say)
        if self.compiled:
            self.reporter.say(describe_compiled())
        self.reporter.start_tracker(args, self.progress.step)
        self.reporter.start(self.progress, self._sizes, self.device, self.dtype, self.compiled, peak)
        self.reporter.begin_record(self.progress, facts_of(self))
        self._interrupt, self._stop, self._bad_steps = Interrupt(), False, 0
        self._clock = time.perf_counter() - self.progress.seconds
        self._last_save, self._pause = self.progress.seconds, SAVE_SECONDS
        self._saved_step = self._last_save_step = self.progress.step
        self.share = self.progress.share(self.budget, self._rows)
        if isinstance(rows, Mixture):
            self.reporter.say(f"sources of --data_path:\n{rows.describe(self._planned_rows())}")
        return batches(
            rows, args.batch_size, seed=args.seed, start_sample=self.progress.samples, rank=processes.rank,
            world_size=processes.count, num_workers=args.num_workers,
        )  # fmt: skip

    def _distribute(self) -> None:
        """From here on `model` is what the processes share."""
        args = self.args
        install(self.model, self.dtype, self.device)  # again: an adapter may have come since
        self._sizes = ModelSizes.of(self.model)  # of the whole, however it is shared out
        tokens = args.batch_size * args.accumulation_steps * args.max_seq_len * self.processes.count
        make = partial(
            build_optimizers, name=args.optimizer, learning_rate=args.learning_rate, weight_decay=args.weight_decay,
            dtype=self.dtype, tokens=tokens,
        )  # fmt: skip
        if self.zero:
            from trainer.zero import ZeroParallel

            self.parallel = ZeroParallel(self.model, self.processes, make, self.dtype, self.zero, args.deepspeed)
        else:
            self.parallel = Parallel(self.model, self.processes, make, self.dtype, args.grad_clip, args.fsdp)
        self.model = self.parallel.module

    def _expected_seconds(self, peak: float) -> float:
        """How long the run will take at a guess, only to decide about compiling."""
        args, budget = self.args, self.budget
        expected = (budget.minutes or math.inf) * 60
        rows = self._planned_rows()
        if rows is not None:
            flops_per_second = 0.25 * peak * self.processes.count
            expected = min(expected, 6 * self._sizes.active * rows * args.max_seq_len / flops_per_second)
        return expected

    def _planned_rows(self) -> float | None:
        """Of the whole run; None if the clock decides."""
        args, budget = self.args, self.budget
        if budget.steps:
            return budget.steps * args.batch_size * args.accumulation_steps * self.processes.count
        return budget.epochs and budget.epochs * self._rows

    # -------------------------------------------------------------------------------------------- while it runs

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def to_device(self, batch: dict) -> dict:
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def whole_model(self) -> nn.Module:
        """The plain model with all its weights as they are now, to generate with, or the mean of average_with(). All
        processes must call it."""
        model = self.parallel.whole_model() if self.parallel else self.model
        if self._start is not None:
            model, (start, share) = copy.deepcopy(model), self._start
            with torch.no_grad():
                weights = model.state_dict()
                for name, before in start.items():
                    weights[name].lerp_(before.to(weights[name]), share)
        return model

    def _measured_model(self) -> nn.Module:
        """What is validated: what is trained, and once a mean is to be written, the mean."""
        if self._start is not None:
            return self.whole_model().to(self.device)
        return self.parallel.model if self.parallel else self.model

    def average_with(self, start: dict[str, Tensor], share: float) -> None:
        """From here on whole_model() gives, and finish() writes, share * start + (1 - share) * the weights, of those
        that start has: on the line between the weights of before and after a training most of what either can do is
        kept (Wortsman et al. 2022, arXiv:2109.01903)."""
        self._start = (start, share) if share else None

    def _tick(self) -> None:
        """What the clock and the signals say after a step, the same on all processes."""
        elapsed = time.perf_counter() - self._clock
        self.progress.seconds, self._stop = self.processes.agree(elapsed, self._interrupt.asked)
        self.share = self.progress.share(self.budget, self._rows)

    def skip(self, reason: str) -> None:
        """A step in which nothing is learnt."""
        self.progress.step += 1
        self.progress.skipped += 1
        self._tick()
        self.reporter.say(f"step {self.progress.step}: {reason}; skipped")

    @torch.no_grad()
    def evaluate(self, loss_fn: LossFn, rows) -> dict[str, float]:
        """val_loss, val_bpb (bits per byte, if the loss is a mean over tokens) and val_<name> of each scalar metric,
        over the first rows, up to --val_tokens in all. Bits per byte are those of the metric `cross_entropy` if there
        is one, else of the loss."""
        args, model = self.args, self._measured_model()
        if args.val_tokens:
            rows = rows.select(range(min(len(rows), max(1, args.val_tokens // args.max_seq_len))))
        bytes_of = bytes_per_token(self.tokenizer).to(self.device)
        sums: dict[str, float] = {}
        weight, tokens, n_bytes = 0, 0, 0
        model.eval()
        # A graph without gradients would take longer to compile than it saves.
        with torch.compiler.set_stance("force_eager"):
            for batch in map(self.to_device, validation_batches(rows, args.batch_size)):
                with self.autocast():
                    loss, metrics = loss_fn(model, batch)
                # How well a MoE balances its experts is no part of how well it knows the text.
                scalars = {name: v for name, v in metrics.items() if torch.as_tensor(v).ndim == 0}
                scalars["loss"] = loss - scalars.pop("aux_loss", 0.0)
                for name, value in scalars.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * batch["weight"]
                weight, tokens = weight + batch["weight"], tokens + batch["tokens"]
                labels = batch["labels"]
                n_bytes += bytes_of[labels[labels >= 0]].sum().item()
        model.train()
        means = {f"val_{name}": value / max(weight, 1) for name, value in sums.items()}
        loss_is_per_token = weight == tokens
        if loss_is_per_token:
            means["val_bpb"] = sums.get("cross_entropy", sums["loss"]) / math.log(2) / max(n_bytes, 1)
        return means

    # -------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict:
        """All that a bit-exact continuation needs, plain values and tensors. All processes must call it."""
        return self.parallel.state_dict() | {
            "version": STATE_VERSION,
            "config": self.config.to_dict(),
            "compiled": self.compiled,
            "rng": self.processes.random_states(),
            "progress": vars(self.progress).copy(),
            "arguments": vars(self.args).copy(),
            "identity": identity(self.args),
            "inputs": self.inputs.copy(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Share the model out and go on from there; say what cannot be the same any more."""
        was = state["identity"]
        note = note_on(was, self.args)
        if note:
            self.reporter.say(note)
        self.model.load_state_dict(state["model"])
        self._distribute()
        self.parallel.load_state_dict(state)
        self.progress = Progress(**state["progress"])
        if was.get("compile", self.args.compile) == self.args.compile:  # "auto" is decided once
            self.compiled = state["compiled"]
        self.processes.restore_random_states(state["rng"])  # last: sharing out draws random numbers

    def _save_resume(self) -> None:
        state = self.state_dict()
        if self.processes.is_main:
            checkpoint.save_resume(self.path("_resume"), state, self.progress.step, self.args.keep)

    def _save_if_due(self) -> None:
        progress, interval = self.progress, self.args.save_interval
        if interval:  # several updates may lie between two looks
            due = progress.step // interval > self._last_save_step // interval
        else:
            due = progress.seconds - self._last_save > self._pause
        if not due:
            return
        self._last_save, self._last_save_step, start = progress.seconds, progress.step, time.perf_counter()
        try:
            self._save_resume()
            self._saved_step = progress.step
        except CheckpointError as error:
            self.reporter.say(f"warning: {error}")
        seconds, _ = self.processes.agree(time.perf_counter() - start)
        self._pause = max(SAVE_SECONDS, seconds / SAVE_SHARE)

    def _end_early(self) -> None:
        with self._remedy():
            self._save_resume()
        # Of weights that a stage's name stands for, others may be the newest by then.
        by_name = self.began_at and self.began_at.stem.startswith(f"{self.args.from_weight}_")
        size = ["--hidden_size", str(self.args.hidden_size)] if by_name and "--hidden_size" not in sys.argv else []
        self.reporter.interrupted(self.progress, size)
        sys.exit(130)

    @contextlib.contextmanager
    def _remedy(self) -> Iterator[None]:
        """Saying what is left if the disk is full at the end."""
        try:
            yield
        except CheckpointError as error:
            step = self._saved_step
            remedy = f"; --from_resume 1 goes on from the state of step {step}" if step else ""
            raise CheckpointError(f"{error}{remedy}") from None
