"""The verbs of a run in process: weighting, faulty steps, validation, resume, log and picture."""

import json
import math
import os
import signal
import struct
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cli import UsageError
from dataset.chat import load_tokenizer
from dataset.lm_dataset import pretrain_dataset, validation_batches
from model import checkpoint
from trainer import run as run_module
from trainer import speed
from trainer.arguments import arguments
from trainer.interrupt import Interrupt
from trainer.progress import Budget, Progress
from trainer.report import cut_log, draw_curve, read_log
from trainer.run import Run
from trainer.speed import cross_entropy

SEQ = 32
DOCUMENTS = [
    "The cat sat on the mat and looked at the rain. ",
    "小猫坐在窗边看雨。今天天气不好，它不想出门。",
    "One, two, three: the children counted the birds on the wire and laughed. 😀",
    "She read the letter twice, then folded it and put it back into the drawer.",
    "四个苹果加三个苹果等于七个苹果。",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread (sums in one order), a small matrix for the peak, and pytest's own Ctrl-C afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(run_module, "matmul_peak", partial(speed.matmul_peak, size=64, repeat=1))
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def text(tmp_path_factory, tokenizer):
    """A packed pretraining file of 40 documents."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": DOCUMENTS[i % 5] + f" {i}"}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return pretrain_dataset(folder / "text.jsonl", tokenizer, SEQ, cache_dir=folder / "cache", quiet=True)


def sft_rows(label_counts: list[int], seed: int = 0):
    """One row per number, with that many labels: a packed SFT dataset made by hand."""
    from datasets import Dataset, DatasetInfo

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(16, 6400, (len(label_counts), SEQ), generator=generator).tolist()
    masks = [[False] * (SEQ - n) + [True] * n for n in label_counts]
    columns = {"input_ids": ids, "loss_mask": masks, "segment_lengths": [[SEQ]] * len(ids)}
    return Dataset.from_dict(columns, info=DatasetInfo(description=json.dumps({"kind": "sft", "seq_len": SEQ})))


def start(out_dir, **flags) -> Run:
    """A run with the smallest model; flags as on the command line."""
    values = dict(hidden_size=64, num_hidden_layers=2, max_seq_len=SEQ, batch_size=2, steps=3, log_interval=1)
    values |= dict(compile="0", dtype="fp32", device="cpu", out_dir=out_dir) | flags
    argv = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return Run("pretrain", arguments("pretrain", "test").parse_args(argv), minutes=1)


def loss_fn(model, batch):
    labels = batch["labels"]
    options = {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch else {}
    out = model(batch["input_ids"], logits_at=labels != -100, **options)
    return cross_entropy(out.logits, labels[labels != -100]) + out.aux_loss, out.metrics


def weights(run) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in run.model.state_dict().items()}


def train(run, rows, loss_fn=loss_fn, val_rows=None) -> dict[str, torch.Tensor]:
    """The loop of a train script."""
    for micro_batches in run.steps(rows):
        if run.validation_due:
            run.validate(loss_fn, val_rows)
        for batch in micro_batches:
            loss, metrics = loss_fn(run.model, batch)
            run.backward(loss, batch)
        run.update(metrics)
    run.validate(loss_fn, val_rows)
    run.finish()
    return weights(run)


def log(run) -> list[dict]:
    return [json.loads(line) for line in run.path(".jsonl").read_text(encoding="utf-8").splitlines()]


def largest_difference(a, b) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ------------------------------------------------------------------------------------------------ weighting


def test_accumulated_is_one_big_batch(tmp_path):
    """Rows with 1 to 31 labels and one with none: a mean of the batches' means would weigh their tokens unequally."""
    rows = sft_rows([31, 1, 2, 25, 1, 31, 0, 3, 30, 1, 1, 20])
    flags = dict(optimizer="adamw", learning_rate=1e-3, grad_clip=1e9, seed=1)
    start_weights = weights(start(tmp_path / "start", **flags))
    whole = start(tmp_path / "whole", batch_size=4, **flags)
    parts = start(tmp_path / "parts", batch_size=1, accumulation_steps=4, **flags)
    big, accumulated = train(whole, rows), train(parts, rows)
    assert largest_difference(big, start_weights) > 1e-3
    assert largest_difference(big, accumulated) < 1e-6
    for a, b in zip(log(whole), log(parts), strict=True):
        assert (a["tokens"], a["step"]) == (b["tokens"], b["step"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert log(whole)[-1]["tokens"] == 31 + 1 + 2 + 25 + 1 + 31 + 0 + 3 + 30 + 1 + 1 + 20


def test_gradient_is_the_mean_over_all_tokens(tmp_path):
    """Against autograd on the four rows at once, without the loop."""
    rows = sft_rows([31, 1, 2, 25])
    run = start(tmp_path, batch_size=1, accumulation_steps=4, steps=1)
    [batch] = validation_batches(rows, 4)
    out = run.model(batch["input_ids"], segment_ids=batch["segment_ids"])
    token_losses = nn.functional.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    (token_losses.sum() / 59).backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in run.model.parameters()))
    run.model.zero_grad()
    train(run, rows)
    assert log(run)[0]["grad_norm"] == pytest.approx(norm, rel=3e-4)  # fp32 norm of 400,000 numbers
    assert log(run)[0]["loss"] == pytest.approx(token_losses.sum().item() / 59, rel=1e-6)


def test_bf16_computes_with_the_weights_of_this_step(tmp_path):
    """Against a loop by hand. Autocast keeps the weights it has rounded: those of the step before must not be used."""
    rows = sft_rows([31, 20, 25, 9])
    flags = dict(optimizer="adamw", learning_rate=1e-2, weight_decay=0, grad_clip=1e9, steps=4, warmup=0, decay=0)
    by_hand = start(tmp_path / "hand", dtype="bf16", batch_size=4, **flags).model
    run = start(tmp_path / "run", dtype="bf16", batch_size=4, **flags)
    train(run, rows)
    adamw = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0, betas=(0.9, 0.95), fused=True)
    [batch] = validation_batches(rows, 4)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = loss_fn(by_hand, batch)
        loss.backward()
        adamw.step()
        adamw.zero_grad()
    first, last = log(run)[0]["loss"], log(run)[-1]["loss"]
    assert last == pytest.approx(loss.item(), abs=0.1) and last < first - 1  # with old weights the loss would stay


def test_clipping_limits_the_step_not_the_figure(tmp_path, text):
    norms = []

    def note(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum((g**2).sum().item() for g in grads)))

    handle = register_optimizer_step_pre_hook(note)
    try:
        run = start(tmp_path, optimizer="adamw", grad_clip=0.01)
        train(run, text)
    finally:
        handle.remove()
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(row["grad_norm"] > 0.1 for row in log(run))


# ------------------------------------------------------------------------------------------------ schedule


def test_schedule_of_a_run(tmp_path, text):
    run = start(tmp_path, steps=10, warmup=0.2, decay=0.5, learning_rate=1e-3, optimizer="adamw")
    train(run, text)
    rates = [row["learning_rate"] for row in log(run)]
    assert len(rates) == 10
    assert rates[1] == pytest.approx(0.5e-3)
    assert rates[2:6] == [1e-3] * 4
    assert rates[9] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 0.8)))


# ------------------------------------------------------------------------------------------------ faulty steps


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_non_finite_step_changes_nothing(tmp_path, text, capsys, fault):
    before = []

    def faulty(model, batch):
        before.append({name: w.detach().clone() for name, w in model.named_parameters()})
        loss, metrics = loss_fn(model, batch)
        if len(before) == 3:
            zero = model.model.norm.weight.sum() * 0
            loss = loss * math.nan if fault == "loss" else loss + 0 * zero.sqrt()  # 0 * infinity
        return loss, metrics

    run = start(tmp_path, steps=5)
    after = train(run, text, faulty)
    assert largest_difference(before[1], before[2]) > 0
    assert largest_difference(before[2], before[3]) == 0
    assert largest_difference(before[3], before[4]) > 0
    assert all(w.isfinite().all() for w in after.values())
    err = capsys.readouterr().err
    assert "step 3: " in err and "skipped" in err
    assert checkpoint.load_meta(run.path(".pth"))["skipped"] == 1
    lines = run.path(".jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[2]["grad_norm"] is None and rows[3]["grad_norm"] > 0
    assert rows[1]["tokens"] == rows[2]["tokens"] < rows[3]["tokens"] < rows[4]["tokens"]


def test_gives_up_after_five_bad_steps(tmp_path, text):
    calls = []

    def broken(model, batch):
        calls.append(1)
        loss, metrics = loss_fn(model, batch)
        # Three bad steps, a good one, and then bad ones only: the count begins anew.
        return (loss if len(calls) == 4 else loss * math.inf), metrics

    run = start(tmp_path, steps=50)
    with pytest.raises(checkpoint.CheckpointError, match="5 steps in a row were not finite: lower --lea.*") as error:
        train(run, text, broken)
    assert len(calls) == 9
    assert "\n" not in str(error.value)
    assert not run.path(".pth").exists()


def test_batch_without_labels_is_skipped(tmp_path, capsys):
    run = start(tmp_path, batch_size=1, steps=None, epochs=1)
    train(run, sft_rows([4, 0, 4, 0, 4]))
    assert capsys.readouterr().err.count("no token in the batch is to be learnt from; skipped") == 2
    meta = checkpoint.load_meta(run.path(".pth"))
    assert (meta["skipped"], meta["tokens"], meta["steps"]) == (2, 12, 5)


def test_time_passes_without_labels(tmp_path):
    run = start(tmp_path, batch_size=1, steps=None, minutes=0.01)
    train(run, sft_rows([0, 0]))
    assert checkpoint.load_meta(run.path(".pth"))["tokens"] == 0


@pytest.mark.parametrize(
    "flags",
    ["batch_size 0", "accumulation_steps 0", "steps 0", "epochs 0", "minutes -1", "grad_clip 0", "learning_rate nan"]
    + ["hidden_size 0", "hidden_size 63", "num_workers -1", "warmup 2", "decay -1", "decay 1.5", "keep 0"],
)
def test_numbers_that_make_no_sense(tmp_path, flags):
    name, value = flags.split()
    with pytest.raises(UsageError, match=name):
        start(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ validation


def bits_per_byte_by_hand(model, rows) -> tuple[float, float]:
    """(nats per label, bits per byte): one row after another, from the logits; bytes of the labels."""
    nats, labels, n_bytes, tokenizer = 0.0, 0, 0, load_tokenizer()
    for row in rows:
        ids = row["input_ids"]
        log_p = model(torch.tensor([ids[:-1]])).logits.double().log_softmax(-1)[0]
        nats -= sum(log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1))
        labels += len(ids) - 1
        n_bytes += sum(len(bytes_of_token(tokenizer, i)) for i in ids[1:])
    return nats / labels, nats / math.log(2) / n_bytes


def bytes_of_token(tokenizer, i: int) -> bytes:
    """Independent of bytes_per_token: GPT-2's table of the characters that stand for bytes, turned round."""
    if i < 16:
        return b""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    return bytes(table[c] for c in tokenizer.id_to_token(i))


def validate(run, rows) -> tuple[float, float]:
    figures = run.evaluate(loss_fn, rows)
    return figures["val_loss"], figures["val_bpb"]


@pytest.mark.parametrize("moe", [0, 1])
def test_bits_per_byte(tmp_path, text, tokenizer, moe):
    """Whatever the batch size, the padding rows that fill the last batch, and a MoE's balancing loss."""
    run = start(tmp_path, use_moe=moe)
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(3)  # away from the uniform distribution
        expected = bits_per_byte_by_hand(run.model.eval(), text)
    assert sum(len(bytes_of_token(tokenizer, i)) for row in text for i in row["input_ids"][1:]) == sum(
        len((DOCUMENTS[i % 5] + f" {i}").encode()) for i in range(40)
    )
    for batch_size in (1, 3, len(text) - 1, len(text) + 5):
        run.args.batch_size = batch_size
        assert validate(run, text) == pytest.approx(expected, rel=1e-5)
    assert run.model.training


def test_val_tokens_limit_does_not_depend_on_the_batch_size(tmp_path, text):
    run = start(tmp_path, val_tokens=5 * SEQ + 3)
    expected = bits_per_byte_by_hand(run.model, text.select(range(5)))
    for batch_size in (1, 4, 16):
        run.args.batch_size = batch_size
        assert validate(run, text) == pytest.approx(expected, rel=1e-5)
    run.args.val_tokens = 1  # one row at least
    expected = bits_per_byte_by_hand(run.model, text.select(range(1)))
    assert validate(run, text) == pytest.approx(expected, rel=1e-5)


def test_validation_of_rows_without_labels(tmp_path):
    assert validate(start(tmp_path), sft_rows([0, 0, 0])) == (0.0, 0.0)


def test_when_validation_happens(tmp_path, text):
    run = start(tmp_path / "share", steps=20)
    train(run, text, val_rows=text)
    assert [row["step"] for row in log(run) if "val_bpb" in row] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert checkpoint.load_meta(run.path(".pth"))["val_bpb"] == log(run)[-1]["val_bpb"]
    run = start(tmp_path / "interval", steps=5, val_interval=2)
    train(run, text, val_rows=text)
    assert [row["step"] for row in log(run) if "val_bpb" in row] == [0, 2, 4, 5]


# ------------------------------------------------------------------------------------------------ budget, speed


def test_share_of_the_budget():
    progress = Progress(step=5, samples=30, seconds=90.0)

    def share(**budget):
        return progress.share(Budget(**budget), rows=40)

    assert share(steps=20) == 0.25
    assert share(epochs=1.0) == 0.75
    assert share(epochs=2.5) == 0.3
    assert share(minutes=3.0) == 0.5
    assert share(steps=20, epochs=2.5, minutes=3.0) == 0.5  # the first that is used up
    assert share(epochs=0.5) == 1.5


@pytest.mark.parametrize(
    "budget, steps", [({"steps": 4}, 4), ({"epochs": 1.0}, 7), ({"epochs": 0.5}, 4), ({"steps": 3, "epochs": 9.0}, 3)]
)
def test_budget_ends_the_run(tmp_path, budget, steps):
    """13 rows, two a step: an epoch is seven steps."""
    run = start(tmp_path, **({"steps": None} | budget))
    train(run, sft_rows([5] * 13))
    assert checkpoint.load_meta(run.path(".pth"))["steps"] == steps


def test_minutes_end_the_run(tmp_path, text):
    run = start(tmp_path, steps=None, minutes=0.02)
    train(run, text)
    meta = checkpoint.load_meta(run.path(".pth"))
    assert meta["seconds"] >= 1.2 and meta["steps"] > 1


def test_speed_in_the_log(tmp_path, text, monkeypatch):
    monkeypatch.setattr(run_module, "matmul_peak", lambda device, dtype: 1e9)
    run = start(tmp_path, steps=4, log_interval=2)
    train(run, text)
    assert [row["step"] for row in log(run)] == [2, 4]
    head, before = 6 * run.model.model.embed_tokens.weight.numel(), 0
    for row in log(run):  # the output layer works for the labels only, the rest for every position
        labels, before = (row["tokens"] - before) / (2 * 2 * SEQ), row["tokens"]
        flops = (6 * run.model.num_parameters() - head + labels * head) * row["tokens_per_second"]
        assert row["mfu"] == pytest.approx(flops / 1e9, rel=1e-2) and row["mfu"] > 0
    assert before < 4 * 2 * SEQ  # one row of this text is not full


# ------------------------------------------------------------------------------------------------ resume


def noisy_loss_fn(model, batch):
    """Draws random numbers, as dropout or sampling in a later stage does."""
    loss, metrics = loss_fn(model, batch)
    return loss * torch.rand(()), metrics


def interrupted_after(steps: int):
    """noisy_loss_fn that fails in the step after these."""
    calls = []

    def fail(model, batch):
        calls.extend([1] * model.training)  # validation does not count
        if len(calls) > steps:
            raise KeyboardInterrupt
        return noisy_loss_fn(model, batch)

    return fail


def test_resumed_with_random_numbers(tmp_path, text):
    """The random state goes on where it was, and so does everything else: equal weights, bit for bit."""
    flags = dict(steps=6, save_interval=1, log_interval=2)
    whole = start(tmp_path / "whole", **flags)
    expected = train(whole, text, noisy_loss_fn, text)
    for first, stop_at in ((0, 3), (3, 5)):  # two interruptions
        run = start(tmp_path / "parts", from_resume=1, **flags)
        assert (run.resume["progress"]["step"] if run.resume else 0) == first
        with pytest.raises(KeyboardInterrupt):
            train(run, text, interrupted_after(stop_at - first), text)
    torch.manual_seed(12345)
    run = start(tmp_path / "parts", from_resume=1, **flags)
    assert run.resume["progress"]["step"] == 5
    found = train(run, text, noisy_loss_fn, text)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    timing = ("seconds", "tokens_per_second", "mfu")
    logs = [[{k: v for k, v in row.items() if k not in timing} for row in log(r)] for r in (whole, run)]
    assert logs[0] == logs[1]
    assert not run.path("_resume").exists()


def several_updates(run, rows, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """Another kind of loop on the same verbs, as reinforcement learning has it: two updates on each batch, the second
    accumulated over its halves; a validation of its own."""
    for micro_batches in run.steps(rows):
        if run.validation_due:
            run.log_validation({"val_reward": run.progress.step / 10})
        [batch] = micro_batches
        halves = [part_of(batch, slice(0, 1)), part_of(batch, slice(1, 2))]
        for pieces in ([batch], halves):
            for piece in run.accumulate(pieces):
                loss, metrics = noisy_loss_fn(run.model, piece)
                run.backward(loss, piece)
            run.update(metrics)
        if run.progress.step == stop_after:
            signal.raise_signal(signal.SIGTERM)
    run.finish()
    return weights(run)


def part_of(batch: dict, rows: slice) -> dict:
    part = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    labels = int((part["labels"] != -100).sum())
    return part | {"tokens": labels, "weight": labels}


def test_several_updates_on_what_one_step_brought(tmp_path):
    rows = sft_rows([31, 1, 2, 25, 1, 31, 7, 3])
    flags = dict(steps=8, save_interval=2)
    whole = start(tmp_path / "whole", **flags)
    expected = several_updates(whole, rows)
    assert checkpoint.load_meta(whole.path(".pth"))["steps"] == 8
    assert {row["step"] for row in log(whole) if "val_reward" in row} == {0, 2, 4, 6}
    assert [row["tokens"] for row in log(whole) if "loss" in row][:2] == [(total := log(whole)[1]["tokens"]), 2 * total]
    with pytest.raises(SystemExit, match="130"):
        several_updates(start(tmp_path / "parts", **flags), rows, stop_after=4)
    run = start(tmp_path / "parts", from_resume=1, **flags)
    assert run.resume["progress"]["step"] == 6  # the signal came after the last look at it
    found = several_updates(run, rows)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_state_of_another_version_is_refused(tmp_path, text):
    run = start(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(start(tmp_path, save_interval=1), text, interrupted_after(1))
    [path] = run.path("_resume").glob("*.pt")
    state = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "version"}, path)
    with pytest.raises(UsageError, match="_resume.*version"):
        start(tmp_path, from_resume=1)
    assert path.exists()


def test_interrupt_once_twice():
    interrupt = Interrupt()
    assert not interrupt.asked
    signal.raise_signal(signal.SIGINT)
    assert interrupt.asked
    signal.raise_signal(signal.SIGTERM)  # torchrun repeats the terminal's signal at once
    interrupt.when -= 2
    with pytest.raises(SystemExit, match="130"):
        signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------------------ log and picture


def test_cut_log(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": 0, "val_loss": 9.0}, {"step": 2, "loss": 3.0}, {"step": 2, "val_loss": 8.0}]
    rows += [{"step": 4, "loss": 2.0}, {"step": 4, "val_loss": 7.0}, {"step": 6, "loss": 1.0}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    for step, kept in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (9, 6)):
        path.write_text(content + '{"step": 6, "val_l', encoding="utf-8")  # killed in the middle of a line
        cut_log(path, step)
        assert list(read_log(path)) == rows[:kept], step
        assert path.read_text(encoding="utf-8").count("\n") == kept
    path.unlink()
    cut_log(path, 5)
    assert path.read_text(encoding="utf-8") == ""
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_draw_curve(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    rows = [{"step": i, "tokens": 100 * i, "loss": 8 / (i + 1)} for i in range(1, 50)]
    rows += [{"step": i, "tokens": 100 * i, "val_loss": 8 / (i + 1), "val_bpb": 3 / (i + 1)} for i in range(0, 50, 10)]
    rows += [{"step": 50, "tokens": 4900, "loss": None}]  # a step that was skipped
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert draw_curve(path, tmp_path / "curve.png")
    png = (tmp_path / "curve.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (960, 540)
    path.write_text("", encoding="utf-8")
    assert draw_curve(path, tmp_path / "empty.png")
    assert len(png) > len((tmp_path / "empty.png").read_bytes()) + 2000  # the two lines
