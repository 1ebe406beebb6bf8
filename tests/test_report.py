"""--markdown of the benchmarks: what it appends, and what it says about the machine: `pytest tests/test_report.py`."""

import subprocess
import sys
from pathlib import Path

import _report
import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_a_section_is_appended_with_what_it_takes_to_repeat_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "benchmark.py"), "train", "--preset", "nano"])
    path = tmp_path / "docs" / "speed.md"
    _report.append_markdown(path, "train", {"tokens_per_second": 12.5, "ratio": None, "int8": {"megabytes": 3}})
    _report.append_markdown(path, "decode", {"tokens_per_second": 7})
    text = path.read_text()
    assert text.count("### ") == 2 and text.index("### train") < text.index("### decode")
    for row in ("| tokens_per_second | 12.5 |", "| int8 megabytes | 3 |", "| tokens_per_second | 7 |"):
        assert f"{row}\n" in text
    assert "ratio" not in text and "`python scripts/benchmark.py train --preset nano`" in text
    for name in ("machine", "commit", "torch", "command"):
        assert text.count(f"| {name} | ") == 2


def test_the_commit_is_unknown_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(_report, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert _report.commit() == "unknown"


@pytest.mark.slow
def test_a_benchmark_writes_its_figures(tmp_path):
    command = [sys.executable, "scripts/benchmark.py", "decode", "--compile", "0", "--new_tokens", "4", "--repeat", "1"]
    done = subprocess.run([*command, "--markdown", tmp_path / "a.md"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens_per_second" in done.stdout and "| tokens_per_second | " in (tmp_path / "a.md").read_text()
