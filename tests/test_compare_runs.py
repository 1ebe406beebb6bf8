"""scripts/compare_runs.py on records that real runs wrote, and whether its intervals hold what they promise."""

import json
import os
import random
import shutil
import statistics

import compare_runs
import pytest

from tests.processes import Script, one_error, small_data

TINY = "--max_seq_len 32 --batch_size 2 --compile 0 --dtype fp32 --device cpu --log_interval 2 --steps 6".split()
TINY += "--hidden_size 64 --num_hidden_layers 2".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two optimizers with two seeds each; benchmark figures beside one."""
    folder = tmp_path_factory.mktemp("runs")
    with small_data(folder) as data:
        jobs = [
            [
                "train_pretrain.py",
                *TINY,
                "--optimizer",
                optimizer,
                "--seed",
                seed,
                "--save_weight",
                f"{optimizer}_s{seed}",
            ]
            + ["--data_path", data["text"], "--val_path", data["textval"], "--out_dir", folder / "out"]
            for optimizer in ("muon", "adamw")
            for seed in (1, 2)
        ]
        Script(folder, *jobs).succeed()
    tasks = {"cmmlu": {"accuracy": 0.2512, "interval": [0.24, 0.26], "bits_per_byte": 1.5}}
    (folder / "out" / "muon_s1_64.eval.json").write_text(json.dumps({"tasks": tasks}))
    return folder / "out"


def figure(run, name):
    return json.loads((run.with_name(run.name + ".run.json")).read_text())["figures"][name]


def test_seeds_are_a_group_and_groups_are_compared(runs, tmp_path):
    """By weights, record and bare name; what is printed is computed here again."""
    names = [runs / "muon_s1_64.pth", runs / "muon_s2_64.run.json", runs / "adamw_s1_64", runs / "adamw_s2_64.pth"]
    picture, text = tmp_path / "a.png", tmp_path / "a.md"
    for over in ("tokens", "steps", "seconds"):
        job = ["scripts/compare_runs.py", *names, "--over", over, "--picture", picture, "--out", text]
        done = Script(tmp_path, job).wait()
        assert done.code == 0, done.err
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000
        picture.unlink()
    report = text.read_text()
    muon, adamw = ([figure(runs / f"{name}_s{seed}_64", "val_bpb") for seed in (1, 2)] for name in ("muon", "adamw"))
    assert f"{statistics.mean(muon):.4f} ± {statistics.stdev(muon):.4f}" in report
    pairs = [b - a for a, b in zip(muon, adamw, strict=True)]
    assert f"| val_bpb | {statistics.mean(pairs):+.4f} ± " in report and "2 pairs of seeds" in report
    assert "| optimizer | muon | adamw |" in report and "muon × 2" in report and "--seed 2" in report
    assert "| cmmlu accuracy | 0.2512 |" in report
    results = runs / "muon_s1_64.eval.json"
    os.utime(results, (1, 1))  # of weights that have been trained anew
    done = Script(tmp_path, ["scripts/compare_runs.py", *names, "--out", text]).wait()
    assert "of earlier weights" in done.err and "cmmlu" not in text.read_text()
    os.utime(results)


def test_mistakes_are_one_line(runs, tmp_path):
    one_error(Script(tmp_path, ["scripts/compare_runs.py", tmp_path / "none_64.pth"]).wait(), 1, "none_64.run.json")
    shutil.copy(runs / "muon_s1_64.run.json", tmp_path / "copy_64.run.json")
    twice = ["scripts/compare_runs.py", runs / "muon_s1_64.pth", tmp_path / "copy_64.run.json"]
    one_error(Script(tmp_path, twice).wait(), 2, "muon_s1_64", "copy_64")
    (tmp_path / "bad_64.run.json").write_text('{"figures": 3}')
    one_error(Script(tmp_path, ["scripts/compare_runs.py", tmp_path / "bad_64"]).wait(), 1, "bad_64.run.json")
    other = ["scripts/compare_runs.py", runs / "muon_s1_64.pth", "--metric", "val_acuracy"]
    one_error(Script(tmp_path, other).wait(), 2, "val_bpb")


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_hold_the_truth(paired):
    """95 % of them, over many made-up experiments of three seeds, and never far fewer."""
    generator, hits, trials = random.Random(0), 0, 2000
    for _ in range(trials):
        shared = [generator.gauss(0, 3) if paired else 0.0 for _ in range(3)]
        before = {seed: shared[seed] + generator.gauss(1, 0.1) for seed in range(3)}
        after = {seed + (0 if paired else 10): shared[seed] + generator.gauss(1.2, 0.3) for seed in range(3)}
        found = compare_runs.difference(before, after)
        hits += abs(found.mean - 0.2) <= found.half_width
    assert 0.94 < hits / trials < 0.995


def test_one_seed_has_no_spread():
    found = compare_runs.difference({1: 2.0}, {1: 1.5})
    assert found.mean == -0.5 and found.half_width is None and compare_runs.verdict(found, "val_bpb") == "?"
