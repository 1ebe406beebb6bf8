"""The record of a run and the trackers, as a user meets them: `pytest tests/test_record.py`."""

import glob
import hashlib
import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import ENV, ROOT, Script, log, one_error, small_data

TINY = "--max_seq_len 32 --batch_size 2 --compile 0 --dtype fp32 --device cpu --log_interval 2".split()
TINY += "--hidden_size 64 --num_hidden_layers 2".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with small_data(tmp_path_factory.mktemp("data")) as paths:
        yield paths


def flags(data, out: Path, *more) -> list:
    files = ["--data_path", data["text"], "--val_path", data["textval"], "--out_dir", out]
    return ["train_pretrain.py", *TINY, *files, *more]


def record_of(out: Path) -> dict:
    return json.loads((out / "pretrain_64.run.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ the record


def test_what_a_run_records(tmp_path, data):
    out = tmp_path / "out"
    Script(tmp_path, flags(data, out, "--steps", 6, "--seed", 7)).succeed()
    record, meta = record_of(out), torch.load(out / "pretrain_64.pth", weights_only=True)["meta"]
    assert record["state"] == "finished" and record["processes"] == 1
    assert "train_pretrain.py" in record["command"] and "--steps 6 --seed 7" in record["command"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert record["code"]["commit"] == (head or None) and record["code"]["dirty"] in (True, False, None)
    assert record["packages"]["torch"] == torch.__version__ and record["machine"]["cpu"]
    assert record["arguments"]["seed"] == 7 and record["parameters"]["total"] == record["parameters"]["trained"]
    for flag, kind in (("data_path", "text"), ("val_path", "textval")):
        found, content = record["data"][flag], data[kind].read_bytes()
        assert found["path"] == str(data[kind]) and found["sha256"] == hashlib.sha256(content).hexdigest()
        assert found["lines"] == content.count(b"\n") and found["tokens"] > found["rows"] > 0
    for name in ("steps", "tokens", "val_bpb", "val_loss", "seconds"):
        assert record["figures"][name] == meta[name]
    assert record["figures"]["loss"] > 0 and record["peak"].get("memory_mb", 1) > 0


@pytest.mark.posix
def test_the_record_of_a_killed_run_goes_on(tmp_path, data):
    """Killed, it says that it runs; resumed, it has both parts; only one process writes."""
    out = tmp_path / "out"
    job = flags(data, out, "--steps", 200, "--save_interval", 2)
    running = Script(tmp_path, job)
    running.wait_for_state(out, 4)
    running.kill()
    killed = record_of(out)
    assert killed["state"] == "running" and "earlier_parts" not in killed
    Script(tmp_path, [*job, "--from_resume", 1], count=2).succeed()
    record = record_of(out)
    [part] = record["earlier_parts"]
    assert part["command"] == killed["command"] and part["started"] == killed["started"]
    assert record["state"] == "finished" and record["figures"]["steps"] == 200
    assert record["processes"] == 2 and record["command"].startswith("torchrun --nproc_per_node 2")
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


# ------------------------------------------------------------------------------------------------ trackers


def test_a_missing_tracker_is_one_line(tmp_path, data):
    for name in ("swanlab", "trackio", "tensorboard", "wandb"):
        done = Script(tmp_path, flags(data, tmp_path / "out", "--tracker", name), missing=[name]).wait()
        one_error(done, 2, f"--tracker {name}", f"pip install {name}")
    done = Script(tmp_path, flags(data, tmp_path / "out", "--tracker", "trackio", "--use_wandb")).wait()
    one_error(done, 2, "--use_wandb")


def tracked(tmp_path: Path, data, name: str) -> list[dict]:
    """The log of a run with this tracker, in a process of its own, without an account."""
    pytest.importorskip(name, reason=f"{name} is optional: pip install {name}")
    out = tmp_path / "out"
    argv = [str(part) for part in flags(data, out, "--steps", 4, "--tracker", name)]
    env = os.environ | ENV | {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command, here = [sys.executable, ROOT / argv[0], *argv[1:]], tmp_path / "here"
    here.mkdir()
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert os.listdir(here) == []  # all of it is in out_dir
    return log(out / "pretrain_64.pth")


def expected(rows: list[dict], name: str) -> list[tuple[int, float]]:
    return [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]


@pytest.mark.slow
def test_tensorboard_has_what_the_log_has(tmp_path, data):
    rows = tracked(tmp_path, data, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "pretrain_64"))
    events.Reload()
    for name in ("loss", "val_bpb", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == expected(rows, name) and found


@pytest.mark.slow
def test_trackio_has_what_the_log_has(tmp_path, data):
    rows = tracked(tmp_path, data, "trackio")
    [path] = (tmp_path / "out" / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        kept = [(step, json.loads(metrics)) for step, metrics in database.execute("select step, metrics from metrics")]
    for name in ("loss", "val_bpb"):
        found = [(step, metrics[name]) for step, metrics in sorted(kept, key=lambda one: one[0]) if name in metrics]
        assert found == expected(rows, name) and found


@pytest.mark.slow
def test_swanlab_offline_has_what_the_log_has(tmp_path, data):
    rows = tracked(tmp_path, data, "swanlab")
    [path] = glob.glob(str(tmp_path / "out" / "swanlab" / "run-*" / "*.swanlab"))
    content = Path(path).read_bytes()
    for row in rows:
        for name in {"loss", "val_bpb"} & row.keys():
            step, value = bytes([row["step"]]), struct.pack("<d", row[name])  # fields of its protocol buffer
            where = content.find(b"\n%c%b%b" % (len(name), name.encode(), b"\x10" + step if row["step"] else b""))
            assert 0 < where < content.find(value, where) < where + 60, (name, row)
