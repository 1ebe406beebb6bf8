"""How scripts end: Ctrl-C, full memory, files that are something else; and what a run says at its end."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

import cli
from cli import UsageError
from model import checkpoint
from model.adapters import adapter_matrices
from model.checkpoint import CheckpointError
from model.device import is_out_of_memory
from model.export.peft import load_peft, save_peft
from model.inference import cpu_step
from model.model import LoRAConfig, add_lora
from tests.processes import ENV, ROOT, Done, Script, one_error, small_data, small_weights
from trainer import caches
from trainer.advice import STAGES, Outcome, advice, learnt_little
from trainer.arguments import arguments, check

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4cac19622fc3ada9c0fdeadb33f88f367b541f38\nsize 99\n"
TINY = "--max_seq_len 32 --batch_size 2 --compile 0 --dtype fp32 --device cpu".split()
SHAPE = "--hidden_size 64 --num_hidden_layers 2".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with small_data(tmp_path_factory.mktemp("data")) as paths:
        yield paths


# ------------------------------------------------------------------------------------------------ Ctrl-C, seeds

SCRIPTS = {
    "train_distill.py": [], "eval_model.py": ["--ask", "x"], "scripts/convert_model.py": ["a", "b"],
    "scripts/benchmark.py": ["train"], "serve_openai_api.py": ["--port", "1"],
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_packages_are_imported(tmp_path, script):
    """As soon as cli is there, which comes first of all that takes time."""
    shim = tmp_path / "torch"
    shim.mkdir()
    (shim / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "uvicorn.py").write_text("import torch\n")
    environment = os.environ | ENV | {"PYTHONPATH": str(tmp_path), "MINIMIND_CACHE": str(tmp_path)}
    command = [sys.executable, str(ROOT / script), *SCRIPTS[script], *["--out_dir", str(tmp_path)] * ("eval" in script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)
    assert running.stdout.readline() == "importing\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (130, "error: stopped\n")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 0.8, 1.5, 2.5])
def test_ctrl_c_at_any_time(tmp_path, data, delay):
    command = [
        sys.executable,
        ROOT / "train_pretrain.py",
        *TINY,
        *SHAPE,
        "--data_path",
        data["text"],
        "--steps",
        10_000,
    ]
    command = [str(part) for part in (*command, "--out_dir", tmp_path / "out")]
    running = subprocess.Popen(command, env=os.environ | ENV, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130 and "Traceback" not in err, err


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1.5", "many"])
def test_a_seed_that_no_generator_takes(tmp_path, seed):
    for script in ("train_pretrain.py", "eval_model.py"):
        one_error(Script(tmp_path, [script, f"--seed={seed}"]).wait(), 2, "--seed", seed)


def test_the_largest_seed_trains(tmp_path, data):
    flags = [
        *TINY,
        *SHAPE,
        "--data_path",
        data["text"],
        "--steps",
        1,
        "--num_workers",
        1,
        "--out_dir",
        tmp_path / "out",
    ]
    Script(tmp_path, ["train_pretrain.py", *flags, "--seed", cli.MAX_SEED]).succeed()


# ------------------------------------------------------------------------------------------------ memory

LIMITED = """
import resource, runpy, sys
import torch
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def with_memory(megabytes: int, *argv) -> Done:
    """The script with so much memory besides what torch has already."""
    code = LIMITED.replace("del sys.argv[:2]", "sys.argv = sys.argv[2:]")
    command = [sys.executable, "-c", code, str(megabytes), *map(str, argv)]
    environment = os.environ | ENV | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, cwd=ROOT)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_full_memory_is_one_line(tmp_path, data):
    flags = [*SHAPE, "--data_path", data["text"], "--max_seq_len", 256, "--batch_size", 4096, "--compile", 0]
    done = with_memory(1000, ROOT / "train_pretrain.py", *flags, "--steps", 2, "--dtype", "fp32", "--out_dir", tmp_path)
    one_error(
        done, 1, "memory", "--batch_size", "--accumulation_steps", "--activation_checkpointing", "--from_resume 1"
    )


def test_weights_that_do_not_fit_are_not_called_damaged(tmp_path, monkeypatch):
    path = small_weights(tmp_path)["dense"]
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to")

    def fail(*args, **options):
        raise full

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError, match="allocate"):
        checkpoint.load(path)


@pytest.mark.parametrize(("error", "full"), [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory"), True), (OSError(12, "Cannot"), True),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes"), True),
    (RuntimeError("MPS backend out of memory"), True), (RuntimeError("std::bad_alloc"), True),
    (RuntimeError("size mismatch"), False), (OSError(28, "No space"), False), (ValueError("out of memory"), False),
])  # fmt: skip
def test_what_a_full_memory_looks_like(error, full):
    assert is_out_of_memory(error) == full
    try:
        huge = torch.empty(1 << 60)
    except RuntimeError as real:
        assert is_out_of_memory(real)
    else:
        del huge


def test_the_remedy_names_flags_that_the_script_has(monkeypatch):
    monkeypatch.setattr(cli, "known_flags", {"--batch_size", "--quantize"})
    text, code = cli._expected(MemoryError())
    assert code == 1 and "--batch_size" in text and "--quantize" in text and "--accumulation_steps" not in text


# ------------------------------------------------------------------------------------------------ files


def test_lfs_pointers_are_called_by_their_name(tmp_path, tiny):
    """A clone without Git LFS has one in the place of each large file."""
    for name in ("model.pth", "model.safetensors", "pytorch_model.bin", "config.json", "adapter_config.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
        (folder / name).write_bytes(LFS)
        load = load_peft if name.startswith("adapter") else lambda path, *rest: checkpoint.load(path)
        with pytest.raises(CheckpointError, match="Git LFS pointer") as error:
            load(folder / name if name == "model.pth" else folder, tiny(), "x")
        assert str(folder / name) in str(error.value)
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        folder = tmp_path / "adapter_config_json"
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
        (folder / name).write_bytes(LFS)
        with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
            load_peft(folder, tiny(), "x")
        (folder / name).unlink()


def test_peft_folder_of_old_with_a_bin_file(tmp_path, tiny):
    model = tiny()
    add_lora(model, "x", LoRAConfig(rank=4, alpha=8))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01 * p.requires_grad)
    save_peft(tmp_path, model, "x")
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    other = tiny()
    load_peft(tmp_path, other, "y")
    ours, theirs = adapter_matrices(model, "x")[1], adapter_matrices(other, "y")[1]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        load_peft(tmp_path, tiny(), "z")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_converter_names_weights_that_are_not_finite(tmp_path, value):
    path = small_weights(tmp_path)["dense"]
    model, meta = checkpoint.load(path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = value
    checkpoint.save(path, model, meta)
    done = Script(tmp_path, ["scripts/convert_model.py", path, tmp_path / "copy.pth"]).wait()
    one_error(done, 1, path, "model.layers.1.mlp.up_proj.weight")
    assert not (tmp_path / "copy.pth").exists()


def test_a_folder_whose_name_is_no_unicode(tmp_path, data):
    if sys.platform != "linux":
        pytest.skip("names are Unicode there")
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    job = ["train_pretrain.py", *TINY, *SHAPE, "--data_path", data["text"], "--steps", 2, "--out_dir", out]
    Script(tmp_path, job).succeed()
    done = Script(tmp_path, [*job, "--from_resume", 1]).wait()
    assert done.code == 0 and "complete" in done.out, done.err
    Script(tmp_path, ["scripts/convert_model.py", f"{out}/pretrain_64.pth", f"{out}/copy.pth"]).succeed()


# ------------------------------------------------------------------------------------------------ caches


def test_caches_of_a_run(tmp_path, data):
    """Tokens and compiled code lie in --cache_dir, unless the environment names a folder for the latter."""
    job = [sys.executable, ROOT / "train_pretrain.py", *SHAPE, "--data_path", data["text"], "--steps", 1]
    job += ["--max_seq_len", 32, "--batch_size", 2, "--out_dir", tmp_path / "out", "--compile", 0, "--cache_dir"]
    code = "import sys, runpy, os\nsys.argv = sys.argv[1:]\nsys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')\nprint(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    job[1:1] = ["-c", code]
    for name, given in (("one", {}), ("two", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "mine")})):
        inherited = {key: value for key, value in os.environ.items() if key not in caches.VARIABLES}
        command, environment = [str(part) for part in (*job, tmp_path / name)], inherited | ENV | given
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert [path for path in (tmp_path / name).iterdir() if path.name.startswith("pretrain-")]
        compiled = done.stdout.strip()
        assert compiled == given.get("TORCHINDUCTOR_CACHE_DIR", compiled)
        assert compiled.startswith(str(tmp_path / name)) or given


def test_a_cache_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--cache_dir"):
        caches.use_cache_dir(str(tmp_path / "file" / "in"))


def test_where_the_compiled_step_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "mine"))
    assert cpu_step._cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MINIMIND_CACHE")
    (tmp_path / "code").write_text("")  # a folder cannot be made in a file: as on a read-only disk
    monkeypatch.setattr(cpu_step, "SOURCE", tmp_path / "code" / "a" / "b" / "c.cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cpu_step._cache_folder() == tmp_path / "xdg" / "minimind"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "code" / "xdg"))
    monkeypatch.setattr(cpu_step.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert cpu_step._cache_folder().parent == tmp_path / "temporary"
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "code" / "mine"))
    with pytest.raises(RuntimeError, match="MINIMIND_CACHE"):
        cpu_step._cache_folder()


# ------------------------------------------------------------------------------------------------ what a run says


def outcome(**changes) -> Outcome:
    values = dict(steps=100, rows=500, batch=16, first=[4.0], last=[1.0], own_data=True, validated=True)
    return Outcome(**(values | changes))


def test_a_run_that_has_hardly_learnt_says_so():
    assert learnt_little(outcome()) is None
    assert learnt_little(outcome(steps=1)) and learnt_little(outcome(steps=19)) and not learnt_little(outcome(steps=20))
    assert learnt_little(outcome(last=[3.95])) and not learnt_little(outcome(last=[3.5]))
    [text] = [line for line in advice("full_sft", "x", "", outcome(steps=1, rows=2)) if line.startswith("note: ")]
    assert "--batch_size 1 --epochs 30" in text
    [text] = [line for line in advice("full_sft", "x", "", outcome(steps=4, rows=64)) if line.startswith("note: ")]
    assert "--epochs 15" in text and "--batch_size" not in text
    flat = outcome(steps=50, rows=400, last=[3.99])  # two epochs
    assert "--epochs 4" in advice("full_sft", "x", "", flat)[0]
    assert not any(line.startswith("note: ") for line in advice("unlikelihood", "x", "", flat))  # repeats fall, not it
    assert "leave out --steps 2" in advice("full_sft", "x", "", outcome(steps=2, limits="--steps 2"))[0]


def test_every_stage_says_what_is_normal_and_what_is_next():
    scripts = {path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py")} - {"tokenizer"}
    assert scripts == set(STAGES)
    for stage in STAGES:
        for own_data in (False, True):
            lines = advice(stage, "NAME", " --out_dir o", outcome(own_data=own_data))
            assert len(lines) == 2 and lines[-1].startswith("next: python ") and lines[-1].endswith(" --out_dir o")
    assert advice("a stage of somebody", "x", "", outcome()) == []


def test_ten_rows(tmp_path):
    """One step, told; the flags that are suggested teach the rows."""
    path = tmp_path / "rows.jsonl"
    rows = [
        [{"role": "user", "content": f"word {i}?"}, {"role": "assistant", "content": f"{i * i} it is"}]
        for i in range(10)
    ]
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    job = ["train_full_sft.py", "--from_weight", small_weights(tmp_path)["dense"], "--data_path", path, "--compile", 0]
    job += ["--device", "cpu", "--dtype", "fp32", "--out_dir", tmp_path / "out"]
    done = Script(tmp_path, job).wait()
    assert done.code == 0 and "only 1 step" in done.err and "next: python eval_model.py" in done.err
    flags = done.err.partition("for instance with ")[2].partition(" (")[0].split()
    assert {"--batch_size", "--epochs"} <= set(flags)
    done = Script(tmp_path, [*job, *flags]).wait()
    assert done.code == 0 and "for instance" not in done.err
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/full_sft_64.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_seed_is_a_type():
    assert cli.seed("7") == 7
    with pytest.raises(argparse.ArgumentTypeError):
        cli.seed("-1")


@pytest.mark.parametrize(
    "flags",
    ["--epochs inf", "--minutes inf", "--learning_rate inf", "--num_workers 99999999", "--batch_size 9999999999"],
)
def test_numbers_that_would_not_end_are_refused(flags):
    args = arguments("pretrain", "").parse_args(flags.split())
    with pytest.raises(cli.UsageError, match=flags.split()[0]):
        check(args)


def test_no_path_is_told():
    with pytest.raises(cli.UsageError, match="--data_path"):
        check(arguments("pretrain", "").parse_args(["--data_path", ""]))
