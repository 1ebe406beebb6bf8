"""Several processes: every engine computes what one process does, goes on where it was, and ends in one clear line."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch.distributed as dist

import cli
from dataset.chat import load_tokenizer
from dataset.lm_dataset import IGNORE, batches, sft_dataset
from model import checkpoint
from tests.processes import (
    ENV,
    ROOT,
    VARIABLES,
    Done,
    Script,
    assert_same,
    free_port,
    largest_difference,
    log,
    one_error,
    small_data,
    small_weights,
)  # fmt: skip
from trainer import parallel, zero
from trainer.arguments import arguments
from trainer.run import Run

TINY = "--max_seq_len 32 --batch_size 2 --accumulation_steps 2 --compile 0 --dtype fp32 --device cpu"
TINY = [*TINY.split(), "--log_interval", "1", "--learning_rate", "1e-3"]
ENGINES = {"one": [], "ddp": [], "fsdp": ["--fsdp"]} | {
    f"zero{n}": ["--deepspeed", str(ROOT / f"configs/zero{n}.json"), "--optimizer", "adamw"] for n in (1, 2, 3)
}
# The same with the optimizer's state and the weights in main memory.
ENGINES["offload3"] = ["--deepspeed", "{folder}/offload3.json", "--optimizer", "adamw"]
needs_deepspeed = pytest.mark.skipif(sys.platform != "linux", reason="deepspeed is for Linux")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with small_data(tmp_path_factory.mktemp("data")) as paths:
        yield paths


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, Path]:
    return small_weights(tmp_path_factory.mktemp("base"))


def result(folder: Path, name: str) -> Path:
    """The weights that the run of this name has written."""
    [path] = folder.glob(f"**/{name}_64*.pth")
    return path


def launched(command: list) -> subprocess.Popen:
    """A launcher's process, as from a terminal."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | ENV
    return subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


# ------------------------------------------------------------------------------------------------ equal to one process

ONE = ("one-muon-dense", "one-adamw-dense", "one-adamw-moe", "one-adamw-dense-bf16")
TORCH = ("ddp-muon-dense", "fsdp-muon-dense", "ddp-adamw-moe", "fsdp-adamw-moe")
ZERO = ("zero1-adamw-dense", "zero2-adamw-dense", "zero3-adamw-dense", "zero2-adamw-moe", "zero3-adamw-moe")
ZERO += ("offload3-adamw-dense",)
ZERO_BF16 = ("zero2-adamw-dense-bf16", "zero3-adamw-dense-bf16")


def sft_job(folder: Path, data: dict, base: dict, name: str) -> list:
    """The run called engine-optimizer-model[-dtype]; one process gets the global batch."""
    engine, optimizer, model, *dtype = name.split("-")
    flags = ["train_full_sft.py", *TINY, "--data_path", data["chat"], "--steps", 4, "--from_weight", base[model]]
    flags += ["--optimizer", optimizer, "--out_dir", folder, "--save_weight", name]
    flags += [flag.format(folder=folder) for flag in ENGINES[engine]] + ["--batch_size", 4] * (engine == "one")
    return flags + ["--dtype", *dtype, "--val_path", data["chat"], "--val_tokens", 64] * len(dtype)


SCRIPTS = {  # name, script, weights to begin with, rows of a batch, further flags
    "pretrain": ("pretrain", "dense", 2, "--data_path {text}"),
    "reason": ("reason", "dense", 2, "--data_path {chat}"),
    "lora": ("lora", "dense", 2, "--data_path {chat}"),
    "lora moe": ("lora", "moe", 1, "--data_path {chat} --max_seq_len 4"),  # adapters of experts without a token
    "dpo": ("dpo", "dense", 2, "--data_path {pairs} --max_seq_len 64"),
    "distill": ("distill", "moe", 2, "--data_path {chat} --teacher {moe} --alpha 0.3"),
}
MORE_THAN_A_LOSS = [*SCRIPTS][2:]  # frozen weights, a reference, a teacher


def script_jobs(folder: Path, data: dict, base: dict, engine: str, names: Iterable[str] = SCRIPTS) -> list[list]:
    jobs = []
    for name in names:
        script, model, rows, more = SCRIPTS[name]
        flags = [f"train_{script}.py", *TINY, "--from_weight", base[model], "--steps", 3, "--optimizer", "adamw"]
        flags += [*more.format(**data, **base).split(), "--batch_size", 2 * rows if engine == "one" else rows]
        jobs.append([*flags, "--out_dir", folder, "--save_weight", f"{engine}-{name}", *ENGINES[engine]])
    return jobs


# A loop of one's own that prints the embedding's gradient after each backward, as one number.
OWN = """
import cli
from dataset.lm_dataset import sft_dataset
from train_full_sft import sft_loss
from trainer.arguments import arguments
from trainer.run import Run

def main():
    run = Run("own", arguments("own", "").parse_args(), minutes=1)
    train_rows, _ = run.rows(sft_dataset, "sft")
    for micro_batches in run.steps(train_rows):
        for batch in micro_batches:
            loss, metrics = sft_loss(run.model, batch)
            run.backward(loss, batch)
            gradient = next(run.model.parameters()).grad
            share = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            print(None if share is None else share.norm().item())
        run.update(metrics)

cli.run(main)
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory, data, base) -> Path:
    folder = tmp_path_factory.mktemp("one")
    Script(folder, *(sft_job(folder, data, base, name) for name in ONE)).succeed()
    return folder


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory, data, base) -> tuple[Path, Script]:
    folder = tmp_path_factory.mktemp("torch")
    (folder / "own.py").write_text(OWN)
    jobs = [sft_job(folder, data, base, name) for name in TORCH]
    own = [[folder / "own.py", *sft_job(folder, data, base, f"{engine}-adamw-dense")[1:]] for engine in ("ddp", "fsdp")]
    return folder, Script(folder, *jobs, *own, count=2).succeed()


@pytest.fixture(scope="module")
def by_zero(tmp_path_factory, data, base) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    config = json.loads((ROOT / "configs/zero3.json").read_text(encoding="utf-8"))
    for name in ("offload_optimizer", "offload_param"):  # as the note in this file says
        config["zero_optimization"][name]["device"] = "cpu"
    (folder / "offload3.json").write_text(json.dumps(config), encoding="utf-8")
    jobs = [sft_job(folder, data, base, name) for name in ZERO + ZERO_BF16]
    Script(folder, *jobs, *script_jobs(folder, data, base, "zero3", MORE_THAN_A_LOSS), count=2).succeed()
    return folder


@pytest.fixture(scope="module")
def scripts_by_one(tmp_path_factory, data, base) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    Script(folder, *script_jobs(folder, data, base, "one")).succeed()
    return folder


@pytest.fixture(scope="module")
def scripts_by_torch(tmp_path_factory, data, base) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    jobs = script_jobs(folder, data, base, "ddp", MORE_THAN_A_LOSS) + script_jobs(folder, data, base, "fsdp")
    Script(folder, *jobs, count=2).succeed()
    return folder


def assert_equal_to_one_process(one: Path, folder: Path, name: str) -> None:
    """Weights to 1e-5 after steps accumulated over two batches, and what the log says of each step."""
    expected, found = result(one, f"one-{name.partition('-')[2]}"), result(folder, name)
    assert largest_difference(expected, found) < 1e-5
    # torch's norm adds up in fp32, on a CPU hardly better than one by one: of a whole matrix it is 1e-4 off.
    for key, within in (("loss", 1e-5), ("grad_norm", 3e-4), ("learning_rate", 0), ("tokens", 0)):
        rows = [row[key] for row in log(expected)]
        assert rows and [row[key] for row in log(found)] == pytest.approx(rows, rel=within, abs=0), key


@pytest.mark.parametrize("name", TORCH)
def test_two_processes_are_one(one, by_torch, name):
    assert_equal_to_one_process(one, by_torch[0], name)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ZERO)
def test_two_processes_of_deepspeed_are_one(one, by_zero, name):
    assert_equal_to_one_process(one, by_zero, name)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ZERO_BF16)
def test_bf16_of_deepspeed_is_that_of_one_process(one, by_zero, name):
    """DeepSpeed has an autocast of its own, in training alone: the first loss, in training and in validation, is that
    of ours, not of fp32; the others follow."""
    logs = [log(result(one, "one-adamw-dense")), log(result(one, "one-adamw-dense-bf16")), log(result(by_zero, name))]
    exact, expected, found = ([row["loss"] for row in rows if "loss" in row] for rows in logs)
    assert found[0] == pytest.approx(expected[0], rel=1e-6) != exact[0]
    assert found == pytest.approx(expected, rel=1e-4)
    validations = [next(row["val_loss"] for row in rows if "val_loss" in row) for rows in logs[1:]]
    assert validations[1] == pytest.approx(validations[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"fsdp-{name}" for name in SCRIPTS] + [f"ddp-{name}" for name in MORE_THAN_A_LOSS])
def test_every_script_under_torch(scripts_by_one, scripts_by_torch, name):
    """Two processes are one, whatever is trained: LoRA's frozen weights, the reference of DPO, a teacher."""
    assert_equal_to_one_process(scripts_by_one, scripts_by_torch, name)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", MORE_THAN_A_LOSS)
def test_every_script_under_deepspeed(scripts_by_one, by_zero, name):
    """Under ZeRO 3, which shares out most."""
    assert_equal_to_one_process(scripts_by_one, by_zero, f"zero3-{name}")


def test_the_comparison_is_of_what_differs_between_processes(one, by_torch):
    """Steps with different numbers of labels; experts that have no token on one process."""
    tokens = [row["tokens"] for row in log(result(one, "one-adamw-dense"))]
    assert len({b - a for a, b in itertools.pairwise([0, *tokens])}) > 1
    assert any(0 in row["expert_load"] for row in log(result(by_torch[0], "ddp-adamw-moe")))


def test_gradients_are_exchanged_once_a_step(by_torch):
    """After the last batch: until then DDP has its own on each process, and FSDP2 shares none out."""
    ours, theirs = (by_torch[1].out(rank).split() for rank in range(2))
    assert len(ours) == len(theirs) == 2 * 4 * 2  # engines, steps, batches
    exchanged = [False, True] * 4
    assert [mine == others for mine, others in zip(ours[:8], theirs[:8], strict=True)] == exchanged
    assert [share != "None" for share in ours[8:]] == [share != "None" for share in theirs[8:]] == exchanged


def test_one_process_speaks_and_writes(by_torch):
    folder, group = by_torch
    assert str(result(folder, "ddp-muon-dense")) in group.err(0) and group.err(1) == ""
    written = [path.suffix for path in folder.iterdir() if path.stem.startswith("ddp-muon-dense")]
    assert sorted(written) == [".json", ".jsonl", ".png", ".pth"]


# ------------------------------------------------------------------------------------------------ launchers


@pytest.mark.slow
@needs_deepspeed
def test_the_launcher_of_deepspeed(tmp_path, data, base, by_zero):
    """Bit for bit the weights of the processes that it did not start."""
    name, port = "zero2-adamw-dense", free_port()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", 2, "--master_port", port]
    launcher = launched(command + sft_job(tmp_path, data, base, name))
    _, error = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, error
    assert largest_difference(result(by_zero, name), result(tmp_path, name)) == 0


@pytest.mark.slow
def test_two_launchers_are_one(tmp_path, data, base, by_torch):
    """Two machines, here both on loopback, with a launcher on each: bit for bit the weights of one launcher's two."""
    name, port = "ddp-muon-dense", free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1]
    command += ["--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
    job = sft_job(tmp_path, data, base, name)
    launchers = [launched([*command, rank, *job]) for rank in range(2)]
    errors = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    assert [str(result(tmp_path, name)) in error for error in errors] == [True, False]
    assert largest_difference(result(by_torch[0], name), result(tmp_path, name)) == 0


def test_machines_must_see_the_same_files(tmp_path, data, base, by_torch):
    """A finished run that only one of the machines sees: they would wait for each other, or go apart."""
    shutil.copytree(by_torch[0], tmp_path / "seen by 0")
    flags = sft_job(tmp_path / "seen by {rank}", data, base, "ddp-muon-dense")
    group = Script(tmp_path, [*flags, "--from_resume", 1], count=2)
    for rank, code in enumerate(group.codes()):
        one_error(Done(code, group.out(rank), group.err(rank)), 2, "--from_resume 1", f"seen by {rank}")
        assert group.err(rank).count("\n") == 1


# ------------------------------------------------------------------------------------------------ resume


ZERO_RESUMED = pytest.param(["zero1-adamw", "zero3-adamw"], marks=[pytest.mark.slow, needs_deepspeed])


TORCH_RESUMED = pytest.param(["fsdp-muon"], marks=pytest.mark.slow)


@pytest.mark.parametrize("names", [TORCH_RESUMED, ZERO_RESUMED], ids=["torch", "deepspeed"])
def test_resumed(tmp_path, data, base, names):
    """From a copy of the folder, made while the run went on: what it would have left if it had been killed. The end is
    that of the whole run, bit for bit. The clocks of the processes go apart, and still they save after the same
    steps."""
    jobs = []
    for name in names:
        engine, optimizer = name.split("-")
        job = ["train_full_sft.py", *TINY, "--data_path", data["chat"], "--from_weight", base["dense"], "--steps", 14]
        job += [*ENGINES[engine], "--optimizer", optimizer, "--out_dir"]
        jobs += [[*job, tmp_path / name], [*job, tmp_path / f"copy of {name}", "--from_resume", 1]]
    group = Script(tmp_path, *jobs, count=2, clocks_apart=True)
    for name in names:
        group.wait_for_state(tmp_path / name)
        shutil.copytree(tmp_path / name, tmp_path / f"copy of {name}", ignore=shutil.ignore_patterns(".*"))
    group.succeed()
    for name in names:
        assert_same(result(tmp_path / name, "full_sft"), result(tmp_path / f"copy of {name}", "full_sft"))


@pytest.mark.slow
def test_other_number_of_processes(tmp_path, data, base):
    """Two processes under FSDP2 are killed and one goes on, which says what cannot be the same: the rows taken are
    those of the order, none twice, none missing (the log counts their labels), and so are the lines of the log."""
    flags = ["train_full_sft.py", *TINY, "--data_path", data["chat"], "--from_weight", base["dense"]]
    flags += ["--epochs", 5, "--save_interval", 1, "--out_dir", tmp_path / "out"]
    killed = Script(tmp_path, [*flags, "--fsdp"], count=2)
    killed.wait_for_state(tmp_path / "out")
    assert killed.kill().codes() == [-signal.SIGKILL] * 2, killed.err()
    before = checkpoint.load_resume(tmp_path / "out" / "full_sft_64_resume")["progress"]
    after = Script(tmp_path, [*flags, "--from_resume", 1]).succeed()
    assert "note: " in after.err()

    rows = sft_dataset(data["chat"], load_tokenizer(), 32, quiet=True)
    labels = ((batch["labels"] != IGNORE).sum().item() for batch in batches(rows, 1, seed=42))
    taken = range(before["samples"] + 4, 5 * len(rows) + 4, 4)  # by one process: two batches of two rows a step
    taken = [*range(8, before["samples"] + 1, 8), *taken]
    total = list(itertools.accumulate(itertools.islice(labels, taken[-1]), initial=0))
    lines = log(result(tmp_path / "out", "full_sft"))
    assert 0 < before["step"] < len(lines) and before["samples"] == 8 * before["step"]
    assert [row["step"] for row in lines] == list(range(1, len(lines) + 1))
    assert [row["tokens"] for row in lines] == [total[samples] for samples in taken]


# ------------------------------------------------------------------------------------------------ faults


def test_a_dead_process_ends_the_others(tmp_path, data, base):
    flags = [*TINY, "--data_path", data["chat"], "--from_weight", base["dense"], "--steps", 100000]
    flags += ["--save_interval", 3, "--out_dir", tmp_path / "out"]
    group = Script(tmp_path, ["train_full_sft.py", *flags], count=2)
    group.wait_for_state(tmp_path / "out")
    group.processes[1].kill()
    codes = group.codes(30)
    assert codes[1] == -signal.SIGKILL
    one_error(Done(codes[0], group.out(), group.err()), 1, "--from_resume 1")


ALONE = dict(zip(VARIABLES, ("0", "1", "0", "127.0.0.1", "1"), strict=True))
WRONG = {
    "no world size": ({"RANK": "0"}, [], "WORLD_SIZE"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, [], "MASTER_ADDR"),
    "rank too high": (ALONE | {"RANK": "2", "WORLD_SIZE": "2"}, [], "RANK=2"),
    "not a number": (ALONE | {"WORLD_SIZE": "two"}, [], "WORLD_SIZE=two"),
    "no launcher": ({}, ["--fsdp"], "--fsdp"),
    "both engines": (ALONE, ["--fsdp", *ENGINES["zero2"]], "--deepspeed"),
    "no such file": (ALONE, ["--deepspeed", "nowhere.json", "--optimizer", "adamw"], "nowhere.json"),
    "compiled under ZeRO 3": (ALONE, [*ENGINES["zero3"], "--compile", "1"], "--compile 1"),
    "Muon under ZeRO": (ALONE, ENGINES["zero2"][:2], "--optimizer adamw"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_environment_is_one_line(tmp_path, monkeypatch, case):
    env, flags, part = WRONG[case]
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    args = arguments("pretrain", "").parse_args([*TINY, *flags, "--out_dir", str(tmp_path / "out")])
    with pytest.raises(cli.UsageError) as raised:
        Run("pretrain", args, minutes=1)
    assert part in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("section", zero.TAKEN)
def test_a_deepspeed_file_must_not_say_what_flags_say(tmp_path, section):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, section: {}}))
    with pytest.raises(cli.UsageError) as raised:
        zero.zero_config(str(path), 2, 1, 1.0)
    assert f"{path}: {section} " in str(raised.value)


@pytest.mark.slow
@needs_deepspeed
def test_what_deepspeed_refuses_is_one_line(tmp_path, data, base):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 2, "bucket": 5}}')
    flags = sft_job(tmp_path, data, base, "one-adamw-dense")
    group = Script(tmp_path, [*flags, "--deepspeed", tmp_path / "own.json"], count=2)
    assert group.codes() == [2, 2]
    [line] = [line for line in group.err().splitlines() if line.startswith("error: ")]
    assert "own.json" in line and "bucket" in line and "Traceback" not in group.err()


def test_processes_that_do_not_come(monkeypatch):
    port = free_port()
    for name, value in (ALONE | {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "JOIN_SECONDS", 1)
    with pytest.raises(cli.UsageError) as raised:
        parallel.join(parallel.Processes(0, 2))
    assert "WORLD_SIZE=2" in str(raised.value) and f"127.0.0.1:{port}" in str(raised.value)
    assert not dist.is_initialized()
