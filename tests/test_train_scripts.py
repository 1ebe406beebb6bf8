"""The train scripts as a user runs them: whole runs, killed and resumed, wrong input, several processes, no extras."""

import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dataset.lm_dataset import CACHE_DIR
from model import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))
TINY = "--hidden_size 64 --num_hidden_layers 2 --max_seq_len 32 --batch_size 2 --compile 0 --dtype fp32 --device cpu"
TINY = f"{TINY} --log_interval 2".split()
TIMING = ("seconds", "tokens_per_second", "mfu")
ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
# A server that has imported the heavy packages forks each script: a real process, without seconds of importing.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


class Done(NamedTuple):
    code: int
    out: str
    err: str


def _in_child(argv: list[str], out_path: Path, limit: int | None) -> None:
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        descriptor = os.open(f"{out_path}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream.fileno())
    os.environ.update(ENV)
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


class Script:
    """A started script; wait() for its end."""

    def __init__(self, folder: Path, name: str, *flags, limit: int | None = None):
        self.out_path = folder / f"script{random.getrandbits(64):x}"
        argv = [str(ROOT / name), *map(str, flags)]
        self.process = CONTEXT.Process(target=_in_child, args=(argv, self.out_path, limit))
        self.process.start()

    def wait(self, timeout: float = 300) -> Done:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"still running after {timeout} s: {self.read('err')}")
        return Done(self.process.exitcode, self.read("out"), self.read("err"))

    def read(self, suffix: str) -> str:
        path = Path(f"{self.out_path}.{suffix}")
        return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.fixture(scope="module", autouse=True)
def server():
    CONTEXT.set_forkserver_preload(["torch", "datasets", "matplotlib.pyplot", "trainer.trainer", "dataset.lm_dataset"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small files of each kind; their token caches are removed afterwards."""
    folder, mark = tmp_path_factory.mktemp("data"), f"t{os.getpid()}"
    words = "the cat sat on a mat 小猫 看 雨 and 3 + 4 = 7 in the old house 今天 天气".split()
    generator = random.Random(0)

    def text(n: int) -> str:
        return " ".join(generator.choices(words, k=n))

    def chat(n: int) -> list[dict]:
        return [{"role": "user", "content": text(3)}, {"role": "assistant", "content": text(n)}]

    files = {
        "text": [json.dumps({"text": text(12)}) for _ in range(60)],
        "val": [json.dumps({"text": text(12)}) for _ in range(8)],
        "chat": [json.dumps({"conversations": chat(1 + i % 12)}) for i in range(60)],
        "chatval": [json.dumps({"conversations": chat(6)}) for i in range(6)],
        "pairs": [json.dumps({"chosen": one, "rejected": [one[0], chat(4)[1]]}) for one in map(chat, [2, 3, 5] * 20)],
        "empty": [],
        "bad": ["not json", '{"txt": 1}', '{"text": 5}'],
    }
    paths = {name: folder / f"{mark}-{name}.jsonl" for name in files}
    for name, lines in files.items():
        paths[name].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    yield paths
    for path in CACHE_DIR.glob(f"*-{mark}-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, data) -> Path:
    """An out_dir with the results of a short pretraining, dense and MoE."""
    out = tmp_path_factory.mktemp("pretrained")
    for moe in (0, 1):
        flags = ["--data_path", data["text"], "--val_path", data["val"], "--out_dir", out, "--use_moe", moe]
        done = Script(out.parent, "train_pretrain.py", *TINY, *flags, "--steps", 4).wait()
        assert done.code == 0, done.err
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same(a: Path, b: Path) -> None:
    """The weights bit for bit, the figures and the log but for what a clock measures."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    meta = [{k: v for k, v in checkpoint.load_meta(path).items() if k not in TIMING} for path in (a, b)]
    assert meta[0] == meta[1]
    assert log(a) == log(b)


def log(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def one_error(done: Done, code: int, *parts: str) -> None:
    """This exit code, and one line on stderr that begins with `error:`; other lines only report on the data."""
    assert done.code == code, done
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.err.endswith(f"{errors[0]}\n"), done.err
    assert all(str(part) in errors[0] for part in parts), errors


def shell(*argv, env: dict | None = None, cwd: Path = ROOT, timeout: float = 300) -> Done:
    """A plain subprocess, as from a terminal."""
    done = subprocess.run(
        [str(a) for a in argv], capture_output=True, text=True, cwd=cwd, timeout=timeout,
        env=os.environ | ENV | (env or {}),
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_pretrain_and_sft_from_the_shell(tmp_path, data):
    """With plain subprocesses, from another folder."""
    flags = [*TINY, "--out_dir", "out", "--steps", 6]
    files = ["--data_path", data["text"], "--val_path", data["val"]]
    done = shell(sys.executable, ROOT / "train_pretrain.py", *flags, *files, cwd=tmp_path)
    assert (done.code, done.out) == (0, ""), done.err
    files = ["--data_path", data["chat"], "--val_path", data["chatval"]]
    done = shell(sys.executable, ROOT / "train_full_sft.py", *flags, *files, cwd=tmp_path)
    assert done.code == 0, done.err
    names = [f"{stage}_64{suffix}" for stage in ("full_sft", "pretrain") for suffix in (".jsonl", ".png", ".pth")]
    assert sorted(os.listdir(tmp_path / "out")) == names
    for stage in ("pretrain", "full_sft"):
        path = tmp_path / "out" / f"{stage}_64.pth"
        model, meta = checkpoint.load(path)
        assert model.config.hidden_size == 64 and model.config.num_hidden_layers == 2
        assert (meta["stage"], meta["steps"], meta["skipped"]) == (stage, 6, 0)
        rows = log(path)
        assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
        assert rows[-1]["val_bpb"] == meta["val_bpb"] < rows[0]["val_bpb"]
        assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert f"wrote {Path('out') / 'full_sft_64.pth'}, full_sft_64.jsonl, full_sft_64.png" in done.err


@pytest.mark.slow
def test_help_is_quick():
    """Without the heavy packages: they are imported by the functions that use them."""
    heavy = {"datasets", "pyarrow", "pandas", "transformers", "matplotlib", "wandb", "peft", "trl"}
    for name in SCRIPTS:
        start = time.perf_counter()
        done = shell(sys.executable, "-X", "importtime", ROOT / name, "--help")
        seconds = time.perf_counter() - start
        assert (done.code, done.out[:6]) == (0, "usage:")
        imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.err.splitlines()}
        assert not imported & heavy, name
        assert seconds < 3 * 4, name  # under 3 s on a machine that does nothing else


# ------------------------------------------------------------------------------------------------ killed and resumed


def wait_for_step(out: Path, script: Script, step: int) -> None:
    """Until a resume state of this step or a later one is there, or the script has ended."""
    end = time.monotonic() + 120
    while script.process.is_alive() and time.monotonic() < end:
        steps = [int(path.stem.removeprefix("state_")) for path in out.glob("*_resume/state_*.pt")]
        if steps and max(steps) >= step:
            return
        time.sleep(0.002)


@pytest.mark.parametrize(
    "script, moe",
    [
        ("train_pretrain.py", 0),
        pytest.param("train_full_sft.py", 1, marks=pytest.mark.slow),
        pytest.param("train_lora.py", 0, marks=pytest.mark.slow),
        pytest.param("train_dpo.py", 0, marks=pytest.mark.slow),
        pytest.param("train_distill.py", 0, marks=pytest.mark.slow),
        pytest.param("train_reason.py", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(tmp_path, data, pretrained, script, moe):
    """kill -9 again and again, most often in the middle of a save: the end is that of a run that was left alone."""
    base = pretrained / f"pretrain_64{'_moe' if moe else ''}.pth"
    stage, files, more = {
        "train_pretrain.py": ("pretrain", ("text", "val"), []),
        "train_full_sft.py": ("full_sft", ("chat", "chatval"), ["--from_weight", base]),
        "train_lora.py": ("lora/lora_identity", ("chat", "chatval"), ["--from_weight", base, "--lora_dropout", 0.2]),
        "train_dpo.py": ("dpo", ("pairs", "pairs"), ["--from_weight", base, "--max_seq_len", 128]),
        "train_distill.py": ("distill", ("chat", "chatval"), ["--teacher", base, "--alpha", 0.3]),
        "train_reason.py": ("reason", ("chat", "chatval"), ["--from_weight", base]),
    }[script]
    files = ["--data_path", data[files[0]], "--val_path", data[files[1]]]
    flags = [*TINY, *files, "--steps", 24, "--accumulation_steps", 2, "--save_interval", 1, "--val_interval", 5]
    flags += ["--use_moe", moe, *more]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    folder, name = (parts / stage).parent, f"{Path(stage).name}_64{'_moe' if moe else ''}"
    done = Script(tmp_path, script, *flags, "--out_dir", whole).wait()
    assert done.code == 0, done.err

    generator = random.Random(f"{script}")
    killed_at = []
    for after in (0, 2, 8, 16):
        running = Script(tmp_path, script, *flags, "--out_dir", parts, "--from_resume", 1)
        wait_for_step(folder, running, after)
        time.sleep(generator.uniform(0, 0.06))
        running.process.kill()
        code = running.wait().code
        assert code in (0, -signal.SIGKILL), running.read("err")
        killed_at += [max(folder.glob("*_resume/state_*.pt"), default=Path("none")).stem] if code else []
    assert len(set(killed_at)) >= 3, "too fast to be killed: give it more steps"
    done = Script(tmp_path, script, *flags, "--out_dir", parts, "--from_resume", 1).wait()
    assert done.code == 0, done.err
    assert_same(whole / folder.relative_to(parts) / f"{name}.pth", folder / f"{name}.pth")
    assert sorted(os.listdir(folder)) == [f"{name}.jsonl", f"{name}.png", f"{name}.pth"]


@pytest.mark.slow
def test_ctrl_c_prints_the_command_that_goes_on(tmp_path, data):
    """In a folder whose name needs quotes; the printed line is executed as it stands."""
    out = tmp_path / "my out's"
    flags = [*TINY, "--data_path", data["text"], "--save_interval", 1, "--steps"]
    done = Script(tmp_path, "train_pretrain.py", *flags, 60, "--out_dir", tmp_path / "whole").wait()
    assert done.code == 0, done.err
    running = Script(tmp_path, "train_pretrain.py", *flags, 60, "--out_dir", out)
    wait_for_step(out, running, 3)
    os.kill(running.process.pid, signal.SIGINT)
    done = running.wait()
    assert done.code == 130, done
    assert "Traceback" not in done.err
    step = int(re.search(r"stopped at step (\d+), nothing is lost. Go on with:\n", done.err)[1])
    assert [path.name for path in out.glob("*/state_*")] == [f"state_{step:08d}.pt"]
    assert not list(out.glob("*.pth"))

    changed = Script(tmp_path, "train_pretrain.py", *flags, 50, "--out_dir", out, "--from_resume", 1).wait()
    one_error(changed, 2, "the interrupted run had --steps 60")
    assert [path.name for path in out.glob("*/state_*")] == [f"state_{step:08d}.pt"]

    command = done.err.splitlines()[-1].strip()
    assert command.startswith("python ") and command.endswith(" --from_resume 1")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = shell("bash", "-c", command, env={"PATH": path})
    assert done.code == 0, done.err
    assert_same(tmp_path / "whole" / "pretrain_64.pth", out / "pretrain_64.pth")


def test_resume_of_nothing_and_of_a_finished_run(tmp_path, data):
    flags = [*TINY, "--data_path", data["text"], "--steps", 4, "--out_dir", tmp_path / "out", "--from_resume", 1]
    done = Script(tmp_path, "train_pretrain.py", *flags).wait()
    assert done.code == 0 and "the run starts anew" in done.err
    path = tmp_path / "out" / "pretrain_64.pth"
    before = path.stat().st_mtime_ns, path.with_suffix(".jsonl").read_bytes()
    done = Script(tmp_path, "train_pretrain.py", *flags).wait()
    assert done.code == 0 and f"{path} is complete" in done.out
    assert before == (path.stat().st_mtime_ns, path.with_suffix(".jsonl").read_bytes())


# ------------------------------------------------------------------------------------------------ several processes


def torchrun(*flags, script: str = "train_pretrain.py") -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return [*launcher, str(ROOT / script), *map(str, flags)]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path, data):
    files = ["--data_path", data["text"], "--val_path", data["val"], "--steps", 6, "--accumulation_steps", 2]
    flags = [*TINY, *files, "--optimizer", "adamw", "--learning_rate", 1e-3]
    done = shell(*torchrun(*flags, "--out_dir", tmp_path / "two"))
    assert done.code == 0, done.err
    assert done.err.count("M parameters") == done.err.count("wrote ") == 1
    assert sorted(os.listdir(tmp_path / "two")) == ["pretrain_64.jsonl", "pretrain_64.png", "pretrain_64.pth"]
    one = Script(tmp_path, "train_pretrain.py", *flags, "--batch_size", 4, "--out_dir", tmp_path / "one").wait()
    assert one.code == 0, one.err
    two, one = tmp_path / "two" / "pretrain_64.pth", tmp_path / "one" / "pretrain_64.pth"
    ours, theirs = weights(two), weights(one)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
    assert [row["step"] for row in log(two)] == [row["step"] for row in log(one)]
    for a, b in zip(log(two), log(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
        assert a["tokens"] == b["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("moe", [0, 1])
def test_two_processes_train_one_adapter(tmp_path, data, pretrained, moe):
    """Of a MoE too, with so few tokens that the adapters of some experts have no gradient."""
    base = pretrained / f"pretrain_64{'_moe' if moe else ''}.pth"
    flags = [*TINY, "--data_path", data["chat"], "--from_weight", base, "--steps", 6, "--learning_rate", 1e-3]
    flags += ["--max_seq_len", 4, "--batch_size", 1] * moe
    done = shell(*torchrun(*flags, "--out_dir", tmp_path / "two", script="train_lora.py"))
    assert done.code == 0, done.err
    assert done.err.count("optimizer state") == done.err.count("wrote ") == 1
    two = weights(tmp_path / "two" / "lora" / f"lora_identity_64{'_moe' if moe else ''}.pth")
    assert any(w.any() for name, w in two.items() if name.endswith("lora_B"))
    if not moe:  # how evenly the experts are used is measured on each process alone
        one = Script(tmp_path, "train_lora.py", *flags, "--batch_size", 4, "--out_dir", tmp_path / "one").wait()
        assert one.code == 0, one.err
        one = weights(tmp_path / "one" / "lora" / "lora_identity_64.pth")
        assert two.keys() == one.keys()
        assert max((two[name] - one[name]).abs().max().item() for name in one) < 1e-5


@pytest.mark.slow
def test_two_processes_stop_and_go_on(tmp_path, data):
    """A MoE with so few tokens that experts stay idle; Ctrl-C reaches every process of the terminal, and torchrun
    passes it on a second time."""
    flags = [*TINY, "--data_path", data["text"], "--use_moe", 1, "--max_seq_len", 3, "--batch_size", 1]
    flags += ["--accumulation_steps", 2, "--save_interval", 5, "--steps", 150, "--out_dir"]
    done = shell(*torchrun(*flags, tmp_path / "whole"))
    assert done.code == 0, done.err
    launcher = subprocess.Popen(
        torchrun(*flags, tmp_path / "parts"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | ENV,
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(launcher.stderr))
    reader.start()
    while not list(tmp_path.glob("parts/*_resume/state_*.pt")) and launcher.poll() is None:
        time.sleep(0.01)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait(120)
    reader.join(10)
    err = "".join(lines)
    assert err.count("stopped at step") == 1, err
    assert f"torchrun --nproc_per_node 2 {ROOT / 'train_pretrain.py'}" in err
    [state] = tmp_path.glob("parts/*_resume/state_*.pt")
    assert 5 <= int(state.stem.removeprefix("state_")) < 150
    done = shell(*torchrun(*flags, tmp_path / "parts", "--from_resume", 1))
    assert done.code == 0, done.err
    assert_same(tmp_path / "whole" / "pretrain_64_moe.pth", tmp_path / "parts" / "pretrain_64_moe.pth")


# ------------------------------------------------------------------------------------------------ wrong input


WRONG = {
    "no such file": ("pretrain", "--data_path nowhere.jsonl", 1, "nowhere.jsonl"),
    "empty file": ("pretrain", "--data_path {empty}", 1, "empty"),
    "no good line": ("pretrain", "--data_path {bad}", 1, "{bad}"),
    "a folder": ("pretrain", "--data_path {folder}", 1, "{folder}"),
    "validation file": ("pretrain", "--data_path {text} --val_path nowhere.jsonl", 1, "nowhere.jsonl"),
    "text for SFT": ("full_sft", "--data_path {text} --from_weight {weight}", 1, "{text}"),
    "weights absent": ("full_sft", "--data_path {chat}", 1, "pretrain_SIZE.pth does not exist"),
    "weights damaged": ("full_sft", "--data_path {chat} --from_weight {text}", 1, "{text}"),
    "preset of another shape": ("full_sft", "--data_path {chat} --from_weight {weight} --preset small", 2, "--preset"),
    "other size": ("full_sft", "--data_path {chat} --from_weight {weight} --hidden_size 32", 2, "--hidden_size"),
    "other depth": ("full_sft", "--data_path {chat} --from_weight {weight} --num_hidden_layers 3", 2, "num_hidden_la"),
    "not a MoE": ("full_sft", "--data_path {chat} --from_weight {weight} --use_moe 1", 2, "--use_moe"),
    "adapter of nothing": ("lora", "--data_path {chat} --from_weight none", 2, "--from_weight none"),
    "adapter's file": ("lora", "--data_path {chat} --from_weight {weight} --lora_name a/b", 2, "--lora_name a/b"),
    "adapter's rank": ("lora", "--data_path {chat} --from_weight {weight} --lora_rank 0", 2, "--lora_rank 0"),
    "adapter's layers": ("lora", "--data_path {chat} --from_weight {weight} --lora_targets wq", 2, "--lora_targets"),
    "odd size": ("pretrain", "--data_path {text} --hidden_size 66", 2, "hidden_size 66"),
    "device unknown": ("pretrain", "--data_path {text} --device gpu7", 2, "--device gpu7"),
    "device absent": ("pretrain", "--data_path {text} --device xpu", 2, "--device xpu"),
    "batch of none": ("pretrain", "--data_path {text} --batch_size 0", 2, "--batch_size 0"),
    "row too short": ("pretrain", "--data_path {text} --max_seq_len 1", 1, "seq_len 1"),
    "out_dir is a file": ("pretrain", "--data_path {text} --out_dir {text}", 2, "--out_dir"),
    "out_dir not writable": ("pretrain", "--data_path {text} --out_dir {locked}", 2, "--out_dir"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(tmp_path, data, pretrained, case):
    stage, flags, code, part = WRONG[case]
    locked = tmp_path / "locked"
    locked.mkdir(0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere, but not here
        locked = "/proc/out"
    names = data | {"folder": tmp_path, "weight": pretrained / "pretrain_64.pth", "locked": locked}
    flags, part = [flag.format(**names) for flag in flags.split()], part.format(**names)
    out = tmp_path / "out"
    tiny = TINY if stage == "pretrain" else TINY[4:]  # the weights know their shape
    done = Script(tmp_path, f"train_{stage}.py", *tiny, "--out_dir", out, *flags, "--steps", 2).wait()
    one_error(done, code, part)
    assert done.out == ""
    if case not in ("no good line", "text for SFT", "validation file"):  # there, the report on the lines comes before
        assert done.err.count("\n") == 1, done.err
    assert not [path for path in out.rglob("*") if path.is_file()]


COMMAND_LINES = [
    "train_pretrain.py", "train_tokenizer.py", "eval_model.py", "scripts/inspect_data.py", "scripts/ask_teacher.py",
    "scripts/lifecycle.py", "scripts/benchmark.py",
]  # fmt: skip


@pytest.mark.parametrize("script", COMMAND_LINES)
def test_unknown_flag(tmp_path, script):
    needed = {"scripts/inspect_data.py": ["FILE"], "scripts/benchmark.py": ["train"]}
    needed["scripts/ask_teacher.py"] = ["--teacher", "a", "--prompts", "b", "--out", "c"]
    done = Script(tmp_path, script, *needed.get(script, []), "--nonsense", 1).wait()
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: unrecognized arguments: --nonsense 1; --help lists what there is\n"


def test_a_slip_is_told_the_flag_that_was_meant(tmp_path):
    done = Script(tmp_path, "train_pretrain.py", "--learningrate=1").wait()
    assert done.err.startswith("error: unrecognized arguments: --learningrate=1 (did you mean --learning_rate?)")


def test_full_disk(tmp_path, data, pretrained):
    """A limit on the size of files stops the writing of the weights: those of an earlier run are kept."""
    out = tmp_path / "out"
    shutil.copytree(pretrained, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.pth")}
    flags = [*TINY, "--data_path", data["text"], "--out_dir", out, "--steps", 3, "--save_interval", 2]
    done = Script(tmp_path, "train_pretrain.py", *flags, limit=500_000).wait()
    one_error(done, 1, "cannot write", "pretrain_64.pth", "free some space")
    assert done.err.count("warning: cannot write") == 1
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before
    assert not list(out.rglob("*.tmp"))
    assert Script(tmp_path, "train_pretrain.py", *flags).wait().code == 0
    assert (out / "pretrain_64.pth").read_bytes() != before["pretrain_64.pth"]


def test_disk_too_full_for_the_log(tmp_path, data, pretrained):
    """The log is not worth the run, but the reader is told."""
    out = tmp_path / "out"
    shutil.copytree(pretrained, out)
    before = (out / "pretrain_64.pth").read_bytes()
    flags = [*TINY, "--data_path", data["text"], "--out_dir", out, "--steps", 25, "--log_interval", 1]
    done = Script(tmp_path, "train_pretrain.py", *flags, limit=3000).wait()
    one_error(done, 1, "cannot write", "pretrain_64.pth")
    assert done.err.count("warning: cannot write") == 1 and "pretrain_64.jsonl" in done.err
    assert (out / "pretrain_64.pth").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for three states."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, running: Script) -> None:
    """Take all space there is, and what the run frees as it removes the half of a state that it could not write."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        while running.process.is_alive():
            try:
                filler.write(bytes(4096))
            except OSError:
                time.sleep(0.001)


def make_read_only(disk: Path, running: Script) -> None:
    command = ["mount", "-o", "remount,ro", disk]
    while subprocess.run(command, capture_output=True).returncode and running.process.is_alive():
        pass  # busy: a file is open for writing


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False], ids=["full", "read-only"])
def test_a_disk_that_fails_in_the_middle_of_a_run(tmp_path, data, small_disk, full):
    """The last good state survives and is spoken of, and leads to the same end once the disk is usable again."""
    flags = [*TINY, "--data_path", data["text"], "--steps", 100, "--save_interval", 5, "--out_dir"]
    assert Script(tmp_path, "train_pretrain.py", *flags, tmp_path / "whole").wait().code == 0
    out = small_disk / "out"
    running = Script(tmp_path, "train_pretrain.py", *flags, out)
    wait_for_step(out, running, 5)
    (fill if full else make_read_only)(small_disk, running)
    done = running.wait()
    one_error(done, 1, f"cannot write {out / 'pretrain_64.pth'}: ", "--from_resume 1 goes on from the state of step ")
    [state] = out.rglob("*.pt")
    step = int(state.stem.removeprefix("state_"))
    assert 5 <= step < 100 and done.err.endswith(f"step {step}\n")
    assert f"warning: cannot write {state.with_name(f'state_{step + 5:08d}.pt')}: " in done.err
    assert "what was saved before is kept" in done.err

    still = Script(tmp_path, "train_pretrain.py", *flags, out, "--from_resume", 1).wait()
    one_error(still, 1 if full else 2, out, "free some space" if full else "cannot be written to")
    if full:
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    done = Script(tmp_path, "train_pretrain.py", *flags, out, "--from_resume", 1).wait()
    assert done.code == 0, done.err
    assert_same(tmp_path / "whole" / "pretrain_64.pth", out / "pretrain_64.pth")
    assert sorted(os.listdir(out)) == ["pretrain_64.jsonl", "pretrain_64.png", "pretrain_64.pth"]


# ------------------------------------------------------------------------------------------------ optional packages


@pytest.mark.slow
def test_without_optional_packages(tmp_path, data):
    shim = tmp_path / "shim"
    shim.mkdir()
    for name in ("wandb", "peft", "trl", "deepspeed", "matplotlib", "transformers"):
        (shim / f"{name}.py").write_text(f'raise ImportError("no {name}")\n')
    flags = [*TINY, "--data_path", data["text"], "--steps", 3, "--out_dir", tmp_path / "out"]
    command = [sys.executable, ROOT / "train_pretrain.py", *flags]
    done = shell(*command, env={"PYTHONPATH": str(shim)})
    assert done.code == 0, done.err
    assert sorted(os.listdir(tmp_path / "out")) == ["pretrain_64.jsonl", "pretrain_64.pth"]
    assert ".png" not in done.err
    before = (tmp_path / "out" / "pretrain_64.jsonl").read_bytes()
    done = shell(*command, "--use_wandb", env={"PYTHONPATH": str(shim)})
    one_error(done, 2, "--use_wandb", "pip install wandb")
    assert (tmp_path / "out" / "pretrain_64.jsonl").read_bytes() == before


def test_adapter_from_start_to_answer(tmp_path, data, pretrained):
    """Trained, again finished with --from_resume, used by eval_model.py, and refused by it for another base."""
    base, out = pretrained / "pretrain_64.pth", tmp_path / "out"
    flags = [*TINY, "--data_path", data["chat"], "--val_path", data["chatval"], "--from_weight", base, "--steps", 4]
    done = Script(tmp_path, "train_lora.py", *flags, "--out_dir", out, "--lora_rank", 4).wait()
    assert done.code == 0, done.err
    trained, state, full = re.search(
        r"training ([\d,]+) .* state ([\d.]+) MB instead of the ([\d.]+) MB", done.err
    ).groups()
    path = out / "lora" / "lora_identity_64.pth"
    assert int(trained.replace(",", "")) == sum(w.numel() for w in weights(path).values())
    assert float(state) == pytest.approx(8e-6 * int(trained.replace(",", "")), abs=0.005)
    assert float(full) == pytest.approx(8e-6 * sum(w.numel() for w in weights(base).values()), abs=0.005)
    assert sorted(os.listdir(out)) == ["lora"] and path.stat().st_size < base.stat().st_size / 5
    assert checkpoint.load_meta(path)["steps"] == 4
    done = Script(tmp_path, "train_lora.py", *flags, "--out_dir", out, "--lora_rank", 4, "--from_resume", 1).wait()
    assert done.code == 0 and f"{path} is complete" in done.out

    ask = ["--out_dir", out, "--ask", "cat", "--max_new_tokens", 4, "--temperature", 0, "--device", "cpu"]
    plain = Script(tmp_path, "eval_model.py", *ask, "--weight", base).wait()
    done = Script(tmp_path, "eval_model.py", *ask, "--weight", base, "--lora_name", "lora_identity").wait()
    assert plain.code == done.code == 0, done.err
    other = tmp_path / "other.pth"
    model, meta = checkpoint.load(base)
    with torch.no_grad():
        model.model.norm.weight += 0.1
    checkpoint.save(other, model, meta)
    done = Script(tmp_path, "eval_model.py", *ask, "--weight", other, "--lora_name", "lora_identity").wait()
    one_error(done, 1, path, "other weights", base, other)


def test_adapter_without_data(tmp_path, pretrained):
    flags = [*TINY, "--from_weight", pretrained / "pretrain_64.pth", "--steps", 1, "--out_dir", tmp_path / "out"]
    done = Script(tmp_path, "train_lora.py", *flags, "--lora_name", "mine").wait()
    one_error(done, 2, "--lora_name mine", "lora_identity, lora_medical", "--data_path")


@pytest.mark.slow
def test_wandb_offline(tmp_path, data):
    pytest.importorskip("wandb", reason="wandb is optional: pip install wandb")
    flags = [*TINY, "--data_path", data["text"], "--steps", 3, "--out_dir", tmp_path / "out", "--use_wandb"]
    done = shell(sys.executable, ROOT / "train_pretrain.py", *flags, cwd=tmp_path)
    assert done.code == 0, done.err
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert os.listdir(tmp_path) == ["out"]
