"""Two runs in one folder, earlier weights, and what must be the same at resume: `pytest tests/test_outputs.py`."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
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
    one_error,
    small_data,
    small_weights,
    state_step,
    weights,
)  # fmt: skip
from trainer import outputs
from trainer.parallel import Processes

TINY = "--max_seq_len 32 --batch_size 2 --compile 0 --dtype fp32 --device cpu --log_interval 1".split()
SHAPE = "--hidden_size 64 --num_hidden_layers 2".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with small_data(tmp_path_factory.mktemp("data")) as paths:
        yield paths


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, Path]:
    return small_weights(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pretrain(tmp_path, data):
    """pretrain(*flags, **options): a started pretraining of a small model into out/."""

    def start(*flags, **options) -> Script:
        job = ["train_pretrain.py", *TINY, *SHAPE, "--data_path", data["text"], "--out_dir", tmp_path / "out", *flags]
        return Script(tmp_path, job, **options)

    return start


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in files_in(out)}


def interrupt(running: Script, out: Path, step: int = 2) -> None:
    """Kill it once this step is saved."""
    running.wait_for_state(out, step)
    running.kill()
    assert any(state_step(path) >= step for path in files_in(out))


# ------------------------------------------------------------------------------------------------ one run at a time


@pytest.mark.parametrize("count", [1, 2], ids=["one process", "a group"])
def test_a_second_run_is_refused_at_once(tmp_path, pretrain, count):
    """The first goes on as if alone; with another name there is room for both."""
    out, flags = tmp_path / "out", ["--steps", 60, "--save_interval", 1]
    first = pretrain(*flags)
    first.wait_for_state(out, 2)
    os.kill(first.processes[0].pid, signal.SIGSTOP)
    before = contents(out)
    for more in ([], ["--from_resume", 1], ["--seed", 7]):
        second = pretrain(*flags, *more, count=count)
        assert second.codes() == [2] * count
        one_error(second.wait(), 2, "--save_weight", "--out_dir", out / "pretrain_64.pth")
        assert contents(out) == before
    pretrain(*flags, "--save_weight", "another", "--steps", 2, count=count).succeed()
    os.kill(first.processes[0].pid, signal.SIGCONT)
    first.succeed()
    pretrain(*flags, "--out_dir", tmp_path / "alone").succeed()
    assert_same(tmp_path / "alone" / "pretrain_64.pth", out / "pretrain_64.pth")
    assert not [path for path in files_in(out) if path.name.startswith(".")]


@pytest.mark.slow
def test_the_lock_of_a_killed_run_is_gone(tmp_path, pretrain):
    out = tmp_path / "out"
    interrupt(pretrain("--steps", 60, "--save_interval", 1), out)
    pretrain("--steps", 60, "--from_resume", 1).succeed()
    assert sorted(os.listdir(out)) == [f"pretrain_64.{kind}" for kind in ("jsonl", "png", "pth", "run.json")]


def test_a_disk_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def refuse(file):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(outputs, "_lock_file", refuse)
    outputs.claim(tmp_path / "x_64.pth", "--out_dir x", Processes())
    assert "no locks" in capsys.readouterr().err
    outputs.release(tmp_path / "x_64.pth")


# ------------------------------------------------------------------------------------------------ what was there before


def test_trained_weights_are_never_lost(tmp_path, pretrain):
    """The same command again, a shorter one, and one that begins from what it replaces: each time a numbered copy."""
    out = tmp_path / "out"
    path = out / "pretrain_64.pth"
    pretrain("--steps", 6).succeed()
    for number, flags in enumerate((["--seed", 7], ["--steps", 2], ["--from_weight", "pretrain"]), 1):
        older = contents(out)
        done = pretrain("--steps", 6, *flags).wait()
        assert done.code == 0 and f"{path.name}.{number}" in done.err
        now = contents(out)
        assert now[path.name] != older[path.name]
        for name in older:
            copied = name in [f"pretrain_64.{kind}" for kind in ("pth", "jsonl", "png", "run.json")]
            assert now[f"{name}.{number}" if copied else name] == older[name], name
    assert checkpoint.load(f"{path}.1")[1]["steps"] == 6
    assert checkpoint.find_weights(out, "pretrain") == path


def test_nothing_is_lost_before_the_first_step(tmp_path, pretrain, data):
    """A fault, an old file of the same name, twice: the one copy is enough."""
    out = tmp_path / "out"
    pretrain("--steps", 4).succeed()
    before = contents(out)
    for _ in range(2):
        one_error(pretrain("--steps", 4, "--data_path", data["bad"]).wait(), 1, data["bad"])
    assert contents(out) == before
    for _ in range(2):  # a run that fails while it trains has begun a log of its own
        running = pretrain("--steps", 10_000, "--seed", 3)
        while running.alive() and not Path(f"{out}/pretrain_64.pth.1").exists():
            time.sleep(0.002)
        running.kill()
        now = contents(out)
        assert now["pretrain_64.pth"] == now["pretrain_64.pth.1"] == before["pretrain_64.pth"]
        assert now["pretrain_64.jsonl.1"] == before["pretrain_64.jsonl"]
    assert not Path(f"{out}/pretrain_64.pth.2").exists()


def test_a_longer_budget_of_a_finished_run_is_refused(tmp_path, pretrain):
    out = tmp_path / "out"
    pretrain("--steps", 2).succeed()
    before = contents(out)
    for steps in (3, 1):
        done = pretrain("--steps", steps, "--from_resume", 1).wait()
        one_error(done, 2, "--from_resume", "--from_weight", out / "pretrain_64.pth", "--steps 2")
    assert contents(out) == before
    pretrain("--steps", 3, "--from_weight", out / "pretrain_64.pth").succeed()
    assert Path(f"{out}/pretrain_64.pth.1").read_bytes() == before["pretrain_64.pth"]
    done = pretrain("--steps", 3, "--from_weight", "pretrain", "--from_resume", 1).wait()
    assert done.code == 0 and "complete" in done.out


def test_an_interrupted_run_is_not_begun_anew_unasked(tmp_path, pretrain):
    out = tmp_path / "out"
    interrupt(pretrain("--steps", 60, "--save_interval", 1), out)
    before = contents(out)
    for flags in ([], ["--steps", 5], ["--seed", 1]):
        done = pretrain("--steps", 60, *flags).wait()
        one_error(done, 2, "--from_resume 1", "--save_weight", out / "pretrain_64_resume")
    assert {**before, ".pretrain_64.lock": b""} == {**contents(out), ".pretrain_64.lock": b""}


@pytest.mark.slow
def test_a_run_from_its_own_weights_killed_as_it_ended_goes_on(tmp_path, data, base):
    """The weights are written, the state is still there: it ends with those of a whole run, reference and all."""
    flags = [*TINY, "--max_seq_len", 64, "--data_path", data["pairs"], "--steps", 6, "--save_interval", 4]
    job = ["train_dpo.py", *flags, "--from_weight", "dpo", "--out_dir"]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        shutil.copy(base["dense"], tmp_path / name / "dpo_64.pth")
    Script(tmp_path, [*job, tmp_path / "whole"]).succeed()
    code = "import sys, runpy; from model import checkpoint; checkpoint.remove_resume = lambda folder: sys.exit(9); "
    code += "from tests.processes import _replace; _replace(1); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = shell(sys.executable, "-c", code, *job, tmp_path / "parts")
    assert done.code == 9, done.err
    assert (tmp_path / "parts" / "dpo_64_resume").exists()
    Script(tmp_path, [*job, tmp_path / "parts", "--from_resume", 1]).succeed()
    assert_same(tmp_path / "whole" / "dpo_64.pth", tmp_path / "parts" / "dpo_64.pth")
    assert sorted(os.listdir(tmp_path / "parts")) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.slow
def test_an_adapter_is_kept_too(tmp_path, data, base):
    out = tmp_path / "out"
    job = ["train_lora.py", *TINY, "--data_path", data["chat"], "--from_weight", base["dense"], "--out_dir", out]
    Script(tmp_path, [*job, "--steps", 3]).succeed()
    before = (out / "lora" / "lora_identity_64.pth").read_bytes()
    one_error(Script(tmp_path, [*job, "--steps", 4, "--from_resume", 1]).wait(), 2, "--from_weight")
    Script(tmp_path, [*job, "--steps", 2]).succeed()
    assert (out / "lora" / "lora_identity_64.pth.1").read_bytes() == before
    other = [*job, "--lora_rank", 4, "--save_interval", 1, "--steps"]
    running = Script(tmp_path, [*other, 1000])
    running.wait_for_state(out, 1)
    os.kill(running.processes[0].pid, signal.SIGSTOP)
    one_error(Script(tmp_path, [*other, 2]).wait(), 2, out / "lora" / "lora_identity_64.pth")
    Script(tmp_path, [*other, 2, "--lora_name", "lora_other"]).succeed()
    running.kill()


# ------------------------------------------------------------------------------------------------ contents, not names


def shell(*argv, cwd: Path = ROOT) -> Done:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, cwd=cwd, timeout=300,
                          env=os.environ | ENV | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def changed(path: Path, folder: Path) -> Path:
    """The weights with one number changed."""
    model, meta = checkpoint.load(path)
    with torch.no_grad():
        model.model.norm.weight[3] += 0.5
    checkpoint.save(folder / path.name, model, meta)
    return folder / path.name


def test_contents_count_and_names_do_not(tmp_path, data, base):
    """An interrupted and a finished run: an edited file, other weights and another teacher are refused by name; the
    same ones under other names go on."""
    names = {
        "data_path": data["chat"],
        "val_path": data["chatval"],
        "from_weight": base["dense"],
        "teacher": base["moe"],
    }
    own, others = tmp_path / "own", tmp_path / "others"
    same, edited = {}, {}
    for folder in (own, others):
        folder.mkdir()
    for name, path in names.items():
        same[name] = own / f"copy-{path.name}"
        shutil.copy(path, same[name])
        if path.suffix == ".pth":
            edited[name] = changed(path, others)
        else:
            edited[name] = others / path.name
            edited[name].write_text(path.read_text().replace("cat", "cow"))
    job = ["train_distill.py", *TINY, "--steps", 30, "--save_interval", 1, "--alpha", 0.5, "--out_dir"]
    out = tmp_path / "out"

    def flags(paths: dict) -> list:
        return [part for name, path in paths.items() for part in (f"--{name}", path)]

    Script(tmp_path, [*job, tmp_path / "whole", *flags(names)]).succeed()
    interrupt(Script(tmp_path, [*job, out, *flags(names)]), out)
    for state in ("interrupted", "finished"):
        before = {path: content for path, content in contents(out).items() if not path.endswith(".lock")}
        for name, path in edited.items():
            done = Script(tmp_path, [*job, out, *flags(names | {name: path}), "--from_resume", 1]).wait()
            one_error(done, 2, f"--{name}", path)
        left = {k: v for k, v in names.items() if k != "val_path"}
        one_error(Script(tmp_path, [*job, out, *flags(left), "--from_resume", 1]).wait(), 2, "--val_path")
        assert before == {path: content for path, content in contents(out).items() if not path.endswith(".lock")}
        relative = {name: os.path.relpath(path, ROOT) for name, path in same.items()}
        done = shell(sys.executable, ROOT / "train_distill.py", *job[1:], out, *flags(relative), "--from_resume", 1)
        assert done.code == 0 and ("complete" in done.out) == (state == "finished"), done
    assert not [name for name, w in weights(out / "distill_64.pth").items()
                if not torch.equal(w, weights(tmp_path / "whole" / "distill_64.pth")[name])]  # fmt: skip


@pytest.mark.parametrize(("flags", "exact"), [
    ("--batch_size 1 --accumulation_steps 4", True), ("--batch_size 2 --accumulation_steps 1", False),
    pytest.param("--activation_checkpointing 1 --num_workers 1 --save_interval 3", None, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_smaller_batch_at_resume(tmp_path, pretrain, flags, exact):
    """No row is lost or repeated; what cannot be the same is told. exact: as many rows a step as before."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    # Small steps: Muon enlarges what two orders of summation differ by, the more the further a step goes.
    job = ["--epochs", 4, "--batch_size", 4, "--save_interval", 1, "--learning_rate", 1e-3]
    pretrain(*job, "--out_dir", whole).succeed()
    interrupt(pretrain(*job), out)
    done = pretrain(*job, *flags.split(), "--from_resume", 1).wait()
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if line.startswith("note: the run had --batch_size 4")]
    assert len(told) == (exact is not None)
    figures = [checkpoint.load_meta(folder / "pretrain_64.pth") for folder in (whole, out)]
    if exact is None:
        a, b = (weights(folder / "pretrain_64.pth") for folder in (whole, out))
        assert not [name for name in a if not torch.equal(a[name], b[name])]
    elif exact:
        assert figures[0]["tokens"] == figures[1]["tokens"] and figures[0]["steps"] == figures[1]["steps"]
        a, b = (weights(folder / "pretrain_64.pth") for folder in (whole, out))
        assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4
    else:
        assert "--accumulation_steps 2" in told[0]
        assert figures[1]["steps"] > figures[0]["steps"]
        assert figures[0]["tokens"] - 4 * 31 <= figures[1]["tokens"] <= figures[0]["tokens"]


def test_random_weights_do_not_go_on_with_a_run_that_had_some(tmp_path, pretrain):
    out = tmp_path / "out"
    pretrain("--steps", 1, "--save_weight", "base").succeed()
    interrupt(pretrain("--steps", 60, "--save_interval", 1, "--from_weight", "base"), out)
    one_error(pretrain("--steps", 60, "--from_resume", 1).wait(), 2, "--from_weight")


def test_the_length_of_a_row_may_not_change(tmp_path, pretrain):
    out = tmp_path / "out"
    interrupt(pretrain("--steps", 60, "--save_interval", 1), out)
    done = pretrain("--steps", 60, "--from_resume", 1, "--max_seq_len", 16).wait()
    one_error(done, 2, "--max_seq_len 32", "packed")


def test_figures_of_the_contents_are_in_the_weights(tmp_path, pretrain, data):
    pretrain("--steps", 2, "--val_path", data["textval"]).succeed()
    inputs = checkpoint.load_meta(tmp_path / "out" / "pretrain_64.pth")["inputs"]
    assert inputs["data_path"] == hashlib.sha256(data["text"].read_bytes()).hexdigest()
    assert inputs["val_path"] == hashlib.sha256(data["textval"].read_bytes()).hexdigest()
    assert inputs["from_weight"] is None
    assert json.dumps(inputs)
