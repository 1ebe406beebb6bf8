"""A world of one's own: a folder becomes training files, or a line says what is missing.

pytest tests/test_own_world.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.checks import conversation_faults
from evaluation.scoreboard import read_heldout

ROOT = Path(__file__).resolve().parents[1]
HARBOUR = ROOT / "tests" / "fixtures" / "own_world"


def make(world: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dataset.starter", "--world", str(world), "--out", str(out), "--size", "0.1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_becomes_a_corpus(tmp_path):
    done = make(HARBOUR, tmp_path)
    assert done.returncode == 0, done.stderr
    held, sft = read_heldout(tmp_path / "heldout.jsonl"), rows(tmp_path / "sft.jsonl")
    assert {question.skill for question in held} == {"facts", "follow_up", "identity", "small_talk", "outside"}
    assert len(sft) > 5000 and not [fault for row in sft for fault in conversation_faults(row)]
    trained = {json.dumps(row["conversations"][:-1]) for row in sft}
    assert not [question for question in held if json.dumps(question.messages) in trained]
    text = (tmp_path / "pretrain.jsonl").read_text(encoding="utf-8")
    for fact in ("Die Krake fährt unter Otto Riff.", "Die Welle hat Segel in weiß.", "In Kiel liegt die Adler."):
        assert fact in text
    asked = [row["conversations"][-2]["content"] for row in sft]
    assert (
        sum(map(str.islower, asked)) > 500 and sum(question.startswith("Hafen ") for question in asked) > 20
    )  # as typed
    again = make(HARBOUR, tmp_path / "again")
    assert (
        again.returncode == 0
        and (tmp_path / "again" / "sft.jsonl").read_bytes() == (tmp_path / "sft.jsonl").read_bytes()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda world: (world / "ships.tsv").unlink(), "ships.tsv: No such file"),
        (lambda world: (world / "world.json").write_text("{"), "world.json: JSONDecodeError"),
        (lambda world: edit(world, lambda spec: spec.pop("declines")), "declines"),
        (lambda world: edit(world, lambda spec: spec["relations"]["port"].pop("short")), "short"),
        (
            lambda world: edit(world, lambda spec: spec["relations"]["port"].update(questions=["{k}?"])),
            "questions: needs",
        ),
        (lambda world: edit(world, lambda spec: spec["relations"]["port"].update(short="Hafen")), "port: short"),
        (lambda world: edit(world, lambda spec: spec.update(declines="Nein.")), "declines: must be a list"),
        (lambda world: edit(world, lambda spec: spec["identity"][0].update(answers=[])), "identity 1: answers: is"),
        (lambda world: edit(world, lambda spec: spec.update(small_talk=[])), "small_talk: is empty"),
        (lambda world: edit(world, lambda spec: spec.update(outside=["Was?"] * 3)), "outside: needs"),
        (lambda world: edit(world, lambda spec: spec.update(relations=[])), "AttributeError"),
        (lambda world: edit(world, lambda spec: spec["relations"]["port"].update(value="hafn")), "hafn"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, change, said):
    shutil.copytree(HARBOUR, tmp_path / "world")
    change(tmp_path / "world")
    done = make(tmp_path / "world", tmp_path / "out")
    assert done.returncode == 1 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and ("own_world.md" in done.stderr or "needs" in done.stderr)


def edit(world: Path, change) -> None:
    spec = json.loads((world / "world.json").read_text(encoding="utf-8"))
    change(spec)
    (world / "world.json").write_text(json.dumps(spec), encoding="utf-8")
