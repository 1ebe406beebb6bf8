"""Train scripts as processes of their own, without seconds of importing: a server that has imported the heavy packages
forks them. All else is as from the shell.

done = Script(folder, ["train_pretrain.py", "--steps", 3]).wait()       # done.code, done.out, done.err
pair = Script(folder, job, other_job, count=2)                          # two processes, as a launcher starts them
pair.wait_for_state(out_dir); pair.kill()
"""

import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from dataset.chat import load_tokenizer
from model import checkpoint
from model.model import MiniMindConfig, MiniMindLM

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
CLOCK = (
    "seconds",
    "tokens_per_second",
    "mfu",
    "rollout_seconds",
    "training_seconds",
)  # what a clock measures, and no two runs have in common
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(
        ["torch", "torch._dynamo", "datasets", "matplotlib.pyplot", "trainer.run", "dataset.lm_dataset", __name__]
    )


# ------------------------------------------------------------------------------------------------ processes


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Script:
    """Jobs, each a script and its flags, that `count` processes of a group run one after the other; {rank} in a flag is
    the number of the process.

    missing: packages that cannot be imported. clocks_apart: the clock of process 1 runs 1000 times as fast."""

    def __init__(
        self,
        folder: Path,
        *jobs: list,
        count: int = 1,
        file_limit: int | None = None,
        missing: Iterable[str] = (),
        clocks_apart: bool = False,
    ):
        self.paths = [folder / f"script{random.getrandbits(64):x}" for _ in range(count)]
        self.processes, port = [], free_port()
        for rank, path in enumerate(self.paths):
            argvs = [[str(part).replace("{rank}", str(rank)) for part in (ROOT / job[0], *job[1:])] for job in jobs]
            values = (rank, count, rank, "127.0.0.1", port)
            env = dict(zip(VARIABLES, map(str, values), strict=True)) if count > 1 else {}
            env |= {name: os.environ[name] for name in ("MINIMIND_CACHE",) if name in os.environ}
            clock = 1000**rank if clocks_apart else 1
            args = (argvs, env, path, file_limit, tuple(missing), clock)
            self.processes.append(CONTEXT.Process(target=_run_jobs, args=args))
            self.processes[-1].start()

    def alive(self) -> bool:
        return self.processes[0].is_alive()

    def kill(self) -> "Script":
        """SIGKILL to all processes."""
        for process in self.processes:
            process.kill()
        self.codes()
        return self

    def codes(self, timeout: float = 250) -> list[int]:
        """The exit status of each process, after its end."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hung = [process for process in self.processes if process.exitcode is None]
        for process in hung:
            process.kill()
        assert not hung, f"still running after {timeout} s: {self.err()}"
        return [process.exitcode for process in self.processes]

    def wait(self) -> Done:
        """The end of the first process, after that of all."""
        return Done(self.codes()[0], self.out(), self.err())

    def succeed(self) -> "Script":
        assert set(self.codes()) == {0}, [self.err(rank) for rank in range(len(self.paths))]
        return self

    def out(self, rank: int = 0) -> str:
        return _read(f"{self.paths[rank]}.out")

    def err(self, rank: int = 0) -> str:
        return _read(f"{self.paths[rank]}.err")

    def wait_for_state(self, folder: Path, step: int = 0) -> None:
        """Until a resume state of this step or a later one is there, or the script has ended."""
        end = time.monotonic() + 120
        while self.alive() and not any(state_step(path) >= step for path in files_in(folder)):
            assert time.monotonic() < end, self.err()
            time.sleep(0.002)


class Absent:
    """Finds that these packages are not installed."""

    def __init__(self, packages: Iterable[str]):
        self.packages = set(packages)

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _run_jobs(argvs, env, path, file_limit, missing, clock) -> None:
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{path}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(ENV | env)
    torch.set_num_threads(1)
    sys.meta_path.insert(0, Absent(missing))
    if file_limit:
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    part = _replace(clock)
    for argv in argvs:
        sys.argv = argv
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    if dist.is_initialized():
        part()


def _replace(clock: int) -> Callable[[], None]:
    """All that is not as from the shell: the peak, a figure of the log that takes a second to measure; the clock; and
    that the processes meet once for all jobs, and part when the function is called that is returned: DeepSpeed knows
    of one group only."""
    from trainer import run

    run.matmul_peak = lambda device, dtype: 1e11
    if clock != 1:
        now = time.perf_counter
        time.perf_counter = lambda: clock * now()
    rendezvous, part = dist.rendezvous, dist.destroy_process_group
    dist.rendezvous = cache(lambda *args, **options: [next(rendezvous(*args, **options))])
    dist.init_process_group = cache(dist.init_process_group)
    dist.destroy_process_group = lambda: None
    return part


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def one_error(done: Done, code: int, *parts: object) -> None:
    """This exit status, and one line on stderr, the last, that begins with `error:` and names these flags, files and
    places; lines before it only report on the data."""
    assert done.code == code, done
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.err.endswith(f"{errors[0]}\n"), done.err
    assert all(str(part) in errors[0] for part in parts), errors


# ------------------------------------------------------------------------------------------------ what they start from


@contextmanager
def small_data(folder: Path) -> Iterator[dict[str, Path]]:
    """Files of each kind, in which hardly two lines are alike or have as many tokens, and two faulty ones. Their token
    caches are beside them."""
    generator, words = random.Random(0), "the cat sat on a mat 小猫 看 雨 and 3 + 4 = 7 in old house 今天 天气".split()

    def text(n: int) -> str:
        return " ".join(generator.choices(words, k=n))

    def chat(n: int) -> list[dict]:
        return [{"role": "user", "content": text(3)}, {"role": "assistant", "content": text(n)}]

    rows = {
        "text": [{"text": text(12)} for _ in range(60)],
        "textval": [{"text": text(12)} for _ in range(8)],
        "chat": [{"conversations": chat(1 + i % 15)} for i in range(60)],
        "chatval": [{"conversations": chat(6)} for _ in range(6)],
        "pairs": [{"chosen": one, "rejected": [one[0], chat(4)[1]]} for one in map(chat, [2, 3, 5] * 20)],
    }
    texts = {name: "".join(json.dumps(line) + "\n" for line in lines) for name, lines in rows.items()}
    texts |= {"empty": "", "bad": 'not json\n{"txt": 1}\n{"text": 5}\n'}
    paths = {name: folder / f"{name}.jsonl" for name in texts}
    for name, text_of in texts.items():
        paths[name].write_text(text_of, encoding="utf-8")
    with mock.patch.dict(os.environ, MINIMIND_CACHE=str(folder / "cache")):
        yield paths


def small_weights(folder: Path) -> dict[str, Path]:
    """Weights to begin with: dense, and a MoE whose balancing loss counts nothing. Their meta says nothing of how they
    were made, as that of old weights."""
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    shape |= dict(intermediate_size=96, vocab_size=load_tokenizer().get_vocab_size())
    moe = dict(num_experts=16, num_experts_per_tok=1, qk_norm=True, router_aux_loss_coef=0.0)
    torch.manual_seed(1)
    for name, more in (("dense", {}), ("moe", moe)):
        checkpoint.save(folder / f"{name}.pth", MiniMindLM(MiniMindConfig(**shape, **more)), {"stage": name})
    return {name: folder / f"{name}.pth" for name in ("dense", "moe")}


# ------------------------------------------------------------------------------------------------ what they leave


def files_in(folder: Path) -> list[Path]:
    """Those that are there; unlike rglob, it does not mind folders that a running process is just removing."""
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def state_step(path: Path) -> int:
    """The step of a resume state; -1 for another file."""
    return int(path.stem.removeprefix("state_")) if path.match("*_resume/state_*.pt") else -1


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def log(path: Path) -> list[dict]:
    """The metrics log beside these weights, but for what a clock measures."""
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def largest_difference(a: Path, b: Path) -> float:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def assert_same(a: Path, b: Path) -> None:
    """Two finished runs: the weights bit for bit, the figures and the log but for what a clock measures."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    ours, theirs = ({k: v for k, v in checkpoint.load_meta(p).items() if k not in CLOCK} for p in (a, b))
    assert ours == theirs
    assert log(a) == log(b)
