"""The train scripts as a user runs them: whole runs, stopped and resumed, wrong input, full disks, no extras."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from model import checkpoint
from tests.processes import (
    ENV,
    ROOT,
    Done,
    Script,
    assert_same,
    files_in,
    free_port,
    log,
    one_error,
    small_data,
    small_weights,
    state_step,
    weights,
)  # fmt: skip
from trainer.run import STATE_VERSION

SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))
TINY = "--max_seq_len 32 --batch_size 2 --compile 0 --dtype fp32 --device cpu --log_interval 2".split()
SHAPE = "--hidden_size 64 --num_hidden_layers 2".split()
OPTIONAL = ("wandb", "peft", "trl", "deepspeed", "matplotlib", "transformers")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with small_data(tmp_path_factory.mktemp("data")) as paths:
        yield paths


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return small_weights(tmp_path_factory.mktemp("base"))["dense"]


@pytest.fixture
def pretrain(tmp_path, data):
    """pretrain(*flags, **options): a started pretraining of a small model."""

    def start(*flags, **options) -> Script:
        return Script(tmp_path, ["train_pretrain.py", *TINY, *SHAPE, "--data_path", data["text"], *flags], **options)

    return start


def shell(*argv, env: dict | None = None, cwd: Path = ROOT) -> Done:
    """A plain subprocess, as from a terminal."""
    argv, env = [str(a) for a in argv], os.environ | ENV | (env or {})
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=300, env=env)
    return Done(done.returncode, done.stdout, done.stderr)


def states(out: Path) -> list[int]:
    """The steps of the resume states."""
    return [step for step in map(state_step, files_in(out)) if step >= 0]


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_from_the_shell_without_optional_packages(tmp_path, data):
    """With a plain subprocess, from another folder; without matplotlib there is no curve."""
    shim = tmp_path / "shim"
    shim.mkdir()
    for name in OPTIONAL:
        (shim / f"{name}.py").write_text(f'raise ImportError("no {name}")\n')
    flags = [*TINY, *SHAPE, "--data_path", data["text"], "--steps", 3, "--out_dir", "out"]
    done = shell(sys.executable, ROOT / "train_pretrain.py", *flags, env={"PYTHONPATH": str(shim)}, cwd=tmp_path)
    assert (done.code, done.out) == (0, ""), done.err
    assert sorted(os.listdir(tmp_path / "out")) == ["pretrain_64.jsonl", "pretrain_64.pth", "pretrain_64.run.json"]


def test_pretraining_then_sft(tmp_path, data):
    """What they leave: weights, log and curve."""
    jobs = []
    for stage, kind in (("pretrain", "text"), ("full_sft", "chat")):
        files = ["--data_path", data[kind], "--val_path", data[f"{kind}val"], "--out_dir", tmp_path / "out"]
        jobs.append([f"train_{stage}.py", *TINY, *SHAPE, *files, "--steps", 6])
    done = Script(tmp_path, *jobs).wait()
    assert (done.code, done.out) == (0, ""), done.err
    stages = ("full_sft", "pretrain")
    names = [f"{stage}_64{suffix}" for stage in stages for suffix in (".jsonl", ".png", ".pth", ".run.json")]
    assert sorted(os.listdir(tmp_path / "out")) == names
    for stage in stages:
        path = tmp_path / "out" / f"{stage}_64.pth"
        model, meta = checkpoint.load(path)
        assert model.config.hidden_size == 64 and model.config.num_hidden_layers == 2
        assert (meta["stage"], meta["steps"], meta["skipped"]) == (stage, 6, 0)
        rows = log(path)
        assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
        assert rows[-1]["val_bpb"] == meta["val_bpb"] < rows[0]["val_bpb"]
        assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        assert str(path) in done.err


def test_help_waits_for_no_heavy_package():
    """They are imported by the functions that use them."""
    code = f"""
import runpy, sys
for script in {SCRIPTS}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code
print("modules:", *sys.modules)
"""
    done = shell(sys.executable, "-c", code)
    text, _, modules = done.out.partition("modules:")
    assert done.code == 0 and text.count("usage:") == len(SCRIPTS), done.err
    heavy = {"datasets", "pyarrow", "pandas", "transformers", "matplotlib", "wandb", "peft", "trl", "deepspeed"}
    assert not heavy & set(modules.split())


def test_without_wandb(tmp_path, pretrain):
    """The log of an earlier run stays as it was."""
    earlier = tmp_path / "out" / "pretrain_64.jsonl"
    earlier.parent.mkdir()
    earlier.write_text('{"step": 1}\n')
    done = pretrain("--steps", 3, "--out_dir", tmp_path / "out", "--use_wandb", missing=["wandb"]).wait()
    one_error(done, 2, "--use_wandb", "pip install wandb")
    assert earlier.read_text() == '{"step": 1}\n'


@pytest.mark.slow
def test_wandb_offline(tmp_path, data):
    pytest.importorskip("wandb", reason="wandb is optional: pip install wandb")
    flags = [*TINY, *SHAPE, "--data_path", data["text"], "--steps", 3, "--out_dir", tmp_path / "out", "--use_wandb"]
    done = shell(sys.executable, ROOT / "train_pretrain.py", *flags, cwd=tmp_path)
    assert done.code == 0, done.err
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert os.listdir(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------ stopped and resumed


@pytest.mark.slow
def test_ctrl_c_prints_the_command_that_goes_on(tmp_path, pretrain):
    """In a folder whose name needs quotes; the printed line is executed as it stands. Other flags are refused."""
    out = tmp_path / "my out's"
    flags = ["--save_interval", 1, "--out_dir"]
    pretrain("--steps", 40, *flags, tmp_path / "whole").succeed()
    running = pretrain("--steps", 40, *flags, out)
    running.wait_for_state(out, 3)
    os.kill(running.processes[0].pid, signal.SIGINT)
    done = running.wait()
    assert done.code == 130 and "Traceback" not in done.err
    [step] = states(out)
    assert 3 <= step < 40 and f"step {step}" in done.err and not list(out.glob("*.pth"))

    changed = pretrain("--steps", 50, *flags, out, "--from_resume", 1).wait()
    one_error(changed, 2, "--from_resume", "--steps 40")
    assert states(out) == [step]

    command = done.err.splitlines()[-1].strip()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = shell("bash", "-c", command, env={"PATH": path})
    assert done.code == 0, done.err
    assert_same(tmp_path / "whole" / "pretrain_64.pth", out / "pretrain_64.pth")


@pytest.mark.slow
def test_torchrun_stops_and_goes_on(tmp_path, data):
    """A MoE with so few tokens that experts stay idle; Ctrl-C reaches every process of the terminal, and torchrun
    passes it on a second time."""
    flags = [*TINY, *SHAPE, "--data_path", data["text"], "--use_moe", 1, "--max_seq_len", 3, "--batch_size", 1]
    flags += ["--accumulation_steps", 2, "--save_interval", 5, "--steps", 30, "--out_dir"]
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port]
    command = [str(part) for part in (*command, ROOT / "train_pretrain.py", *flags, tmp_path / "parts")]
    launcher = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | ENV
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(launcher.stderr))
    reader.start()
    while not states(tmp_path / "parts") and launcher.poll() is None:
        time.sleep(0.01)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait(120)
    reader.join(10)
    [step] = states(tmp_path / "parts")
    said = [line for line in lines if f"torchrun --nproc_per_node 2 {ROOT / 'train_pretrain.py'}" in line]
    assert 5 <= step < 30 and len(said) == 1, lines
    jobs = [[*flags, tmp_path / "parts", "--from_resume", 1], [*flags, tmp_path / "whole"]]
    Script(tmp_path, *(["train_pretrain.py", *job] for job in jobs), count=2).succeed()
    assert_same(*(tmp_path / name / "pretrain_64_moe.pth" for name in ("whole", "parts")))


def test_resume_of_nothing_and_of_a_finished_run(tmp_path, pretrain, base):
    """Old weights of the same name, which do not say how they were made, do not count as finished."""
    out = tmp_path / "out"
    path = out / "pretrain_64.pth"
    out.mkdir()
    shutil.copy(base, path)
    pretrain("--steps", 4, "--out_dir", out, "--from_resume", 1).succeed()
    assert checkpoint.load_meta(path)["steps"] == 4
    before = path.stat().st_mtime_ns, path.with_suffix(".jsonl").read_bytes()
    done = pretrain("--steps", 4, "--out_dir", out, "--from_resume", 1).wait()
    assert done.code == 0 and str(path) in done.out
    assert before == (path.stat().st_mtime_ns, path.with_suffix(".jsonl").read_bytes())


@pytest.mark.parametrize("version", [{}, {"version": STATE_VERSION + 1}], ids=["none", "newer"])
def test_state_of_another_version_is_refused(tmp_path, pretrain, version):
    """States of old had no version; the state stays."""
    folder = tmp_path / "out" / "pretrain_64_resume"
    checkpoint.save_resume(folder, {"model": {}, "progress": {"step": 3}, "arguments": {}} | version, 3)
    done = pretrain("--steps", 4, "--out_dir", tmp_path / "out", "--from_resume", 1).wait()
    one_error(done, 2, "--from_resume 1", folder)
    assert states(tmp_path) == [3] and not list(tmp_path.rglob("*.jsonl"))


# ------------------------------------------------------------------------------------------------ wrong input


WRONG = {
    "no such file": ("pretrain", "--data_path nowhere.jsonl", 1, "nowhere.jsonl"),
    "empty file": ("pretrain", "--data_path {empty}", 1, "{empty}"),
    "no good line": ("pretrain", "--data_path {bad}", 1, "{bad}"),
    "a folder": ("pretrain", "--data_path {folder}", 1, "{folder}"),
    "validation file": ("pretrain", "--data_path {text} --val_path nowhere.jsonl", 1, "nowhere.jsonl"),
    "text for SFT": ("full_sft", "--data_path {text} --from_weight {weight}", 1, "{text}"),
    "weights absent": ("full_sft", "--data_path {chat}", 1, "{out}/pretrain_"),
    "weights damaged": ("full_sft", "--data_path {chat} --from_weight {text}", 1, "{text}"),
    "preset of another shape": ("full_sft", "--data_path {chat} --from_weight {weight} --preset small", 2, "--preset"),
    "other size": ("full_sft", "--data_path {chat} --from_weight {weight} --hidden_size 32", 2, "--hidden_size"),
    "other depth": ("full_sft", "--data_path {chat} --from_weight {weight} --num_hidden_layers 3", 2, "num_hidden_la"),
    "not a MoE": ("full_sft", "--data_path {chat} --from_weight {weight} --use_moe 1", 2, "--use_moe"),
    "adapter of nothing": ("lora", "--data_path {chat} --from_weight none", 2, "--from_weight none"),
    "adapter's file": ("lora", "--data_path {chat} --from_weight {weight} --lora_name a/b", 2, "--lora_name a/b"),
    "adapter's rank": ("lora", "--data_path {chat} --from_weight {weight} --lora_rank 0", 2, "--lora_rank 0"),
    "adapter's layers": ("lora", "--data_path {chat} --from_weight {weight} --lora_targets wq", 2, "--lora_targets"),
    "adapter without data": ("lora", "--from_weight {weight} --lora_name mine", 2, "--data_path"),
    "odd size": ("pretrain", "--data_path {text} --hidden_size 66", 2, "hidden_size 66"),
    "device unknown": ("pretrain", "--data_path {text} --device gpu7", 2, "--device gpu7"),
    "device absent": ("pretrain", "--data_path {text} --device xpu", 2, "--device xpu"),
    "batch of none": ("pretrain", "--data_path {text} --batch_size 0", 2, "--batch_size 0"),
    "row too short": ("pretrain", "--data_path {text} --max_seq_len 1", 1, "seq_len 1"),
    "out_dir is a file": ("pretrain", "--data_path {text} --out_dir {text}", 2, "--out_dir"),
    "out_dir not writable": ("pretrain", "--data_path {text} --out_dir {locked}", 2, "--out_dir"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(tmp_path, data, base, case):
    stage, flags, code, part = WRONG[case]
    locked, out = tmp_path / "locked", tmp_path / "out"
    locked.mkdir(0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere, but not here
        locked = "/proc/out"
    names = data | {"folder": tmp_path, "weight": base, "locked": locked, "out": out}
    flags, part = [flag.format(**names) for flag in flags.split()], part.format(**names)
    shape = SHAPE if stage == "pretrain" else []  # the weights know theirs
    done = Script(tmp_path, [f"train_{stage}.py", *TINY, *shape, "--out_dir", out, *flags, "--steps", 2]).wait()
    one_error(done, code, part)
    assert done.out == ""
    reports = ("no good line", "text for SFT", "validation file", "adapter without data")
    assert case in reports or done.err.count("\n") == 1, done.err  # there, what was found before comes first
    assert not files_in(out)


COMMAND_LINES = [
    "train_pretrain.py", "train_tokenizer.py", "eval_model.py", "scripts/inspect_data.py", "scripts/ask_teacher.py",
    "scripts/lifecycle.py", "scripts/benchmark.py",
]  # fmt: skip


@pytest.mark.parametrize("script", COMMAND_LINES)
def test_unknown_flag(tmp_path, script):
    needed = {"scripts/inspect_data.py": ["FILE"], "scripts/benchmark.py": ["train"]}
    needed["scripts/ask_teacher.py"] = ["--teacher", "a", "--prompts", "b", "--out", "c"]
    done = Script(tmp_path, [script, *needed.get(script, []), "--nonsense", 1]).wait()
    one_error(done, 2, "--nonsense")
    assert done.out == ""


def test_a_slip_is_told_the_flag_that_was_meant(tmp_path):
    done = Script(tmp_path, ["train_pretrain.py", "--learningrate=1"]).wait()
    one_error(done, 2, "--learningrate=1", "--learning_rate")


# ------------------------------------------------------------------------------------------------ full disks


def warnings(done: Done) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("warning: ")]


@pytest.mark.posix
def test_full_disk(tmp_path, pretrain, base):
    """A limit on the size of files stops the writing of the weights: those of an earlier run are kept."""
    out = tmp_path / "out"
    path = out / "pretrain_64.pth"
    out.mkdir()
    shutil.copy(base, path)
    flags = ["--out_dir", out, "--steps", 3, "--save_interval", 2]
    done = pretrain(*flags, file_limit=500_000).wait()
    one_error(done, 1, path)
    assert len(warnings(done)) == 1
    assert path.read_bytes() == base.read_bytes()
    assert not list(out.rglob("*.tmp"))
    pretrain(*flags).succeed()
    assert path.read_bytes() != base.read_bytes()


@pytest.mark.posix
def test_disk_too_full_for_the_log(tmp_path, pretrain, base):
    """The log is not worth the run, but the reader is told."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(base, out / "pretrain_64.pth")
    done = pretrain("--out_dir", out, "--steps", 25, "--log_interval", 1, file_limit=3000).wait()
    one_error(done, 1, out / "pretrain_64.pth")
    told = warnings(done)
    names = ("pretrain_64.jsonl", "pretrain_64.run.json")
    assert len(told) == 2 and all(any(name in line for line in told) for name in names)
    assert (out / "pretrain_64.pth").read_bytes() == base.read_bytes()


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
        while running.alive():
            try:
                filler.write(bytes(4096))
            except OSError:
                time.sleep(0.001)


@pytest.mark.slow
def test_a_disk_that_fails_in_the_middle_of_a_run(tmp_path, pretrain, small_disk):
    """The last good state survives and is spoken of, and leads to the same end once the disk is usable again."""
    flags = ["--steps", 80, "--save_interval", 5, "--out_dir"]
    out = small_disk / "out"
    running = pretrain(*flags, out)
    running.wait_for_state(out, 5)
    fill(small_disk, running)
    done = running.wait()
    [step] = states(out)
    assert 5 <= step < 80
    one_error(done, 1, out / "pretrain_64.pth", "--from_resume 1", f"step {step}")
    assert any(f"state_{step + 5:08d}.pt" in warning for warning in warnings(done))

    resumed = [*flags, out, "--from_resume", 1]
    one_error(pretrain(*resumed).wait(), 1, out)
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    one_error(pretrain(*resumed).wait(), 2, out)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    pretrain(*resumed).succeed()
    pretrain(*flags, tmp_path / "whole").succeed()
    assert_same(tmp_path / "whole" / "pretrain_64.pth", out / "pretrain_64.pth")
    assert sorted(os.listdir(out)) == [f"pretrain_64.{kind}" for kind in ("jsonl", "png", "pth", "run.json")]


# ------------------------------------------------------------------------------------------------ an adapter


def test_adapter_from_start_to_answer(tmp_path, data, base):
    """Trained, again finished with --from_resume, used by eval_model.py, and refused by it for another base."""
    out = tmp_path / "out"
    path = out / "lora" / "lora_identity_64.pth"
    job = ["train_lora.py", *TINY, "--data_path", data["chat"], "--val_path", data["chatval"], "--from_weight", base]
    job += ["--steps", 4, "--out_dir", out, "--lora_rank", 4]
    done = Script(tmp_path, job, [*job, "--from_resume", 1]).wait()
    assert done.code == 0 and str(path) in done.out, done.err
    assert re.search(rf"\b{sum(w.numel() for w in weights(path).values()):,}\b", done.err)  # what is trained
    assert sorted(os.listdir(out)) == ["lora"] and path.stat().st_size < base.stat().st_size / 5
    assert checkpoint.load_meta(path)["steps"] == 4

    ask = ["eval_model.py", "--out_dir", out, "--ask", "cat", "--max_new_tokens", 4, "--temperature", 0]
    ask += ["--device", "cpu", "--weight"]
    Script(tmp_path, [*ask, base], [*ask, base, "--lora_name", "lora_identity"]).succeed()
    other = tmp_path / "other.pth"
    model, meta = checkpoint.load(base)
    with torch.no_grad():
        model.model.norm.weight += 0.1
    checkpoint.save(other, model, meta)
    done = Script(tmp_path, [*ask, other, "--lora_name", "lora_identity"]).wait()
    one_error(done, 1, path, other)
