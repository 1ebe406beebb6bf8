"""Several processes: every engine computes what one process does, goes on where it was, and ends in one clear line."""

import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import cli
from dataset.chat import load_tokenizer
from dataset.lm_dataset import CACHE_DIR, batches, sft_dataset
from model import checkpoint
from model.model import MiniMindConfig, MiniMindLM
from trainer import parallel, trainer
from trainer.arguments import arguments

ROOT = Path(__file__).resolve().parent.parent
TINY = "--max_seq_len 32 --batch_size 2 --accumulation_steps 2 --compile 0 --dtype fp32 --device cpu"
TINY = [*TINY.split(), "--log_interval", "1", "--learning_rate", "1e-3"]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
ENGINES = {"one": [], "ddp": [], "fsdp": ["--fsdp"]} | {
    f"zero{n}": ["--deepspeed", str(ROOT / f"configs/zero{n}.json"), "--optimizer", "adamw"] for n in (1, 2, 3)
}
for n in (2, 3):  # the same with the optimizer's state, and the weights, in main memory
    ENGINES[f"offload{n}"] = ["--deepspeed", f"{{folder}}/offload{n}.json", "--optimizer", "adamw"]
needs_deepspeed = pytest.mark.skipif(sys.platform != "linux", reason="deepspeed is for Linux")


def _train(jobs: list[list[str]], env: dict, path: Path) -> None:
    """Runs train_full_sft.py, or the script named first, once for each list of flags. All but the start of the
    processes is as from the shell: they stay in one group, since meeting and importing cost far more than so small a
    training."""
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{path}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(env)
    torch.set_num_threads(1)
    join = parallel.join
    parallel.join = lambda *args: None if dist.is_initialized() else join(*args)
    trainer.matmul_peak = lambda device, dtype: 1e11  # of no matter here, and measuring it takes a second
    # The clocks of the processes go apart, and still they must save at the same steps.
    speed, trainer.SAVE_SECONDS = 1000 ** int(env.get("RANK", 0)), 10
    trainer.time = SimpleNamespace(perf_counter=lambda: speed * time.perf_counter())
    _record(path)

    def all_jobs() -> None:
        for flags in jobs:
            sys.argv = flags if flags[0].endswith(".py") else ["train_full_sft.py", *flags]
            importlib.import_module(sys.argv[0].removesuffix(".py")).main()

    cli.run(all_jobs)


def _record(path: Path) -> None:
    """Into path.rows every row that is taken to be trained on; into path.gradients, after each backward, whether it was
    the last of its step and the embedding's gradient in one number."""
    original_batches, original_backward = trainer.batches, parallel.Engine.backward

    def recorded_batches(*args, **options):
        with open(f"{path}.rows", "a") as file:
            for batch in original_batches(*args, **options):
                for row in batch["input_ids"].tolist():
                    print(*row, file=file)
                file.flush()
                yield batch

    def recorded_backward(engine, loss, last):
        original_backward(engine, loss, last)
        gradient = next(engine.run.model.parameters()).grad
        share = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        number = None if share is None else share.norm().item()
        with open(f"{path}.gradients", "a") as file:
            print(json.dumps([engine.run.args.save_weight, last, number]), file=file)

    trainer.batches, parallel.Engine.backward = recorded_batches, recorded_backward


class Group:
    """`count` processes, as a launcher starts them; {rank} in a flag is the number of the process."""

    def __init__(self, folder: Path, count: int, *jobs: list):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.paths = [folder / f"p{random.getrandbits(64):x}" for _ in range(count)]
        self.processes = []
        for rank, path in enumerate(self.paths):
            env = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            env = {k: str(v) for k, v in (env | {"MASTER_PORT": port}).items()} if count > 1 else {}
            flags = [[str(flag).replace("{rank}", str(rank)) for flag in job] for job in jobs]
            self.processes.append(CONTEXT.Process(target=_train, args=(flags, env, path)))
            self.processes[-1].start()

    def wait(self, timeout: float = 200) -> list[int]:
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hung = [process for process in self.processes if process.exitcode is None]
        for process in hung:
            process.kill()
        assert not hung, self.err(0)
        return [process.exitcode for process in self.processes]

    def succeed(self) -> "Group":
        assert set(self.wait()) == {0}, [self.err(rank) for rank in range(len(self.paths))]
        return self

    def kill_after_a_save(self, folder: Path) -> None:
        """kill -9 of all processes once a resume state is there."""
        self.wait_for_state(folder)
        for process in self.processes:
            process.kill()
        assert -signal.SIGKILL in self.wait(), self.err(0)

    def wait_for_state(self, folder: Path) -> None:
        end = time.monotonic() + 90
        while not list(folder.glob("*_resume/state_*.pt")) and self.processes[0].is_alive():
            assert time.monotonic() < end, self.err(0)
            time.sleep(0.005)

    def err(self, rank: int) -> str:
        path = Path(f"{self.paths[rank]}.err")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def rows(self, rank: int) -> list[str]:
        return Path(f"{self.paths[rank]}.rows").read_text().splitlines()

    def gradients(self, rank: int) -> list:
        return [json.loads(line) for line in Path(f"{self.paths[rank]}.gradients").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def server():
    CONTEXT.set_forkserver_preload(["torch", "datasets", "matplotlib.pyplot", "trainer.trainer", "dataset.lm_dataset"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations with answers of very different lengths, so that few batches have the same number of labels."""
    path = tmp_path_factory.mktemp("data") / f"p{os.getpid()}.jsonl"
    words, generator = "the cat sat on a mat 小猫 看 雨 and 3 + 4 = 7 今天 天气".split(), random.Random(0)

    def turn(role: str, n: int) -> dict:
        return {"role": role, "content": " ".join(generator.choices(words, k=n))}

    lines = [json.dumps({"conversations": [turn("user", 3), turn("assistant", 1 + i % 15)]}) for i in range(60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    yield path
    for cached in CACHE_DIR.glob(f"*{path.stem}-*"):
        shutil.rmtree(cached) if cached.is_dir() else cached.unlink()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, Path]:
    """Weights to begin with: dense, and a MoE whose balancing loss counts nothing."""
    folder = tmp_path_factory.mktemp("base")
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    shape |= dict(intermediate_size=96, vocab_size=load_tokenizer().get_vocab_size())
    moe = dict(num_experts=16, num_experts_per_tok=1, qk_norm=True, router_aux_loss_coef=0.0)
    torch.manual_seed(1)
    for name, more in (("dense", {}), ("moe", moe)):
        checkpoint.save(folder / f"{name}.pth", MiniMindLM(MiniMindConfig(**shape, **more)))
    return {name: folder / f"{name}.pth" for name in ("dense", "moe")}


def outcome(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The weights that a run has written, and its log."""
    [path] = folder.glob(f"{name}_64*.pth")
    rows = map(json.loads, path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines())
    return torch.load(path, weights_only=True)["model"], list(rows)


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


# ------------------------------------------------------------------------------------------------ equal to one process


def job(folder: Path, data: Path, base: dict[str, Path], name: str) -> list:
    """Flags of the run called engine-optimizer-model[-dtype]; one process gets the global batch."""
    engine, optimizer, model, *dtype = name.split("-")
    flags = [*TINY, "--data_path", data, "--steps", 4, "--from_weight", base[model], "--optimizer", optimizer]
    flags += ["--out_dir", folder, "--save_weight", name, *(flag.format(folder=folder) for flag in ENGINES[engine])]
    return (
        flags
        + ["--batch_size", 4] * (engine == "one")
        + ["--dtype", *dtype, "--val_path", data, "--val_tokens", 64] * len(dtype)
    )


def write_offload(folder: Path) -> None:
    """As the note in configs/zero2.json and zero3.json says."""
    for n in (2, 3):
        config = json.loads((ROOT / f"configs/zero{n}.json").read_text(encoding="utf-8"))
        for name in ("offload_optimizer", "offload_param")[: n - 1]:
            config["zero_optimization"][name]["device"] = "cpu"
        (folder / f"offload{n}.json").write_text(json.dumps(config), encoding="utf-8")


ONE = ("one-muon-dense", "one-adamw-dense", "one-adamw-moe", "one-adamw-dense-bf16")
TORCH = ("ddp-muon-dense", "fsdp-muon-dense", "ddp-adamw-moe", "fsdp-adamw-moe")
ZERO = ("zero1-adamw-dense", "zero2-adamw-dense", "zero3-adamw-dense", "zero2-adamw-moe", "zero3-adamw-moe")
ZERO += ("offload2-adamw-dense", "offload3-adamw-dense")
ZERO_BF16 = ("zero2-adamw-dense-bf16", "zero3-adamw-dense-bf16")


@pytest.fixture(scope="module")
def one(tmp_path_factory, data, base):
    folder = tmp_path_factory.mktemp("one")
    Group(folder, 1, *(job(folder, data, base, name) for name in ONE)).succeed()
    return folder


def two(tmp_path_factory, data, base, names) -> tuple[Path, Group]:
    folder = tmp_path_factory.mktemp("two")
    write_offload(folder)
    return folder, Group(folder, 2, *(job(folder, data, base, name) for name in names)).succeed()


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory, data, base):
    return two(tmp_path_factory, data, base, TORCH)


@pytest.fixture(scope="module")
def by_zero(tmp_path_factory, data, base):
    return two(tmp_path_factory, data, base, ZERO + ZERO_BF16)


def assert_equal_to_one_process(one: Path, folder: Path, name: str) -> None:
    """Weights to 1e-5 after steps accumulated over two batches, and what the log says of each step."""
    expected, rows = outcome(one, f"one-{name.partition('-')[2]}")
    found, log = outcome(folder, name)
    assert difference(expected, found) < 1e-5
    # torch's norm adds up in fp32, on a CPU hardly better than one by one: of a whole matrix it is 1e-4 off.
    for key, within in (("loss", 1e-5), ("grad_norm", 3e-4), ("learning_rate", 0), ("tokens", 0)):
        assert [row[key] for row in log] == pytest.approx([row[key] for row in rows], rel=within, abs=0), key


@pytest.mark.parametrize("name", TORCH)
def test_two_processes_are_one(one, by_torch, name):
    assert_equal_to_one_process(one, by_torch[0], name)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ZERO)
def test_two_processes_of_deepspeed_are_one(one, by_zero, name):
    assert_equal_to_one_process(one, by_zero[0], name)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", ZERO_BF16)
def test_bf16_of_deepspeed_is_that_of_one_process(one, by_zero, name):
    """DeepSpeed has an autocast of its own, in training alone: the first loss, in training and in validation, is that
    of ours, not of fp32; the others follow."""
    runs = [(one, "one-adamw-dense"), (one, "one-adamw-dense-bf16"), (by_zero[0], name)]
    exact, expected, found = ([row["loss"] for row in outcome(*run)[1] if "loss" in row] for run in runs)
    assert found[0] == pytest.approx(expected[0], rel=1e-6) != exact[0]
    assert found == pytest.approx(expected, rel=1e-4)
    validations = [next(row["val_loss"] for row in outcome(*run)[1] if "val_loss" in row) for run in runs[1:]]
    assert validations[1] == pytest.approx(validations[0], rel=1e-6)


@pytest.mark.slow
@needs_deepspeed
def test_the_launcher_of_deepspeed(tmp_path, data, base, by_zero):
    """Bit for bit the weights of the processes that it did not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", 2, "--master_port", port]
    command += [ROOT / "train_full_sft.py", *job(tmp_path, data, base, "zero2-adamw-dense")]
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0 and done.stderr.count("wrote ") == 1, done.stderr
    expected, found = (outcome(folder, "zero2-adamw-dense")[0] for folder in (by_zero[0], tmp_path))
    assert difference(expected, found) == 0


def test_the_comparison_is_of_what_differs_between_processes(one, by_torch):
    """Batches with different numbers of labels; experts that have no token on one process."""
    rows = [outcome(one, "one-adamw-dense")[1], outcome(by_torch[0], "ddp-adamw-moe")[1]]
    tokens = [row["tokens"] for row in rows[0]]
    assert len({b - a for a, b in itertools.pairwise([0, *tokens])}) > 1
    assert any(0 in row["expert_load"] for row in rows[1])
    ranks = [[line.split() for line in by_torch[1].rows(rank)] for rank in range(2)]
    assert not {tuple(row) for row in ranks[0]} & {tuple(row) for row in ranks[1]}


def test_gradients_are_exchanged_once_a_step(by_torch):
    """After the last batch: until then DDP has its own on each process, and FSDP2 shares none out."""
    ours, theirs = (by_torch[1].gradients(rank) for rank in range(2))
    assert len(ours) == len(theirs) == len(TORCH) * 4 * 2
    for (name, last, mine), (_, _, others) in zip(ours, theirs, strict=True):
        if name.startswith("ddp"):
            assert (mine == others) == last
        else:
            assert (mine is None) == (others is None) == (not last)


def test_one_process_speaks_and_writes(by_torch):
    folder, group = by_torch
    assert group.err(0).count("M parameters") == group.err(0).count("wrote ") == len(TORCH)
    assert "wrote" not in group.err(1) and "M parameters" not in group.err(1)
    written = [path.suffix for path in folder.iterdir() if path.stem.startswith("ddp-muon-dense")]
    assert sorted(written) == [".jsonl", ".png", ".pth"]


@pytest.mark.slow
def test_two_launchers_are_one(tmp_path, data, base, by_torch):
    """Two machines, here both on loopback, with a launcher on each: bit for bit the weights of one launcher's two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1]
    common += ["--master_addr", "127.0.0.1", "--master_port", port]
    script = [ROOT / "train_full_sft.py", *job(tmp_path, data, base, "ddp-muon-dense")]
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"OMP_NUM_THREADS": "1"}
    launchers = [
        subprocess.Popen(list(map(str, [*common, "--node_rank", rank, *script])), stderr=subprocess.PIPE, env=env)
        for rank in range(2)
    ]
    errors = [launcher.communicate(timeout=120)[1].decode() for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    assert errors[0].count("wrote ") == 1 and "wrote " not in errors[1]
    expected, found = (outcome(folder, "ddp-muon-dense")[0] for folder in (by_torch[0], tmp_path))
    assert difference(expected, found) == 0


def test_machines_must_see_the_same_files(tmp_path, data, base, by_torch):
    """A finished run that only one of the machines sees: they would wait for each other, or go apart."""
    shutil.copytree(by_torch[0], tmp_path / "seen by 0")
    flags = job(tmp_path / "seen by {rank}", data, base, "ddp-muon-dense")
    group = Group(tmp_path, 2, [*flags, "--from_resume", 1])
    assert group.wait() == [2, 2]
    for rank in range(2):
        assert "error: --from_resume 1" in group.err(rank) and "finished for process 0, none for" in group.err(rank)
        assert group.err(rank).count("\n") == 1


# ------------------------------------------------------------------------------------------------ every script

SCRIPTS = {  # the further flags, and what the weights to begin with are
    "pretrain": ("--data_path {text}", "dense"),
    "lora": ("--data_path {data}", "dense"),
    "dpo": ("--data_path {pairs} --max_seq_len 64", "dense"),
    "distill": ("--data_path {data} --teacher {base} --alpha 0.3", "moe"),
    "reason": ("--data_path {data}", "dense"),
}


@pytest.fixture(scope="module")
def by_scripts(tmp_path_factory, data, base):
    """by_scripts(engines, count) runs all scripts under these engines; the folder of their results."""
    folder = tmp_path_factory.mktemp("scripts")
    chats = [json.loads(line)["conversations"] for line in data.read_text(encoding="utf-8").splitlines()]
    rows = {
        "text": [{"text": answer["content"]} for _, answer in chats],
        "pairs": [{"chosen": [q, a], "rejected": [q, b]} for (q, a), (_, b) in zip(chats, chats[1:], strict=False)],
    }
    paths = {name: data.with_name(f"{name}-{data.name}") for name in rows}
    for name, lines in rows.items():
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def script_job(engine: str, script: str) -> list:
        more, model = SCRIPTS[script]
        flags = [f"train_{script}.py", *TINY, "--from_weight", base[model], "--steps", 3, "--optimizer", "adamw"]
        flags += more.format(data=data, base=base[model], **paths).split()
        flags += ["--out_dir", folder, "--save_weight", f"{engine}-{script}", *ENGINES[engine]]
        return flags + ["--batch_size", 4] * (engine == "one")

    def run(engines: tuple[str, ...], count: int) -> Path:
        Group(folder, count, *(script_job(engine, script) for engine in engines for script in SCRIPTS)).succeed()
        return folder

    run(("one",), 1)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("engines", [("ddp", "fsdp"), pytest.param(("zero2", "zero3"), marks=needs_deepspeed)])
def test_every_script_under_every_engine(by_scripts, engines):
    """Two processes are one, whatever is trained: LoRA's frozen weights, the reference of DPO, a teacher."""
    folder = by_scripts(engines, 2)
    for engine, script in itertools.product(engines, SCRIPTS):
        assert_equal_to_one_process(folder, folder, f"{engine}-{script}")


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, optimizer",
    [("fsdp", "muon"), *(pytest.param(f"zero{n}", "adamw", marks=needs_deepspeed) for n in (1, 3))],
)
def test_killed_and_resumed(tmp_path, data, base, engine, optimizer):
    """kill -9 of all processes: the end is that of an uninterrupted run, bit for bit."""
    flags = [*TINY, "--data_path", data, "--from_weight", base["dense"], *ENGINES[engine], "--optimizer", optimizer]
    flags += ["--steps", 16, "--save_interval", 3, "--out_dir"]
    Group(tmp_path, 2, [*flags, tmp_path / "parts"]).kill_after_a_save(tmp_path / "parts")
    # The whole run after the rest of the other, by the same two processes: their start is what takes the time.
    resumed = [*flags, tmp_path / "parts", "--from_resume", 1]
    Group(tmp_path, 2, resumed, [*flags, tmp_path / "whole"]).succeed()
    whole, parts = (outcome(tmp_path / name, "full_sft") for name in ("whole", "parts"))
    assert difference(whole[0], parts[0]) == 0
    assert [row["loss"] for row in whole[1]] == [row["loss"] for row in parts[1]]


@pytest.mark.slow
def test_other_number_of_processes(tmp_path, data, base):
    """Two processes under FSDP2 are killed and one goes on, which says what cannot be the same: the rows taken are
    those of the order, none twice, none missing, and so are the lines of the log."""
    flags = [*TINY, "--data_path", data, "--from_weight", base["dense"], "--epochs", 5, "--save_interval", 1]
    flags += ["--out_dir", tmp_path / "out"]
    before = Group(tmp_path, 2, [*flags, "--fsdp"])
    before.kill_after_a_save(tmp_path / "out")
    state = checkpoint.load_resume(tmp_path / "out" / "full_sft_64_resume")["progress"]
    after = Group(tmp_path, 1, [*flags, "--from_resume", 1]).succeed()
    assert "2 processes before, 1 now" in after.err(0)

    ranks, size = (before.rows(0), before.rows(1)), 2  # rows of a batch
    batches_taken = [ranks[rank][at : at + size] for at in range(0, len(ranks[0]), size) for rank in range(2)]
    taken = list(itertools.chain(*batches_taken))[: state["samples"]] + after.rows(0)
    rows = sft_dataset(data, load_tokenizer(), 32, quiet=True)
    order = (" ".join(map(str, batch["input_ids"][0].tolist())) for batch in batches(rows, 1, seed=42))
    assert taken == list(itertools.islice(order, len(taken)))
    assert 0 <= len(taken) - 5 * len(rows) < 2 * size

    _, log = outcome(tmp_path / "out", "full_sft")
    assert 0 < state["step"] < len(log)
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    uneven = [row["tokens"] for row in log]
    assert uneven == sorted(set(uneven))


# ------------------------------------------------------------------------------------------------ faults


def test_a_dead_process_ends_the_others(tmp_path, data, base):
    flags = [*TINY, "--data_path", data, "--from_weight", base["dense"], "--steps", 100000, "--save_interval", 3]
    group = Group(tmp_path, 2, [*flags, "--out_dir", tmp_path / "out"])
    group.wait_for_state(tmp_path / "out")
    group.processes[1].kill()
    start = time.monotonic()
    assert group.wait(30) == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 30
    assert group.err(0).endswith("error: another process of this run has ended; its own message says why. "
                                 "--from_resume 1 goes on\n")  # fmt: skip
    assert "Traceback" not in group.err(0)


ALONE = dict(zip(VARIABLES, ("0", "1", "0", "127.0.0.1", "1"), strict=True))
WRONG = {
    "no world size": ({"RANK": "0"}, [], "WORLD_SIZE"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, [], "MASTER_ADDR"),
    "rank too high": (ALONE | {"RANK": "2", "WORLD_SIZE": "2"}, [], "RANK=2"),
    "not a number": (ALONE | {"WORLD_SIZE": "two"}, [], "WORLD_SIZE=two"),
    "no launcher": ({}, ["--fsdp"], "torchrun"),
    "no such file": (ALONE, ["--deepspeed", "nowhere.json", "--optimizer", "adamw"], "nowhere.json"),
    "compiled under ZeRO 3": (
        ALONE,
        [*ENGINES["zero3"], "--compile", "1"],
        "--compile 1 does not work with --deepspeed",
    ),
    "Muon under ZeRO": (ALONE, [*ENGINES["zero2"][:2]], "--optimizer adamw"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_environment_is_one_line(tmp_path, monkeypatch, case):
    env, flags, part = WRONG[case]
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    args = arguments("pretrain", "").parse_args([*TINY, *flags, "--out_dir", str(tmp_path / "out")])
    with pytest.raises(cli.UsageError, match=part) as raised:
        trainer.setup("pretrain", args, minutes=1)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("section", ["bf16", "optimizer", "scheduler", "train_batch_size"])
def test_a_deepspeed_file_must_not_say_what_flags_say(tmp_path, section):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, section: {}}))
    args = arguments("pretrain", "").parse_args(["--deepspeed", str(path)])
    with pytest.raises(cli.UsageError, match=f"own.json: {section} is what our flags say"):
        parallel.zero_config(args)


@pytest.mark.slow
@needs_deepspeed
def test_what_deepspeed_refuses_is_one_line(tmp_path, data, base):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 2, "bucket": 5}}')
    flags = job(tmp_path, data, base, "one-adamw-dense")
    group = Group(tmp_path, 2, [*flags, "--deepspeed", tmp_path / "own.json"])
    assert group.wait() == [2, 2]
    [line] = [line for line in group.err(0).splitlines() if line.startswith("error: ")]
    assert "own.json" in line and "bucket" in line and "Traceback" not in group.err(0)


def test_processes_that_do_not_come(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (ALONE | {"WORLD_SIZE": "2", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "JOIN_SECONDS", 1)
    with pytest.raises(cli.UsageError, match=f"WORLD_SIZE=2, but not all .* 127.0.0.1:{port} within 1 s"):
        parallel.join(0, 2, torch.device("cpu"))
    assert not dist.is_initialized()
