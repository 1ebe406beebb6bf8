"""What other systems lack: bash, fork, a UTF-8 locale, a compiler, torch.distributed. As far as Linux can show it."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import environment
import pytest
import quickstart

from dataset.chat import load_tokenizer
from dataset.lm_dataset import batches, sft_dataset
from tests.processes import ROOT, small_data, small_weights

PLAIN = {name: value for name, value in os.environ.items() if not re.match("LC_|LANG|PYTHON", name)}
TINY = "--max_seq_len 32 --batch_size 2 --steps 2 --dtype fp32 --device cpu --hidden_size 64 --num_hidden_layers 2"


def python(*command, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    env = PLAIN | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, timeout=200)


# ------------------------------------------------------------------------------------------------ no bash


@pytest.fixture
def commands(monkeypatch):
    """What a script would run, each command in words, after it asked for an environment."""
    done = []

    def run(command, *args, **options) -> int:
        done.append(command[1:])
        return 0

    monkeypatch.setattr(environment, "ready", lambda kind: f"python of {kind}")
    monkeypatch.setattr(environment, "run", run)
    monkeypatch.delenv("OUT", raising=False)
    return done


def test_quickstart_runs_all_stages_in_the_folder_asked_for(commands, monkeypatch, capsys):
    monkeypatch.setenv("OUT", "folder of OUT")
    for argv, out in ((["q"], "folder of OUT"), (["q", "--out_dir", "x", "--minutes", "3", "--seed", "7"], "x")):
        commands.clear()
        monkeypatch.setattr(sys, "argv", argv)
        quickstart.main()
        corpus, pretrain, short, long, *scores, chat = commands
        assert corpus == ["-m", "dataset.starter"]
        scripts = ["train_pretrain.py", *["train_full_sft.py"] * 2, *["eval_model.py"] * 4]
        assert [command[0] for command in commands[1:]] == scripts
        assert all(command[command.index("--out_dir") + 1] == out for command in commands[1:])
        assert all(command[command.index("--from_resume") + 1] == "1" for command in (pretrain, short, long))
        assert long[long.index("--from_weight") + 1] == short[short.index("--save_weight") + 1]
        assert all("--score" in score for score in scores)
        assert pretrain[pretrain.index("--preset") + 1] == "pico"
    budgets = [float(command[command.index("--minutes") + 1]) for command in (pretrain, short, long)]
    assert sum(budgets) == pytest.approx(3, rel=1e-4)
    assert all(command[command.index("--seed") + 1] == "7" for command in (pretrain, short, long))
    assert capsys.readouterr().out.count("==") == 18


def test_more_minutes_are_for_a_larger_model_and_ones_own_files_for_another_life(commands, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["q", "--minutes", "30"])
    quickstart.main()
    assert commands[1][commands[1].index("--preset") + 1] == "micro"
    commands.clear()
    monkeypatch.setattr(sys, "argv", ["q", "--real", "a.jsonl", "--minutes", "2", "--out_dir", "x"])
    with pytest.raises(SystemExit, match="0"):
        quickstart.main()
    (only,) = commands
    assert only[0] == "scripts/real_life.py" and only[1].endswith("a.jsonl") and only[-2:] == ["--minutes", "2"]


def test_quickstart_ends_as_the_stage_that_ends_it(commands, monkeypatch):
    run, stops = environment.run, "train_pretrain.py"
    monkeypatch.setattr(environment, "run", lambda command, *args: run(command) or 130 * (stops in command))
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    with pytest.raises(SystemExit, match="130"):
        quickstart.main()
    assert len(commands) == 2


def test_the_tests_get_the_arguments_of_pytest(commands, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test.py", "-m", "not slow", "tests/test_x.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runpy.run_path(str(ROOT / "scripts" / "test.py"))["main"]()
    assert [command[1] for command in commands] == ["ruff", "ruff", "pytest"]
    assert commands[-1][-3:] == ["-m", "not slow", "tests/test_x.py"]


def test_packages_of_an_environment():
    core, dev = environment._packages("core"), environment._packages("dev")
    assert dev.startswith(core) and "\n-r" not in dev
    assert "torch>=" in core and "transformers" not in core
    assert "transformers" in dev and "pytest" in dev


@pytest.mark.parametrize("system, place", [("posix", "bin/python"), ("nt", "Scripts/python.exe")])
def test_environment_is_made_and_filled_once(tmp_path, monkeypatch, system, place):
    """With a pretended pip, in the folders of either system; a failure leaves no half environment."""
    ran, codes = [], {}

    def run(command, *args, **options) -> int:
        what = " ".join(command[1:4])
        ran.append(what)
        if what.startswith("-m venv"):
            Path(command[3], place).parent.mkdir(parents=True)
            Path(command[3], place).touch()
        return codes.get(what.split()[1], 0)

    names = {name: getattr(os, name) for name in ("environ", "pathsep", "replace", "chdir")}
    monkeypatch.setattr(environment, "os", SimpleNamespace(**names, name=system))
    monkeypatch.setattr(environment, "run", run)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)

    codes["venv"] = 1
    with pytest.raises(SystemExit, match="venv"):
        environment.ready("core")
    assert not (tmp_path / ".venv").exists()
    codes = {"pip": 1}
    with pytest.raises(SystemExit, match="pip"):
        environment.ready("core")
    codes = {}
    assert environment.ready("core") == str(tmp_path / ".venv" / place)
    assert os.environ["PATH"].startswith(str((tmp_path / ".venv" / place).parent))
    ran.clear()
    environment.ready("core")
    assert ran == []
    environment.ready("dev")
    assert ran[-1] == "-m pip install"
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 1))
    shutil.rmtree(tmp_path / ".venv")
    with pytest.raises(SystemExit, match="3.9 is too old, 3.10"):
        environment.ready("core")


@pytest.mark.posix
def test_ctrl_c_leaves_a_stage_the_time_to_save():
    """The terminal sends it to both; the stage needs longer than subprocess.run() would give it."""
    stage = "import signal, time; signal.signal(2, lambda *_: (time.sleep(1), exit(7))); "
    stage += "print('ready', flush=True); time.sleep(60)"
    script = f"import sys, environment; sys.exit(environment.run([sys.executable, '-c', {stage!r}]))"
    command, cwd = [sys.executable, "-c", script], ROOT / "scripts"
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"ready\n"
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 7


@pytest.mark.posix
def test_sigterm_is_passed_on():
    stage = "import signal, time; signal.signal(15, lambda *_: exit(7)); print('ready', flush=True); time.sleep(60)"
    script = f"import sys, environment; sys.exit(environment.run([sys.executable, '-c', {stage!r}]))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT / "scripts", stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 7


# ------------------------------------------------------------------------------------------------ no fork


UNGUARDED = """
import sys
print("imported")
from dataset.chat import load_tokenizer
from dataset.lm_dataset import sft_dataset
rows = sft_dataset(sys.argv[1], load_tokenizer(), 64, cache_dir=sys.argv[2], num_proc=2)
print(len(rows))
"""


def test_tokenising_starts_no_script_again(tmp_path):
    """Its processes are spawned, even by a script without `if __name__ == "__main__"`, and import no torch."""
    (tmp_path / "script.py").write_text(UNGUARDED, encoding="utf-8")
    with small_data(tmp_path) as data:
        done = python(tmp_path / "script.py", data["chat"], tmp_path / "cache", env={"PYTHONPATH": str(ROOT)})
        rows = sft_dataset(data["chat"], load_tokenizer(), 64, cache_dir=tmp_path / "other", num_proc=1)
        assert done.stdout.split() == [b"imported", str(len(rows)).encode()], done
    done = python("-c", "import dataset.packing, sys; print('torch' in sys.modules)")
    assert done.stdout.split() == [b"False"], done


WORKERS = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_workers_of_the_batches_are_spawned_too(tmp_path):
    """--num_workers where there is no fork: what a worker gets can be pickled, and the batches are the same."""
    script = tmp_path / "script.py"
    script.write_text(WORKERS, encoding="utf-8")
    with small_data(tmp_path) as data:
        flags = [*TINY.split(), "--compile", 0, "--data_path", data["text"], "--out_dir"]
        for count in (0, 2):
            train = [script, "train_pretrain.py", *flags, tmp_path / str(count), "--num_workers", count]
            done = python(*train, env={"PYTHONPATH": str(ROOT)})
            assert done.returncode == 0, done.stderr.decode()
    logs = [(tmp_path / str(count) / "pretrain_64.jsonl").read_text(encoding="utf-8") for count in (0, 2)]
    losses = [re.findall(r'"loss": ([0-9.]+)', log) for log in logs]
    assert losses[0] == losses[1]


def test_what_workers_get_can_be_pickled(tmp_path):
    import pickle

    from dataset import lm_dataset

    with small_data(tmp_path) as data:
        rows = sft_dataset(data["chat"], load_tokenizer(), 64, cache_dir=tmp_path / "cache", quiet=True)
        source, to_batch = pickle.loads(pickle.dumps((lm_dataset._Source(rows), lm_dataset._collate_of(rows))))
        batch, first = to_batch(source.__getitems__([0, 1])), next(batches(rows, 2, seed=0, shuffle=False))
        assert batch["input_ids"].equal(first["input_ids"])


# ------------------------------------------------------------------------------------------------ other encodings


SLOW = pytest.mark.slow
ENCODINGS = [
    pytest.param({"PYTHONIOENCODING": "cp1252"}, id="Windows, western"),
    pytest.param({"PYTHONIOENCODING": "cp936"}, id="Windows, Chinese", marks=SLOW),
    pytest.param({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, id="no locale", marks=SLOW),
]


@pytest.mark.parametrize("env", ENCODINGS)
def test_two_languages_in_any_encoding(tmp_path, env):
    """What the encoding lacks is shown as an escape. A text file that is opened without its encoding is warned of."""
    row = tmp_path / "法国.jsonl"
    turns = [{"role": "user", "content": "你好 é"}, {"role": "assistant", "content": "好"}]
    row.write_text(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    model = small_weights(tmp_path)["dense"]
    answer = ["eval_model.py", "--model", model, "--max_new_tokens", 4, "--ask", "你是谁？ →"]
    for command in (answer, ["scripts/inspect_data.py", row, "--row", 1]):
        done = python(*command, env=env | {"PYTHONWARNDEFAULTENCODING": "1"})
        assert done.returncode == 0, done.stderr
        warnings = [line for line in done.stderr.splitlines() if b"EncodingWarning" in line]
        ours = [line for line in warnings if line.startswith(str(ROOT).encode()) and b"site-packages" not in line]
        assert not ours
    missing = python("eval_model.py", "--model", tmp_path / "模型.pth", "--ask", "x", env=env)
    assert missing.returncode == 1 and missing.stderr.startswith(b"error: ") and missing.stderr.count(b"\n") == 1


# ------------------------------------------------------------------------------------------------ parts of PyTorch


WITHOUT = """
import runpy, sys, torch.distributed
torch.distributed.is_available = lambda: False
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch.distributed.tensor"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for name in [name for name in sys.modules if name.startswith("torch.distributed.tensor")]:
    del sys.modules[name]
def compile(*args, **options):
    raise RuntimeError("torch.compile is not supported here\\nand more")
torch.compile = compile
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_without_torch_distributed_and_torch_compile(tmp_path):
    """Where the run would be compiled, one line says that it is not; asked for, it is an error of one line."""
    with small_data(tmp_path) as data:
        flags = [*TINY.split(), "--data_path", data["text"], "--out_dir", tmp_path / "out"]
        script = "import trainer.speed as s; s.WORTH_COMPILING = 0\n" + WITHOUT
        done = python("-c", script, "train_pretrain.py", *flags)
        err = done.stderr.decode()
        assert done.returncode == 0 and (tmp_path / "out" / "pretrain_64.pth").exists(), err
        assert "Traceback" not in err and len([line for line in err.splitlines() if "torch.compile" in line]) == 1
        done = python("-c", WITHOUT, "train_pretrain.py", *flags, "--compile", 1)
        last = done.stderr.decode().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: --compile 1") and "and more" not in last
        group = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        done = python("-c", WITHOUT, "train_pretrain.py", *flags, env=group)
        assert done.returncode == 2 and b"torch.distributed" in done.stderr and done.stderr.count(b"\n") == 1


# ------------------------------------------------------------------------------------------------ the repository


def test_files_can_be_checked_out_anywhere():
    """No two names that differ by case, none that Windows forbids, none too long for it in a deep folder."""
    git = shutil.which("git")
    listed = git and subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if not listed or listed.returncode:
        pytest.skip("not a git checkout")
    names = listed.stdout.decode().rstrip("\0").split("\0")
    assert len({name.lower() for name in names}) == len(names) > 100
    forbidden = re.compile(r'[<>:"\\|?*\x00-\x1f]|[. ](/|$)|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)', re.IGNORECASE)
    assert not [name for name in names if forbidden.search(name) or len(name) > 120]


def test_workflow_of_the_public_runners():
    pytest.importorskip("check_jsonschema")
    schema = ["--builtin-schema", "vendor.github-workflows"]
    done = python("-m", "check_jsonschema", *schema, *(ROOT / ".github" / "workflows").glob("*.yml"))
    assert done.returncode == 0, done.stdout.decode()


def test_a_stage_reads_what_it_is_given():
    begin = time.monotonic()
    command = [sys.executable, "-c", "print(input() == '0')"]
    read, write = os.pipe()
    assert environment.run(command, "0\n", stdout=write) == 0
    os.close(write)
    assert os.read(read, 100).split() == [b"True"] and time.monotonic() - begin < 60
    os.close(read)
