"""Training data of several sources, and of large ones in shards: one order everywhere, nothing lost, resume to the bit:
`pytest tests/test_mixing.py`."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import cli
from dataset import cache, shards
from dataset.files import DataError
from dataset.lm_dataset import (
    batches,
    preference_dataset,
    pretrain_dataset,
    row_count,
    sft_dataset,
    summary,
    training_data,
)
from dataset.sources import parse_sources
from dataset.tokenizer import load_tokenizer
from tests.processes import ROOT, Script, assert_same, one_error, small_data

WORDS = "the cat sat on a mat 小猫 看 雨 and 3 + 4 = 7 in old house 今天 天气".split()
SHAPE = ["--hidden_size", 64, "--num_hidden_layers", 2, "--device", "cpu", "--dtype", "fp32", "--compile", 0]
TINY = [*SHAPE, "--max_seq_len", 32, "--log_interval", 1, "--optimizer", "adamw"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def small_shards(monkeypatch):
    """Whatever has over 16 * 10 kB of text is large."""
    monkeypatch.setenv("MINIMIND_SHARD_MB", "0.01")


def write(path: Path, count: int, name: str = "", words: int = 30) -> Path:
    rng = random.Random(name)
    rows = [{"text": f"{name}{n} {' '.join(rng.choices(WORDS, k=rng.randint(1, words)))}"} for n in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_chats(path: Path, count: int) -> Path:
    rng = random.Random(0)
    chats = [
        [
            {"role": "user", "content": f"{n} {rng.choice(WORDS)}"},
            {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=n % 30 + 1))},
        ]
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


def order(rows, count: int, seed: int = 0, **options) -> list[bytes]:
    """The first `count` rows of the stream, as bytes."""
    stream = batches(rows, 1, seed=seed, **options)
    return [next(stream)["input_ids"].numpy().tobytes() for _ in range(count)]


# What --data_path says


def test_paths_with_and_without_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b:3", "c:\\d.jsonl:2", "x[1].jsonl", "s-1.jsonl.zst", "s-0.jsonl.zst"):
        Path(name).write_text("", encoding="utf-8")
    Path("folder/in").mkdir(parents=True)
    for name in ("in/2.parquet", "1.jsonl", "README.md"):
        (Path("folder") / name).write_text("", encoding="utf-8")
    given = [
        "a.jsonl:2",
        "a.jsonl:0.5",
        "b:3",
        "b:3:1e1",
        "c:\\d.jsonl:2",
        "x[1].jsonl",
        "s-*.zst:3",
        "folder",
        "no.jsonl",
    ]
    found = [(source.weight, [path.as_posix() for path in source.files]) for source in parse_sources(given)]
    assert found == [
        (2.0, ["a.jsonl"]),
        (0.5, ["a.jsonl"]),
        (None, ["b:3"]),
        (10.0, ["b:3"]),
        (None, ["c:\\d.jsonl:2"]),
        (None, ["x[1].jsonl"]),
        (3.0, ["s-0.jsonl.zst", "s-1.jsonl.zst"]),
        (None, ["folder/1.jsonl", "folder/in/2.parquet"]),
        (None, ["no.jsonl"]),
    ]
    assert parse_sources(["C:\\data\\a.jsonl"])[0].weight is None
    assert parse_sources(["C:\\data\\a.jsonl:2"])[0] == ("C:\\data\\a.jsonl", [Path("C:\\data\\a.jsonl")], 2.0)


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("{text}:0", 2, ["above 0"]),
        ("{text}:-1", 2, ["above 0"]),
        ("{text}:nan", 2, ["above 0"]),
        ("{text}:inf", 2, ["above 0"]),
        ("{text}:many", 1, ["no such file", "'many'"]),
        ("nowhere.jsonl:2", 1, ["nowhere.jsonl", "no such file"]),
        ("nothing-*.jsonl", 1, ["nothing-*.jsonl", "no file matches"]),
        ("{folder}", 1, ["a folder without data files"]),
        ("{empty}", 1, ["empty.jsonl", "empty"]),
        ("{bad}:3", 1, ["bad.jsonl", "none of its 3 lines"]),
    ],
)
def test_what_is_no_source_is_one_line(tmp_path, source, code, words):
    with small_data(tmp_path) as data:
        (tmp_path / "folder").mkdir()
        source = source.format(**data, folder=tmp_path / "folder")
        done = Script(
            tmp_path, ["train_pretrain.py", *TINY, "--data_path", data["text"], source, "--out_dir", tmp_path]
        ).wait()
    one_error(done, code, *words)


# Mixing


def test_weights_are_shares_of_the_rows(tmp_path, tokenizer):
    """Every 4096 rows have each source's share, and of each source all rows come before any again."""
    files = [write(tmp_path / f"{name}.jsonl", count, name) for name, count in (("a", 300), ("b", 50), ("c", 100))]
    sources = training_data([f"{files[0]}:5", f"{files[1]}:2.5", f"{files[2]}"])
    rows = pretrain_dataset(sources, tokenizer, 32, cache_dir=tmp_path, quiet=True)
    sizes = [len(part) for part in rows.parts]
    keys = list(itertools.islice(rows.keys(0, 0), 3 * 4096))
    counts = Counter(path for path, _ in keys)
    paths = [str(part.paths[0]) for part in rows.parts]
    assert [counts[path] / len(keys) for path in paths] == pytest.approx([5 / 8.5, 2.5 / 8.5, 1 / 8.5], abs=2 / 4096)
    assert Counter(path for path, _ in keys[:4096]) == Counter(path for path, _ in keys[4096:8192])
    for path, size in zip(paths, sizes, strict=True):
        taken = [row for at, row in keys if at == path]
        epochs = [taken[start : start + size] for start in range(0, len(taken) - size + 1, size)]
        assert all(sorted(epoch) == [*range(size)] for epoch in epochs) and epochs[0] != epochs[1]
    spread = [sum(path == paths[0] for path, _ in keys[start : start + 100]) for start in range(0, 4000, 100)]
    assert min(spread) > 35 and max(spread) < 82  # mixed, not one source after the other
    text = rows.describe(4096)
    assert (
        f"{files[1]}: 29.4% of the rows; its {sizes[1]} rows are seen {4096 * 1205 / 4096 / sizes[1]:.2f} times" in text
    )


def test_without_weights_an_epoch_has_every_row_once(tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "1.jsonl", 40, "one")
    lines = write(tmp_path / "b.jsonl", 70, "b").read_text(encoding="utf-8").splitlines()
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    pyarrow.parquet.write_table(table, tmp_path / "texts" / "2.parquet")
    alone = pretrain_dataset(tmp_path / "b.jsonl", tokenizer, 32, cache_dir=tmp_path, quiet=True)
    sources = training_data([f"{tmp_path}/texts/*.jsonl", f"{tmp_path}/texts/2.parquet"])
    rows = pretrain_dataset(sources, tokenizer, 32, cache_dir=tmp_path, quiet=True)
    taken = order(rows, 2 * len(rows))
    assert Counter(taken[: len(rows)]) == Counter(taken[len(rows) :]) and taken[: len(rows)] != taken[len(rows) :]
    assert Counter(order(alone, len(alone), shuffle=False)) <= Counter(taken[: len(rows)])  # Parquet, row for row
    assert row_count(rows, exact=True) == len(rows) == row_count(rows, exact=False)


@pytest.mark.parametrize("large", [False, True])
def test_one_order_for_any_number_of_processes_and_from_any_row(tmp_path, tokenizer, large, monkeypatch):
    if large:
        monkeypatch.setenv("MINIMIND_SHARD_MB", "0.001")
    a, b = write(tmp_path / "a.jsonl", 400, "a"), write(tmp_path / "b.jsonl", 30, "b")
    rows = pretrain_dataset(training_data([f"{a}:3", f"{b}:1"]), tokenizer, 32, cache_dir=tmp_path, quiet=True)
    assert [part.large for part in rows.parts] == [large, False]
    whole = order(rows, 5000)
    for count, batch in ((1, 8), (4, 2), (2, 4)):
        streams = [batches(rows, batch, seed=0, rank=rank, world_size=count, start_sample=16) for rank in range(count)]
        taken = []
        for _ in range(3):
            parts = [next(stream)["input_ids"] for stream in streams]
            taken += [row.numpy().tobytes() for part in parts for row in part]
        assert taken == whole[16:40]
    for start in (1, 4095, 4096, 4999):
        assert order(rows, 1, start_sample=start) == whole[start : start + 1]
    assert order(rows, 50, seed=1) != whole[:50]
    loader = batches(rows, 8, seed=0, num_workers=2)
    assert [row.numpy().tobytes() for _ in range(3) for row in next(loader)["input_ids"]] == whole[:24]


def test_conversations_and_pairs_are_mixed_too(tmp_path, tokenizer):
    with small_data(tmp_path) as data:
        pairs = training_data([f"{data['pairs']}:2", str(data["pairs"])])
        batch = next(batches(preference_dataset(pairs, tokenizer, 128, quiet=True), 4, seed=0))
        assert batch["answer_lengths"].shape[1] == 2 and batch["weight"] > 3
        chats = training_data([f"{data['chat']}:2", f"{data['chatval']}:1"])
        batch = next(batches(sft_dataset(chats, tokenizer, 32, quiet=True), 4, seed=0))
        assert {"segment_ids", "labels"} <= batch.keys()


def test_the_record_names_the_contents(tmp_path, tokenizer):
    a, b = write(tmp_path / "a.jsonl", 20, "a"), write(tmp_path / "b.jsonl", 20, "b")

    def mixture(*texts):
        return pretrain_dataset(training_data([*texts]), tokenizer, 32, cache_dir=tmp_path, quiet=True)

    rows = mixture(f"{a}:3", f"{b}:1")
    assert [(source["share"], source["sha256"]) for source in rows.record()] == [
        (0.75, [cache.content_hash(a)]),
        (0.25, [cache.content_hash(b)]),
    ]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(a.read_bytes())
    assert summary(mixture(f"{copy}:3", f"{b}:1"))["sha256"] == summary(rows)["sha256"]
    assert summary(mixture(f"{a}:2", f"{b}:1"))["sha256"] != summary(rows)["sha256"]
    write(b, 21, "b")
    assert summary(mixture(f"{a}:3", f"{b}:1"))["sha256"] != summary(rows)["sha256"]


# Shards


def rows_of(rows) -> list[dict]:
    """All rows of a sharded source, in the order of the file."""
    from dataset.lm_dataset import _open_rows

    [part] = rows.parts
    return [row for path, count in part.shards() for row in _open_rows(str(path)).__getitems__(range(count))]


@pytest.mark.parametrize("packed", [False, True])
def test_sharded_text_is_the_unsharded_rows(tmp_path, tokenizer, small_shards, packed):
    """Bit for bit, whatever the compression; in many shards."""
    path = write(tmp_path / "a.jsonl", 3000)
    alone = pretrain_dataset(path, tokenizer, 64, cache_dir=tmp_path, quiet=True)
    if packed:
        import gzip

        path = tmp_path / "a.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    rows = pretrain_dataset(training_data([str(path)]), tokenizer, 64, cache_dir=tmp_path, quiet=True)
    made = rows_of(rows)
    assert len(list(rows.parts[0].shards())) > 8 and len(made) == len(rows) == len(alone)
    assert all(list(row["input_ids"]) == one["input_ids"] for row, one in zip(made, alone, strict=True))
    figures = rows.parts[0].files[0].summary()
    assert {name: figures[name] for name in ("tokens", "lines", "used", "rows")} == {
        name: summary(alone)[name] for name in ("tokens", "lines", "used", "rows")
    }
    assert sorted(order(rows, len(rows))) == sorted(order(alone, len(alone)))


def test_sharded_conversations_lose_none(tmp_path, tokenizer, small_shards):
    path = write_chats(tmp_path / "a.jsonl", 2000)
    alone = sft_dataset(path, tokenizer, 64, cache_dir=tmp_path, quiet=True)
    rows = sft_dataset(training_data([str(path)]), tokenizer, 64, cache_dir=tmp_path, quiet=True)

    def segments(found) -> Counter:
        cut = (np.split(np.asarray(row["input_ids"]), np.cumsum(row["segment_lengths"])[:-1]) for row in found)
        return Counter(part.tobytes() for parts in cut for part in parts)

    made = rows_of(rows)
    assert rows.parts[0].large and segments(made) == segments(
        [{k: np.array(v, np.uint16 if k == "input_ids" else None) for k, v in row.items()} for row in alone]
    )
    assert rows.parts[0].files[0].summary()["labels"] == summary(alone)["labels"]


def test_large_sources_are_shuffled_in_windows_that_grow(tmp_path, tokenizer, small_shards):
    rows = pretrain_dataset(
        training_data([str(write(tmp_path / "a.jsonl", 3000))]), tokenizer, 64, cache_dir=tmp_path, quiet=True
    )
    [part] = rows.parts
    assert [len(window) for window in part.windows(None)][:5] == [1, 1, 2, 4, 8]
    made = list(part.shards())
    keys = list(itertools.islice(rows.keys(0, 0), 2 * len(rows)))
    assert {path for path, _ in keys[: made[0][1]]} == {str(made[0][0])}  # it begins with the first shard
    assert keys[:20] != sorted(keys[:20])
    assert Counter(keys[: len(rows)]) == Counter(keys[len(rows) :])  # each row once an epoch
    assert {path for path, _ in keys[len(rows) : len(rows) + 20]} != {
        str(made[0][0])
    }  # then in another order of shards


def test_training_begins_before_all_is_packed(tmp_path, tokenizer, small_shards):
    """The first row is there while the builder is at work; what is there then is the same as at the end."""
    path = write(tmp_path / "a.jsonl", 25_000)
    rows = pretrain_dataset(training_data([str(path)]), tokenizer, 64, cache_dir=tmp_path, quiet=True)
    first = order(rows, 30)
    [file] = rows.parts[0].files
    assert file.summary() is None and rows.parts[0].builder.process.is_alive()
    guess = rows.guess()
    rows.parts[0].builder.stop()
    rows.parts[0].builder.process.join()
    kept = len(list(file.folder.glob("shard-*.json")))
    again = pretrain_dataset(training_data([str(path)]), tokenizer, 64, cache_dir=tmp_path, quiet=True)
    assert again.guess() == guess and abs(guess - len(again)) < 0.1 * guess
    assert kept and order(again, 30) == first
    moments = [entry.stat().st_mtime_ns for entry in sorted(file.folder.glob("rows-*.arrow"))]
    assert moments[kept] - moments[kept - 1] > 0


def test_a_run_of_steps_ends_before_a_large_file_is_packed(tmp_path):
    """The command of a user: weights are there while most of the file has not been looked at."""
    path, val = write(tmp_path / "a.jsonl", 100_000), write(tmp_path / "val.jsonl", 50)
    size = "--hidden_size 32 --num_hidden_layers 1 --max_seq_len 64 --batch_size 2 --steps 3 --compile 0 --device cpu"
    data = ["--data_path", path, "--val_path", val, "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path]
    env = os.environ | {"MINIMIND_SHARD_MB": "0.05", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_pretrain.py", *size.split(), *data]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pretrain_32.pth").exists()
    (folder,) = {found.parent for found in (tmp_path / "cache").rglob("shard-*.json")}
    assert not (folder / "summary.json").exists()


BUILD = """
import sys
from dataset.tokenizer import load_tokenizer
from dataset.lm_dataset import pretrain_dataset, training_data
if __name__ == "__main__":
    rows = pretrain_dataset(training_data([sys.argv[1]]), load_tokenizer(), 64, cache_dir=sys.argv[2])
    print(len(rows), flush=True)
"""


def builders(folder: Path, path: Path, count: int = 1) -> list[subprocess.Popen]:
    script = folder / "build.py"
    script.write_text(BUILD, encoding="utf-8")
    env = os.environ | {"MINIMIND_SHARD_MB": "0.02", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, path, folder / "cache"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=env, **pipes) for _ in range(count)]


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_while_the_cache_is_made(tmp_path, tokenizer):
    """Killed again and again, each start keeps the whole shards; in the end the rows are those of the file in one
    piece. Two processes share the work: one makes it, both have it."""
    path = write(tmp_path / "a.jsonl", 40_000, words=20)
    alone = pretrain_dataset(path, tokenizer, 64, cache_dir=tmp_path, quiet=True)

    def made() -> dict[str, int]:
        """Shards that are whole: their rows are there, and then their record."""
        records = (tmp_path / "cache").glob("*/shard-*.json")
        rows = [record.with_name(record.stem.replace("shard", "rows") + ".arrow") for record in records]
        return {path.name: path.stat().st_ino for path in rows}

    kept: dict[str, int] = {}
    for kill in range(2):
        [running] = builders(tmp_path, path)
        end = time.monotonic() + 60
        while len(made()) < 2 * (kill + 1):
            assert running.poll() is None and time.monotonic() < end, running.stderr.read()
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert kept.items() <= made().items()
        kept = made()
    finished = [running.communicate(timeout=100) for running in builders(tmp_path, path, 2)]
    assert [out.strip() for out, _ in finished] == [f"{len(alone)}"] * 2, finished
    assert kept.items() <= made().items() and len(made()) > len(kept)
    assert sum("40,000 lines" in err for _, err in finished) == 1, finished
    with_shards = pretrain_dataset
    os.environ["MINIMIND_SHARD_MB"] = "0.02"
    try:
        rows = with_shards(training_data([str(path)]), tokenizer, 64, cache_dir=tmp_path / "cache", quiet=True)
        assert all(list(a["input_ids"]) == b["input_ids"] for a, b in zip(rows_of(rows), alone, strict=True))
    finally:
        del os.environ["MINIMIND_SHARD_MB"]


def test_a_disk_without_room_is_told_beforehand(tmp_path, tokenizer, small_shards, monkeypatch):
    path = write(tmp_path / "a.jsonl", 3000)
    free = lambda folder: type("Usage", (), {"free": 1000})  # noqa: E731
    monkeypatch.setattr(shards.shutil, "disk_usage", free)
    with pytest.raises(DataError, match="MB of text will take about .* MINIMIND_CACHE"):
        pretrain_dataset(training_data([str(path)]), tokenizer, 64, cache_dir=tmp_path, quiet=True)


def test_the_size_that_is_told(tmp_path, tokenizer, small_shards, capsys):
    rows = pretrain_dataset(training_data([str(write(tmp_path / "a.jsonl", 9000))]), tokenizer, 64, cache_dir=tmp_path)
    assert "will take about" in capsys.readouterr().err
    [file] = rows.parts[0].files
    len(rows)
    assert shards.expected_size([file]) == pytest.approx(cache.folder_size(file.folder), rel=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
def test_a_full_disk_while_the_cache_is_made(tmp_path):
    """Files cannot grow beyond a limit, as on a full disk: one line from the builder by way of the training."""
    with small_data(tmp_path):
        os.environ["MINIMIND_SHARD_MB"] = "0.1"
        try:
            path = write(tmp_path / "large.jsonl", 20_000)
            job = ["train_pretrain.py", *TINY, "--data_path", path, "--steps", 5, "--out_dir", tmp_path / "out"]
            done = Script(tmp_path, job, file_limit=100_000).wait()
        finally:
            del os.environ["MINIMIND_SHARD_MB"]
    one_error(done, 1, "cannot write the token cache", "MINIMIND_CACHE")


def test_wrong_weights_do_not_pass_as_a_path():
    with pytest.raises(cli.UsageError, match="above 0"):
        parse_sources(["x.jsonl:0"])


# Runs


def test_a_run_on_a_mix_goes_on_to_the_bit(tmp_path):
    """Killed in the middle, with other numbers of rows a batch and in two processes: the same rows, and on one process
    the same weights."""
    with small_data(tmp_path) as data:
        sources = [f"{data['text']}:2", f"{data['textval']}:1"]
        job = ["train_pretrain.py", *TINY, "--data_path", *sources, "--batch_size", 4, "--save_interval", 1]
        job += ["--steps", 40, "--save_weight", "mix"]
        whole, parts = [*job, "--out_dir", tmp_path / "whole"], [*job, "--out_dir", tmp_path / "parts"]
        done = Script(tmp_path, whole).succeed()
        running = Script(tmp_path, parts)
        running.wait_for_state(tmp_path / "parts", 3)
        running.kill()
        other = [*parts, "--from_resume", 1]
        at = other.index(f"{data['text']}:2")
        one_error(Script(tmp_path, [*other[:at], f"{data['text']}:3", *other[at + 1 :]]).wait(), 2, "--data_path")
        Script(tmp_path, other).succeed()
    assert_same(tmp_path / "whole" / "mix_64.pth", tmp_path / "parts" / "mix_64.pth")
    assert "66.7% of the rows" in done.err() and "times" in done.err()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_does_not_grow_with_the_source(tmp_path, tokenizer):
    """The rows of a source that is many times as large as its windows are read with less memory than it has."""
    code = """
import resource, sys
from dataset.tokenizer import load_tokenizer
from dataset.lm_dataset import batches, pretrain_dataset, training_data
if __name__ == "__main__":
    rows = pretrain_dataset(training_data([sys.argv[1]]), load_tokenizer(), 64, cache_dir=sys.argv[2], quiet=True)
    total, stream = len(rows), batches(rows, 64, seed=0)
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    next(stream)
    before, most = resident(), 0
    for _ in range(total // 64):
        next(stream)
        most = max(most, resident())
    print(most - before)
"""
    path = write(tmp_path / "a.jsonl", 60_000, words=60)
    (tmp_path / "read.py").write_text(code, encoding="utf-8")
    env = os.environ | {"MINIMIND_SHARD_MB": "0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tmp_path / "read.py", path, tmp_path / "cache"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    cached = sum(entry.stat().st_size for entry in (tmp_path / "cache").glob("*/rows-*.arrow"))
    assert int(done.stdout) < 0.75 * cached, (done.stdout, cached)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="bash")
@pytest.mark.parametrize("recipe", ["minimind2_small", "minimind3", "minimind3_moe"])
def test_the_recipes_run_on_little(tmp_path, recipe):
    """From the data to an answer, with one variable."""
    env = os.environ | {"TOY": "1", "TOY_STEPS": "4", "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", ROOT / "recipes" / f"{recipe}.sh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "5/5 chat" in done.stdout and list((tmp_path / f"{recipe}_toy").glob("full_sft_64*.pth"))
