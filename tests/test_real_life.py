"""scripts/real_life.py: one's own texts and conversations become a model that chats, or a line says what is missing.

pytest tests/test_real_life.py
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = "sun rain snow wind river stone tree bird fish road".split()


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "real_life.py", *arguments]
    return subprocess.run(map(str, command), capture_output=True, encoding="utf-8", timeout=240)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(count: int) -> list[dict]:
    rng = random.Random(0)
    return [{"text": f"The {' and the '.join(rng.choices(WORDS, k=12))}."} for _ in range(count)]


def chats(count: int) -> list[dict]:
    rng = random.Random(1)
    pairs = [(f"Say {word} {n}", f"{word} {n}") for n in range(count) for word in [rng.choice(WORDS)]]
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


@pytest.mark.slow
def test_own_files_become_a_model_and_a_table(tmp_path):
    files = write(tmp_path / "texts.jsonl", texts(300)), write(tmp_path / "chats.jsonl", chats(200))
    done = run(*files, "--minutes", "0.2", "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines() if "  " in line}
    for stage, rows in (("pretraining", "300"), ("fine-tuning", "200")):
        name, count, _, before, after = table[stage]
        assert count == rows and float(after) < float(before)
    kept = [json.loads(line) for line in (tmp_path / "out/data/sft_val.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == 4 and kept[0]["conversations"][0]["content"] in done.stdout  # it was asked
    trained = (tmp_path / "out/data/sft.jsonl").read_text("utf-8")
    assert not any(json.dumps(row) in trained for row in kept)
    assert (tmp_path / "out/full_sft_256.pth").is_file()


def test_too_little_or_nothing_to_read_is_one_line(tmp_path):
    for rows, said in ((texts(20), "20 texts and 0 conversations"), ([{"a": 1}] * 200, "no row with a text")):
        done = run(write(tmp_path / "few.jsonl", rows), "--out_dir", tmp_path / "out")
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
