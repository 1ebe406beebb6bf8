"""inspect_data.py finds every fault of the two dirty files and calls it by its name, and leaves good rows alone."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataset.chat import load_tokenizer
from dataset.cleaning import text_warnings
from dataset.files import DataFile
from scripts.inspect_data import Report, visible
from tests.samples import assistant, dumps, messy_chats, messy_text, real_chats, real_texts

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def report(path: Path, kind: str, tokenizer) -> tuple[Report, dict[int, list[str]]]:
    """The report, and all faults by line, as "level: text"."""
    found = Report(DataFile(path), kind, tokenizer, 8192)
    by_line: dict[int, list[str]] = {}
    for (level, _), entries in found.faults.items():
        for line, text in entries:
            by_line.setdefault(line, []).append(f"{level}: {text}")
    return found, by_line


@pytest.mark.parametrize(("make", "kind"), [(messy_text, "pretrain"), (messy_chats, "sft")])
def test_every_planted_fault_is_reported_by_line_and_kind(tokenizer, tmp_path, make, kind):
    dirty, path = make(), tmp_path / "dirty.jsonl"
    path.write_bytes(dirty.content())
    found, by_line = report(path, kind, tokenizer)
    for line, level, words in dirty.planted:
        faults = by_line.get(line, [])
        assert any(text.startswith(f"{level}: ") and words in text for text in faults), (line, level, words, faults)
    for words in ("exact duplicate", "same text but for", "near duplicate"):
        pattern = re.compile(rf"{words}.*of line (\d+)")
        found_copies = {n: int(m[1]) for n, texts in by_line.items() for text in texts if (m := pattern.search(text))}
        assert found_copies == dirty.copies.get(words, {}), words
    for words, lines in dirty.notes.items():
        assert [found.notes[note] for note in found.notes if words in note] == [lines]
    # No other row is called unusable, and of the rows that nobody touched none looks odd.
    wrong = set(dirty.faults("error"))
    assert {line for line, texts in by_line.items() if any(t.startswith("error") for t in texts)} == wrong
    copies = {line for pairs in dirty.copies.values() for line in pairs}
    assert set(by_line) == {line for line, *_ in dirty.planted} | copies
    assert found.lines == found.used + len(wrong) == len(dirty.lines)


@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo"])
def test_good_data_has_no_errors_and_few_warnings(tokenizer, tmp_path, kind):
    rows = {
        "pretrain": [{"text": text} for text in real_texts()],
        "sft": [{"conversations": chat} for chat in real_chats()],
        "dpo": [{"chosen": chat, "rejected": [*chat[:-1], assistant("No. 不。")]} for chat in real_chats()],
    }[kind]
    path = tmp_path / "good.jsonl"
    path.write_text("".join(dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, by_line = report(path, kind, tokenizer)
    assert found.used == found.lines == len(rows) and len(found.warned_lines) <= 0.03 * found.lines
    assert all(text.startswith("warning") for texts in by_line.values() for text in texts)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Das ist für mich Ã¼ber alles", "mojibake"),
        ("Hello\u00adworld, this is text", "soft hyphens"),
        ("page one\rpage two", "carriage returns"),
        ("<|endoftext|> was here", "literal chat markers"),
        ("[INST] do this [/INST] now", "markers of other models"),
        ("Tom &amp; Jerry are friends", "HTML"),
        ("ab" * 300, "repetition"),
    ],
)
def test_text_warning(text, kind):
    assert kind in [fault.text.split(":")[0] for fault in text_warnings(text)]


@pytest.mark.parametrize(
    "text",
    [
        "Café, naïve, Straße, señor, çà et là: 20 °C £5 “quoted” — all fine.",
        "一家人👨‍👩‍👧‍👦去看🇨🇳比赛，👍🏽都来加油，❤️‍🔥冲鸭！",
        "𠮷野家在㐂的旁边，𪚥是龙字。今天天气很好，我们去公园散步。",
        "if a < b and c > d then x = a | b, so a <- b.",
        "He said: [see page 3] (and left).\n\nThe end came soon.",
        "锟 is a rare character, and 烫 means hot: 烫烫 your food.",
        "谨慎地驾驶，铭记历史，谐音，调皮，课程，请假，诸位，谢谢，证明，评论",
    ],
)
def test_good_text_has_no_warning(text):
    assert text_warnings(text) == []


# The script as its user meets it


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd="/")


def test_help_is_quick():
    started = time.monotonic()
    assert "--row" in run("--help").stdout
    assert time.monotonic() - started < 3


def test_row_shows_each_token_with_its_label(tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "a <|im_end|> 𠮷"}, {"role": "assistant", "content": "yes\n😀"}]
    path.write_text("\n" + json.dumps({"conversations": messages}) + "\n")
    lines = run(str(path), "--row", "2").stdout.splitlines()
    assert "sft" in lines[0] and "warning: message 1: content has literal <|im_end|>" in lines[1]
    tokens = [line[15:] for line in lines if re.match(r" +\d+ +\d+ [* ] ", line)]
    marks = [line[15] for line in lines if re.match(r" +\d+ +\d+ [* ] ", line)]
    assert [token[2:] for token in tokens].count("<|im_end|>") == 2  # the user's own one is plain text
    assert tokens[0][2:] == "<|im_start|>" and marks[0] == " "
    start = marks.index("*")
    assert "".join(marks).strip() == "*" * marks.count("*") and tokens[start - 1][2:] == r"'\n'"
    assert tokens[start + marks.count("*") - 1][2:] == "<|im_end|>"
    skipped = run(str(path), "--row", "1").stdout
    assert "error: empty line" in skipped and "Training skips this row" in skipped


def test_tokens_are_printed_so_that_nothing_is_hidden(tokenizer):
    pieces = [visible(tokenizer, token) for token in tokenizer.encode("a\tb\u200b 汉𪚥").ids]
    assert "".join(pieces).isprintable()
    data = b"".join(
        eval("b" + piece) if r"\x" in piece and "\\u" not in piece else eval(piece).encode() for piece in pieces
    )
    assert data.decode() == "a\tb\u200b 汉𪚥"


@pytest.mark.parametrize(
    ("content", "options", "code", "words"),
    [
        (None, [], 1, "f.jsonl"),
        ("", [], 1, "f.jsonl"),
        ('{"a": 1}\n', [], 1, "--kind"),
        ('{"text": "hello"}\n', ["--row", "2"], 1, "2"),
        ('{"text": "hello"}\n', ["--row", "0"], 2, "--row"),
        ('{"text": "hello"}\n', ["--tokenizer", "/nowhere"], 1, "nowhere"),
        ('{"text": "hello"}\n', ["--colour"], 2, "--colour"),
        ('{"a": 1}\n', ["--kind", "pretrain"], 0, ""),
        ('{"chosen": {}, "rejected": {"a": 1}}\n{"chosen": 3}\n', [], 0, ""),
        ("[]\n", ["--kind", "dpo"], 0, ""),
    ],
)
def test_user_mistake_is_one_line(tmp_path, content, options, code, words):
    path = tmp_path / "f.jsonl"
    if content is not None:
        path.write_text(content)
    result = run(str(path), *options)
    assert result.returncode == code and "Traceback" not in result.stderr
    if code == 1:
        assert re.fullmatch(rf"error: .*{words}.*\n", result.stderr)
    else:
        assert words in result.stderr
