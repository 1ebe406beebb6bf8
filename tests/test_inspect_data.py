"""inspect_data.py finds every fault of the two dirty files and calls it by its name, and leaves good rows alone."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataset.chat import load_tokenizer
from dataset.cleaning import Duplicates, text_warnings
from scripts.inspect_data import Report, visible

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("MINIMIND_REAL_DATA", ROOT / ".." / "shared" / "data"))

# Words of the fault's kind -> the lines that have it. "=": a duplicate, and of which line.
ERRORS = {
    "invalid JSON": [26, 31, 40, 47, 119, 181, 202, 252, 275, 288, 294, 302, 306],
    "not an object": [43, 53, 146, 313],
    "wrong case": [58],
    'no "text" key': [61, 278],
    '"text" is not a string': [68, 110, 113, 205, 240, 269],
    "lone surrogate": [99, 243, 253, 281],
    "empty text": [105],
    "empty line": [179],
    "text of blanks only": [206, 289],
    "line of blanks only": [237],
    "duplicate JSON key": [234],
}
WARNINGS = {
    "bidi": [25],
    "very short": [36, 85, 142, 255],
    "very long": [51, 100, 177],
    "HTML": [57, 78, 87, 191, 212, 246, 274, 291],
    "mojibake": [62, 118, 161],
    "literal chat markers": [65, 194, 284, 311],
    "replacement characters": [72],
    "NFC": [77],
    "markdown": [83, 241],
    "no-break spaces": [91],
    "unbroken run": [100],
    "several scripts": [104],
    "private-use": [108],
    "byte order mark in": [114],
    "repetition": [116, 132, 279],
    "full-width": [147],
    "many newlines": [155],
    "URL only": [166],
    "digits only": [173],
    "zero-width": [187],
    "control characters": [238, 282],
    "punctuation only": [245],
    "no letters": [295],
    "compatibility ideographs": [304],
    "markers of other models": [309],
    "line separators": [316, 317],
}
EXACT = {75: 17, 117: 76, 120: 8, 121: 59, 176: 102, 201: 97, 231: 208, 244: 34, 263: 88, 273: 272, 299: 112}
NORMALISED = {56: 46, 103: 93}
NEAR = {27: 1, 32: 6, 38: 20, 45: 16, 82: 50, 84: 35, 135: 66, 154: 127, 193: 123, 216: 28, 226: 64, 262: 163}
CRLF = [71, 76, 102, 143, 163, 169, 172, 180, 183, 209, 277, 310]
NOTES = {"byte order mark before": [1], "CR LF": CRLF, "no newline at the end": [318]}
NO_FAULT = [70, 141, 197, 293]  # the table lists them so that nobody "repairs" them

SFT_ERRORS = {
    "conversation is an object": [9],
    "content is a list": [10],
    "not an object: the top level is a list": [13],
    "which tools does not list": [14, 47],
    "a tool message without a call": [16],
    "no assistant message": [18, 55],
    "empty line": [20],
    "says nothing": [21, 67],
    'no "conversations" key': [23, 39, 42],
    "conversation is a string": [24, 41],
    'has no "name"': [28],
    'unknown role "narrator"': [30],
    "ShareGPT": [31],
    "content is a number": [33],
    "tools: not valid JSON": [34],
    "tool_calls: not valid JSON": [35],
    "lone surrogate": [36],
    "content is missing or null": [38, 72, 76],
    "conversation is empty": [48],
    "conversation is null": [49],
    "invalid JSON": [54],
    "role is missing or null": [57, 63],
    "message 2: is null": [60],
    'did you mean "user"': [62, 69],
    "message 2: is a string": [75],
}
SFT_WARNINGS = {
    "literal <|im_": [6, 25, 37, 53],
    "literal <think>": [],
    "two user messages": [7],
    "last message is not from the assistant": [8],
    "not answered by a tool message": [11],
    "tool_calls is a list": [17],
    "tool_calls is empty": [21],
    "the assistant speaks first": [22, 74],
    "content is blank": [26],
    "<tool_call>": [27],
    "arguments are a JSON string": [29],
    "two assistant messages": [32],
    "tools is a list": [40],
    "control characters": [46],
    "very long": [50],
    "system message is not the first": [59],
    "second system message": [61],
    "tool_calls is one object": [65],
    "very many messages": [73],
}
SFT_EXACT, SFT_NEAR = {44: 43}, {71: 70}
SFT_NOTES = {"byte order mark before": [1], "CR LF": [5, 43, 58]}
SFT_NO_FAULT = [19]


def real(name: str) -> Path:
    if not (REAL_DATA / name).is_file():
        pytest.skip(f"{name} not found: set MINIMIND_REAL_DATA to the folder that holds it")
    return REAL_DATA / name


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def report(path: Path, kind: str, tokenizer) -> tuple[Report, dict[int, list[str]]]:
    """The report, and all faults by line, as "level: text"."""
    found = Report(path, kind, tokenizer, 512)
    by_line: dict[int, list[str]] = {}
    for (level, _), entries in found.faults.items():
        for line, text in entries:
            by_line.setdefault(line, []).append(f"{level}: {text}")
    return found, by_line


def missing(by_line: dict, expected: dict[str, list[int]], level: str) -> list[str]:
    return [
        f"line {line}: no {level} {words!r} in {by_line.get(line)}"
        for words, lines in expected.items()
        for line in lines
        if not any(text.startswith(f"{level}: ") and words in text for text in by_line.get(line, []))
    ]


def planted(title: str) -> set[int]:
    """The lines that the table below `title` in the data's README speaks of."""
    section = real("README.md").read_text(encoding="utf-8").split(f"## {title}:")[1].split("\n## ")[0]
    return {int(line) for line in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}


@pytest.mark.parametrize(
    ("name", "kind", "errors", "warnings", "notes", "same", "no_fault"),
    [
        ("messy.jsonl", "pretrain", ERRORS, WARNINGS, NOTES, (EXACT, NORMALISED, NEAR), NO_FAULT),
        ("messy_sft.jsonl", "sft", SFT_ERRORS, SFT_WARNINGS, SFT_NOTES, (SFT_EXACT, {}, SFT_NEAR), SFT_NO_FAULT),
    ],
)
def test_every_planted_fault_is_reported_by_line_and_kind(
    tokenizer, name, kind, errors, warnings, notes, same, no_fault
):
    found, by_line = report(real(name), kind, tokenizer)
    assert missing(by_line, errors, "error") + missing(by_line, warnings, "warning") == []
    for words, pairs in zip(("exact duplicate", "same text but for", "near duplicate"), same, strict=True):
        copies = {
            line: int(match[1])
            for line, texts in by_line.items()
            for text in texts
            if words in text and (match := re.search(r"of line (\d+)", text))
        }
        assert copies == pairs, words
    for words, lines in notes.items():
        assert [found.notes[note] for note in found.notes if words in note] == [lines]
    # The lists above are complete, and no other row is called unusable.
    listed = {line for group in (errors, warnings, notes) for lines in group.values() for line in lines}
    assert planted(name) == listed.union(no_fault, *same)
    wrong = {line for lines in errors.values() for line in lines}
    assert {line for line, texts in by_line.items() if any(t.startswith("error") for t in texts)} == wrong
    assert not set(no_fault) & set(by_line)
    # Of the rows that nobody touched, few may look odd.
    assert len(set(by_line) - planted(name)) <= 0.02 * found.lines
    assert found.lines == found.used + len(wrong)


@pytest.mark.parametrize(
    ("name", "kind"), [("pretrain_real_val.jsonl", "pretrain"), ("sft_real.jsonl", "sft"), ("dpo_real.jsonl", "dpo")]
)
def test_good_data_has_no_errors_and_few_warnings(tokenizer, name, kind):
    found, by_line = report(real(name), kind, tokenizer)
    assert found.used == found.lines and found.warned <= 0.03 * found.lines
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


def test_near_duplicate_of_any_language_and_only_near_ones():
    english = "The old man walked along the river every morning and fed the ducks with bread from his own table there."
    chinese = "老人每天早上沿着河边散步，用自己桌上的面包喂鸭子，然后坐在长椅上看报纸，直到太阳升得很高才回家。"
    seen = Duplicates()
    assert [seen.check(1, english), seen.check(2, chinese)] == [None, None]
    assert "near duplicate: of line 1" in seen.check(3, english.replace("morning", "evening")).text
    assert "near duplicate: of line 2" in seen.check(4, chinese.replace("报纸", "小说")).text
    assert "exact duplicate: of line 1" in seen.check(5, english).text
    assert "same text" in seen.check(6, f" {english.upper()}\n").text
    assert (
        seen.check(7, "A young woman ran through the city every evening and sold flowers to the people there.") is None
    )


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
        (None, [], 1, "no such file"),
        ("", [], 1, "empty"),
        ('{"a": 1}\n', [], 1, "--kind"),
        ('{"text": "hello"}\n', ["--row", "2"], 1, "no line 2"),
        ('{"text": "hello"}\n', ["--row", "0"], 2, "counted from 1"),
        ('{"text": "hello"}\n', ["--tokenizer", "/nowhere"], 1, "no tokenizer"),
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
