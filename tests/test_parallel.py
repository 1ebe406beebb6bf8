"""Several processes: every engine computes what one process does, goes on where it was, and ends in one clear line."""

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from dataset.lm_dataset import CACHE_DIR

ROOT = Path(__file__).resolve().parent.parent
TINY = "--hidden_size 64 --num_hidden_layers 2 --max_seq_len 32 --batch_size 2 --compile 0 --dtype fp32 --device cpu"
TINY = [*TINY.split(), "--log_interval", "1", "--learning_rate", "1e-3", "--accumulation_steps", "2"]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
ENGINES = {"ddp": [], "fsdp": ["--fsdp"]} | {
    f"zero{n}": ["--deepspeed", str(ROOT / f"configs/zero{n}.json"), "--optimizer", "adamw"] for n in (1, 2, 3)
}
needs_deepspeed = pytest.mark.skipif(sys.platform != "linux", reason="deepspeed is for Linux")


def _in_child(argv, env, out_path):
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{out_path}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


class Group:
    """`count` processes of a script, as a launcher starts them."""

    def __init__(self, folder: Path, count: int, *flags, script="train_pretrain.py", env=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.paths = [folder / f"p{random.getrandbits(64):x}" for _ in range(count)]
        self.processes = []
        for rank, path in enumerate(self.paths):
            values = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            values = {k: str(v) for k, v in (values | {"MASTER_PORT": port}).items()} if count > 1 else {}
            argv = [str(ROOT / script), *map(str, flags)]
            self.processes.append(CONTEXT.Process(target=_in_child, args=(argv, values | (env or {}), path)))
            self.processes[-1].start()

    def wait(self, timeout: float = 120) -> list[int]:
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hung = [process for process in self.processes if process.exitcode is None]
        for process in hung:
            process.kill()
        assert not hung, self.err(0)
        return [process.exitcode for process in self.processes]

    def err(self, rank: int) -> str:
        path = Path(f"{self.paths[rank]}.err")
        return path.read_text(encoding="utf-8") if path.exists() else ""


def run(folder: Path, count: int, *flags, **options) -> Group:
    group = Group(folder, count, *flags, **options)
    codes = group.wait()
    assert codes == [0] * count, [group.err(rank) for rank in range(count)]
    return group


@pytest.fixture(scope="module", autouse=True)
def server():
    CONTEXT.set_forkserver_preload(["torch", "datasets", "matplotlib.pyplot", "trainer.trainer", "dataset.lm_dataset"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / f"p{os.getpid()}.jsonl"
    words, generator = "the cat sat on a mat 小猫 看 雨 and 3 + 4 = 7 今天 天气".split(), random.Random(0)
    lines = [json.dumps({"text": " ".join(generator.choices(words, k=12))}) + "\n" for _ in range(60)]
    path.write_text("".join(lines), encoding="utf-8")
    yield path
    for cached in CACHE_DIR.glob(f"*-{path.stem}-*"):
        shutil.rmtree(cached) if cached.is_dir() else cached.unlink()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [path] = folder.glob("*.pth")
    return torch.load(path, weights_only=True)["model"]


def losses(folder: Path) -> list[float]:
    [path] = folder.glob("*.jsonl")
    return [row["loss"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "loss" in row]


def difference(a: Path, b: Path) -> float:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


# ------------------------------------------------------------------------------------------------ equal to one process


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, optimizer, moe",
    [("ddp", "muon", 0), ("fsdp", "muon", 0), ("fsdp", "adamw", 1)]
    + [pytest.param(f"zero{n}", "adamw", 0, marks=[pytest.mark.slow, needs_deepspeed]) for n in (1, 2, 3)],
)
def test_two_processes_are_one(tmp_path, data, engine, optimizer, moe):
    """Same global batch, accumulated over two batches: equal weights to 1e-5, equal losses."""
    flags = [*TINY, "--data_path", data, "--steps", 4, "--optimizer", optimizer, "--use_moe", moe]
    # The balancing loss is of each process's own tokens, so a MoE is compared with DDP.
    other = [1, "--batch_size", 4] if not moe else [2]
    run(tmp_path, other[0], *flags, *other[1:], "--out_dir", tmp_path / "one")
    two = run(tmp_path, 2, *flags, *ENGINES[engine], "--out_dir", tmp_path / "two")
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    assert "wrote" in two.err(0) and "M parameters" not in two.err(1) and "wrote" not in two.err(1)


# ------------------------------------------------------------------------------------------------ resume


def wait_for_state(folder: Path, group: Group) -> None:
    end = time.monotonic() + 90
    while not list(folder.glob("*_resume/state_*.pt")) and group.processes[0].is_alive() and time.monotonic() < end:
        time.sleep(0.005)


@pytest.mark.parametrize(
    "engine",
    [pytest.param("fsdp", marks=pytest.mark.slow)]
    + [pytest.param(f"zero{n}", marks=[pytest.mark.slow, needs_deepspeed]) for n in (1, 3)],
)
def test_killed_and_resumed(tmp_path, data, engine):
    """kill -9 of all processes: the end is that of an uninterrupted run, bit for bit."""
    flags = [*TINY, "--data_path", data, "--steps", 40, "--save_interval", 3, *ENGINES[engine], "--out_dir"]
    run(tmp_path, 2, *flags, tmp_path / "whole")
    group = Group(tmp_path, 2, *flags, tmp_path / "parts")
    wait_for_state(tmp_path / "parts", group)
    for process in group.processes:
        process.kill()
    assert -signal.SIGKILL in group.wait()
    run(tmp_path, 2, *flags, tmp_path / "parts", "--from_resume", 1)
    assert difference(tmp_path / "whole", tmp_path / "parts") == 0


@pytest.mark.slow
def test_other_number_of_processes(tmp_path, data):
    """A state of two processes under FSDP2 goes on with one, which says what cannot be the same."""
    flags = [*TINY, "--data_path", data, "--steps", 40, "--save_interval", 3, "--out_dir", tmp_path / "out"]
    group = Group(tmp_path, 2, *flags, "--fsdp")
    wait_for_state(tmp_path / "out", group)
    for process in group.processes:
        process.kill()
    group.wait()
    done = run(tmp_path, 1, *flags, "--from_resume", 1)
    assert "2 processes before, 1 now" in done.err(0)
    assert len(losses(tmp_path / "out")) == 40


# ------------------------------------------------------------------------------------------------ faults


def test_a_dead_process_ends_the_others(tmp_path, data):
    flags = [*TINY, "--data_path", data, "--steps", 100000, "--save_interval", 3, "--out_dir", tmp_path / "out"]
    group = Group(tmp_path, 2, *flags)
    wait_for_state(tmp_path / "out", group)
    group.processes[1].kill()
    start = time.monotonic()
    assert group.wait(30) == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 30
    assert group.err(0).endswith("error: another process of this run has ended; its own message says why. "
                                 "--from_resume 1 goes on\n")  # fmt: skip
    assert "Traceback" not in group.err(0)


WRONG = {
    "no world size": ({"RANK": "0"}, [], "WORLD_SIZE"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, [], "MASTER_ADDR"),
    "rank too high": (dict(zip(VARIABLES, ("2", "2", "0", "127.0.0.1", "1"), strict=True)), [], "RANK=2"),
    "not a number": (dict(zip(VARIABLES, ("0", "two", "0", "127.0.0.1", "1"), strict=True)), [], "WORLD_SIZE=two"),
    "no launcher": ({}, ["--fsdp"], "torchrun"),
    "no such file": (
        dict(zip(VARIABLES, ("0", "1", "0", "127.0.0.1", "1"), strict=True)),
        ["--deepspeed", "nowhere.json", "--optimizer", "adamw"], "nowhere.json",
    ),
    "Muon under ZeRO": (
        dict(zip(VARIABLES, ("0", "1", "0", "127.0.0.1", "1"), strict=True)),
        ["--deepspeed", str(ROOT / "configs/zero2.json")], "--optimizer adamw",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_environment_is_one_line(tmp_path, data, case):
    env, flags, part = WRONG[case]
    group = Group(tmp_path, 1, *TINY, "--data_path", data, "--out_dir", tmp_path / "out", *flags, env=env)
    assert group.wait(60) == [2]
    assert group.err(0).startswith("error: ") and group.err(0).count("\n") == 1 and part in group.err(0)
    assert not (tmp_path / "out").exists()
