"""clean_data.py: every planted fault is mended or taken out with its reason, good rows stay, nothing is lost."""

import csv
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset import filters
from dataset.checks import validate_messages
from dataset.clean_files import Job, clean_files
from dataset.clean_rows import Cleaner, Plan
from dataset.files import DataError
from dataset.ngrams import units_of
from dataset.overlap import QuestionGrams, overlap
from dataset.repair import ROW_REPAIRS, TEXT_REPAIRS, has_ftfy, repair_messages, repair_text
from dataset.tables import data_files
from scripts import clean_data
from tests.samples import assistant, dumps, messy_chats, messy_text, real_chats, real_texts, row, system, tool, user

ROOT = Path(__file__).resolve().parent.parent
REPAIRS = [name for name in {**TEXT_REPAIRS, **ROW_REPAIRS} if name != "simplify"]


def plan(kind: str = "pretrain", off: tuple = (), questions: tuple = (), **settings) -> Plan:
    repairs = [name for name in REPAIRS if name not in off]
    return Plan(filters.Settings(kind, off=off, **settings), repairs, off, questions)


def cleaned(lines: list[bytes], **options) -> tuple[dict[int, dict], dict[int, str]]:
    """(rows that stay by line, rule of the others by line), without duplicates."""
    done = Cleaner(plan(**options)).clean(list(enumerate(lines, 1)))
    rows = [json.loads(line) for line in done.data.decode().split("\n")[:-1]]
    return dict(zip(done.numbers.tolist(), rows, strict=True)), {entry.number: entry.rule for entry in done.removed}


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "clean_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **options)


# Faults of rows


MENDED = {
    *("wrong case", "HTML", "bidi", "NFC", "no-break", "soft hyphens", "private-use", "byte order mark", "full-width"),
    *("zero-width", "many newlines", "control", "compatibility", "line separators"),
}
MENDED_CHATS = {
    *(
        "tool_calls is",
        "arguments are a JSON string",
        "tools is a list",
        "control",
        "last message is not",
        "literal <|im_",
    ),
    *("the assistant speaks first", "two user", "two assistant", "second system", "<tool_call>", "content is a list"),
    "not an object",
}
LEFT = {"literal chat markers", "markers of other models", "markdown", "very long", "several scripts"}


def test_every_fault_of_a_dirty_file_is_mended_or_taken_out():
    dirty = messy_text()
    kept, removed = cleaned(dirty.content().split(b"\n"))
    for line, level, words in dirty.planted:
        if removed.get(line, "").startswith(("repeated", "top", "duplicate")):
            continue  # some planted texts say the same twice
        if any(name in words for name in MENDED) or words in ("not an object", '"text" is not a string'):
            assert line in kept or removed[line] in ("row", "short"), (line, words)
        elif not any(name in words for name in LEFT):
            assert line in removed, (line, words, kept.get(line))
        if level == "error" and line in removed:
            assert removed[line] in ("row", "short"), (line, words, removed[line])
    texts = [row["text"] for row in kept.values()]
    for bad in (
        "\u202e",
        "\u200b",
        "\xa0",
        "\u2028",
        "\u0085",
        "\ufeff",
        "\0",
        "\x1b",
        "<div",
        "<p>",
        "&nbsp;",
        "var a",
        "ｗ",
    ):
        assert not any(bad in text for text in texts), bad
    good = set(range(1, len(dirty.lines) + 1)) - {line for line, *_ in dirty.planted}
    wrongly = {line: rule for line, rule in removed.items() if line in good}
    assert len(wrongly) <= 0.04 * len(good), wrongly
    assert set(dirty.harmless) - kept.keys() <= {line for line in dirty.harmless if len(dirty.lines[line - 1]) < 90}


def test_every_fault_of_dirty_chats_is_mended_or_taken_out():
    dirty = messy_chats()
    kept, removed = cleaned(dirty.content().split(b"\n"), kind="sft")
    for line, _, words in dirty.planted:
        if any(name in words for name in MENDED_CHATS) and line in kept:
            left = [fault for fault in validate_messages(kept[line]["conversations"]) if "literal" not in fault.text]
            assert not left, (words, left)
        elif words not in ("very long", "very many"):  # within the limits
            assert line in removed, (line, words)
    good = set(range(1, len(dirty.lines) + 1)) - {line for line, *_ in dirty.planted}
    assert not good & removed.keys()


def test_repaired_text_is_what_it_was_before_it_was_spoilt():
    for text in real_texts()[::5]:
        text = repair_text(text, REPAIRS)[0]
        spoilt = {
            "html": "<div class='a'><p>" + text.replace("&", "&amp;").replace("\n", "</p>\n<p>") + "</p></div>",
            "control": "\u200b".join(text) + "\u202e\0",
            "blanks": text.replace("\n", "  \r\n").replace(" ", "\u00a0") + "\n\n\n\n\n\n ",
        }
        for name, bad in spoilt.items():
            assert "".join(repair_text(bad, REPAIRS)[0].split()) == "".join(text.split()), name
        assert repair_text(text, REPAIRS) == (text, [])  # what is clean stays as it is


@pytest.mark.parametrize(
    "text",
    [
        "一家人👨‍👩‍👧‍👦去看🇨🇳比赛，👍🏽都来加油，❤️‍🔥冲鸭！",
        "𠮷野家在㐂的旁边，𪚥是龙字。",
        "if a < b and c > d then x = a | b, so a <- b.",
        "He said <|im_end|> and [INST] and </s>, and nothing happened.",
        "def f(x):\n    return x\n\n\nprint('<b>bold</b>')\nx = f(3)",
    ],
)
def test_good_text_stays_as_it_is(text):
    assert repair_text(text, REPAIRS) == (text, [])


@pytest.mark.skipif(not has_ftfy(), reason="needs ftfy")
def test_mojibake_is_decoded_again():
    text = "Das ist für mich über alles schön."
    assert repair_text(text.encode().decode("cp1252"), ["mojibake"]) == (text, ["mojibake"])


def test_traditional_to_simplified_if_asked_for():
    pytest.importorskip("opencc")
    assert repair_text("漢語與電腦, in English", ["simplify"]) == ("汉语与电脑, in English", ["simplify"])
    assert repair_text("漢語與電腦", REPAIRS) == ("漢語與電腦", [])


def test_utf8_read_as_gbk_is_decoded_again():
    text = "这是一段很长的中文，用来看看被错读成国标码的文字能不能修好。"
    spoilt = text.encode("utf-8").decode("gb18030", "ignore")
    if spoilt.encode("gb18030") == text.encode("utf-8"):
        assert repair_text(spoilt, ["mojibake"]) == (text, ["mojibake"])
    for good in real_texts():
        assert repair_text(good, ["mojibake"]) == (good, [])


def test_turns():
    def turns(*messages):
        return repair_messages(list(messages), REPAIRS)[0]

    hello, answer = user("Hello"), assistant("Hi, how are you?")
    assert turns(hello, answer, answer) == [hello, answer]
    assert turns(hello, assistant("Hi,"), answer) == [hello, answer]
    assert turns(hello, user("Anyone?"), answer) == [user("Hello\nAnyone?"), answer]
    assert turns(hello, answer, hello) == [hello, answer]
    assert turns(answer, hello, answer) == [hello, answer]
    assert turns(system("Be brief"), answer, hello, answer) == [system("Be brief"), hello, answer]
    different = [hello, answer, assistant("No.")]
    assert turns(*different) == different  # which one is meant nobody knows: the rule conversation takes the row out
    call = assistant("", tool_calls='[{"name": "f", "arguments": {}}]')
    assert turns(hello, call, tool("a"), tool("a"), answer) == [hello, call, tool("a"), tool("a"), answer]
    thought = turns(hello, assistant("<think>\nwell\n</think>\n\nHi"))[1]
    assert thought == {"role": "assistant", "content": "Hi", "reasoning_content": "well"}


# Rules


def test_rules_of_english_do_not_take_out_chinese_and_few_good_texts():
    texts = real_texts()
    units = units_of(texts)
    languages = filters.languages_of(texts, units)
    assert {"zh", "en"} == set(languages)
    for n, text in enumerate(texts):
        chinese = sum("\u4e00" <= char <= "\u9fff" for char in text) / len(text)
        assert languages[n] == ("zh" if chinese > 0.3 else "en")
    out = {n: rule for n, rule, _ in filters.failures(texts, units, languages, filters.Settings("pretrain"))}
    for language in ("zh", "en"):
        those = [n for n in range(len(texts)) if languages[n] == language]
        assert len(those) > 5 and sum(n in out for n in those) <= 0.05 * len(those), out
    # The rules of English alone would take out what is Chinese: that the profile is chosen by row is what saves it.
    english = filters.failures(texts, units, ["en"] * len(texts), filters.Settings("pretrain"))
    chinese = {n for n in range(len(texts)) if languages[n] == "zh"}
    assert len(chinese & {n for n, *_ in english}) > 0.5 * len(chinese)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("language", "Это русский текст о том, как мы живём, и о том, что будет потом с нами всеми."),
        ("replacement", "这里丢了\ufffd一个字，再也找不回来了，真是可惜得很。"),
        ("urls", "See https://example.org/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/b?c=d for more of the same"),
        ("short", "一句话。"),
        ("long", "今天天气很好，我们去公园散步。" * 8000),
        ("unbroken", "a word and then " + "AbCd3" * 300),
        ("word_length", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3),
        ("word_length_max", "internationalisation incomprehensibility " * 40),
        ("letters", "1 2 3 4 5 6 7 8 9 10 11 12 one two"),
        ("symbols", "# one # two # three # four # five # six # seven"),
        ("bullets", "\n".join(f"- point number {n} of the list" for n in "abcdefgh")),
        ("ellipsis_lines", "\n".join(f"And that is how the very long story {n} begins..." for n in "abcdefgh")),
        ("line_punctuation", "\n".join(f"another line of the menu named {n}{n}{n} with things" for n in "abcdefghijk")),
        ("short_lines", "\n".join(f"Item {n}." for n in "abcdefgh")),
        ("duplicate_lines", "The same line is here again.\nAnd then here is one more.\n" * 2),
        ("top_2gram", "buy now and save. " * 30),
        ("lorem_ipsum", "Lorem ipsum dolor sit amet, and so on to the end of it."),
        ("mojibake", "锟斤拷锟斤拷，这就是乱码的样子，没有办法了。"),
        ("blocked", "There is a badword in this line of text."),
    ],
)  # fmt: skip
def test_rule_takes_out_what_it_is_for_and_can_be_switched_off(rule, text):
    options = {"blocked": filters.blocked_pattern(["badword", "坏词"])}
    assert list(cleaned([dumps({"text": text}).encode()], **options)[1].values()) == [rule]
    others = tuple(name for name in filters.RULES if name != rule)
    assert list(cleaned([dumps({"text": text}).encode()], off=others, **options)[1].values()) == [rule]
    assert not cleaned([dumps({"text": text}).encode()], off=tuple(filters.RULES), **options)[1]


def test_shares_of_repeated_runs_are_those_of_a_plain_count():
    words = ["a b c d e f g " * 10 + "and then something else happens to them all in the end", *real_texts()[:30]]
    units = units_of(words)
    shares = filters._Shares(words, units, ["en"] * len(words))
    for n in (2, 5):
        for index in range(len(words)):
            if not shares.long[index]:
                continue
            own = [h for h, t in zip(units.hashes.tolist(), units.text, strict=True) if t == index]
            lengths = units.lengths[units.text == index]
            seen, covered, counts = set(), np.zeros(len(own), bool), {}
            for i in range(len(own) - n + 1):
                gram = tuple(own[i : i + n])
                counts[gram] = counts.get(gram, 0) + int(lengths[i : i + n].sum())
                covered[i : i + n] |= gram in seen
                seen.add(gram)
            repeated = lengths[covered].sum() / lengths.sum()
            assert shares.repeated(5)[index] == pytest.approx(repeated) if n == 5 else True
            if n == 2:
                several = [
                    size for gram, size in counts.items() if list(zip(own, own[1:], strict=False)).count(gram) > 1
                ]
                assert shares.top(2)[index] == pytest.approx(min(max(several, default=0) / lengths.sum(), 1))


# Files


def test_same_output_for_any_number_of_processes(tmp_path):
    path = tmp_path / "raw.jsonl"
    texts = real_texts()
    with open(path, "w", encoding="utf-8") as file:
        for n in range(40):
            file.writelines(dumps({"text": f"{n} {text} {n * 7919}" if n % 3 else text}) + "\n" for text in texts)
    assert path.stat().st_size > 4 << 20  # or one process would do it all
    outputs = []
    for processes in (1, 3):
        out = tmp_path / f"{processes}" / "clean.jsonl"
        job = Job(plan(), [path], out, tmp_path / f"{processes}.removed", 0.1, num_proc=processes)
        clean_files(job)
        outputs.append([file.read_bytes() for file in (out, job.held_out, job.removed)])
        assert sorted(file.name for file in out.parent.iterdir()) == ["clean.jsonl", "clean.val.jsonl"]
    assert outputs[0] == outputs[1]
    lines = sum(part.count(b"\n") for part in outputs[0])
    assert lines == 40 * len(texts)  # kept, held out or removed: nothing is lost


def test_formats_and_encodings(tmp_path):
    texts = [text for text in real_texts() if len(text) > 200 and not text.isascii()][:12]
    texts.sort(key=lambda text: text.count(" ") / len(text))  # Chinese first
    (tmp_path / "in").mkdir()
    rows = [dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "in" / "a.jsonl").write_bytes("".join(rows[:2]).encode("gb18030"))
    (tmp_path / "in" / "b.jsonl").write_bytes("".join(rows[2:4]).encode("utf-16"))
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress("".join(rows[4:6]).encode()))
    with open(tmp_path / "in" / "d.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *((n, text) for n, text in enumerate(texts[6:8]))])
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"content": texts[8:10]}), tmp_path / "in" / "e.parquet")
    (tmp_path / "in" / "f.txt").write_text(
        "\n".join(text.replace("\n", " ") for text in texts[10:12]), encoding="utf-8"
    )
    job = Job(plan(off=tuple(filters.RULES)), data_files([str(tmp_path / "in")]), tmp_path / "out.jsonl.zst")
    report = clean_files(job)
    with pa.CompressedInputStream(str(job.out), "zstd") as file:
        found = [json.loads(line)["text"] for line in file.read().decode().splitlines()]
    assert [" ".join(text.split()) for text in found] == [" ".join(text.split()) for text in texts]
    assert [source["format"] for source in report["sources"].values()] == [
        "GB18030", "UTF-16", "gzip", "CSV", "Parquet", "plain text by line"]  # fmt: skip


def test_questions_of_a_table_without_names_are_all_found(tmp_path):
    texts = [text[:200].replace("\n", " ") for text in real_texts() if len(text) > 300][:3]
    table = tmp_path / "subject_test.csv"  # as MMLU is published
    with open(table, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([text, "one", "two", "three", "four", "A"] for text in texts)
    assert overlap(texts, [table]).per_question[0] is False  # the first row is taken for the names of columns
    grams = QuestionGrams(clean_data.questions_of(table))
    assert {text for text, _ in grams.hits(texts)} == {0, 1, 2}


def test_against_earlier_output_and_questions(tmp_path):
    texts = [text for text in real_texts() if len(text) > 300]
    for name, part in (("old", texts[:5]), ("new", texts[3:12])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(dumps({"text": text}) + "\n" for text in part), encoding="utf-8"
        )
    asked = texts[8][50:200]
    job = Job(plan(off=tuple(filters.RULES), questions=(asked,)), [tmp_path / "new.jsonl"], tmp_path / "out.jsonl")
    job.against = [tmp_path / "old.jsonl"]
    report = clean_files(job)
    assert {rule: entry["rows"] for rule, entry in report["removed"].items()} == {"exact": 2, "overlap": 1}
    assert [json.loads(line)["text"] for line in open(job.out, encoding="utf-8")] == [*texts[5:8], *texts[9:12]]


def test_held_out_documents_are_the_same_whatever_else_is_there(tmp_path):
    texts = real_texts()
    held = []
    for name, part in (("all", texts), ("half", texts[::-2])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
        job = Job(plan(off=tuple(filters.RULES)), [path], tmp_path / name / "out.jsonl", holdout=0.3)
        clean_files(job)
        held.append({json.loads(line)["text"] for line in open(job.held_out, encoding="utf-8")})
        rest = {json.loads(line)["text"] for line in open(job.out, encoding="utf-8")}
        assert not held[-1] & rest
    assert held[1] == held[0] & {repair_text(text, REPAIRS)[0] for text in texts[::-2]}
    assert 0.15 < len(held[0]) / len(texts) < 0.45


# The script as its user meets it


def test_report_and_removed_rows(tmp_path):
    path = tmp_path / "chats.jsonl"
    chats = [row(*chat) for chat in real_chats()[:30]]
    path.write_text("\n".join([*chats, chats[0], row(user("a")), "{broken"]) + "\n", encoding="utf-8")
    result = run(path, "--out", tmp_path / "out.jsonl", "--removed", tmp_path / "removed.jsonl")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["kind"] == "sft" and report["removed"]["exact"]["rows"] == 1 and report["removed"]["row"]["rows"] == 2
    removed = [json.loads(line) for line in open(tmp_path / "removed.jsonl", encoding="utf-8")]
    assert [(entry["line"], entry["rule"]) for entry in removed] == [(32, "row"), (33, "row"), (31, "exact")]
    assert removed[2]["why"] == f"of {path} 1" and removed[1]["row"] == "{broken"
    assert sum(1 for _ in open(tmp_path / "out.jsonl", "rb")) == 30
    assert "| exact | 1 |" in (tmp_path / "out.report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--out"),
        (["FILE", "--out", "x.txt"], 2, "jsonl"),
        (["FILE", "--out", "OUT", "--off", "colour"], 2, "colour"),
        (["FILE", "--out", "OUT", "--set", "short=many"], 2, "many"),
        (["FILE", "--out", "OUT", "--languages", "fr"], 2, "fr"),
        (["FILE", "--out", "OUT", "--holdout", "2"], 2, "--holdout"),
        (["FILE", "--out", "FILE"], 2, "read"),
        (["/nowhere.jsonl", "--out", "OUT"], 1, "nowhere"),
        (["/nowhere/*.jsonl", "--out", "OUT"], 1, "pattern"),
        (["EMPTY", "--out", "OUT"], 1, "empty"),
        (["CUT", "--out", "OUT"], 1, "ended before"),
        (["EMPTY", "--kind", "sft", "--out", "OUT"], 1, "empty"),
        (["FOLDER", "--out", "OUT"], 1, "no data in this folder"),
        (["FILE", "--kind", "sft", "--out", "OUT"], 1, "none of the rows"),
        (["FILE", "--out", "OUT", "--blocked", "/nowhere.txt"], 1, "nowhere"),
        (["FILE", "--out", "/proc/nothing/x.jsonl"], 1, "cannot be written"),
        (["FILE", "--out", "OUT", "--removed", "/dev/full"], 1, "No space left"),
    ],
)
def test_user_mistake_is_one_line_and_leaves_nothing(tmp_path, arguments, code, words, monkeypatch, capsys):
    names = {"FILE": tmp_path / "f.jsonl", "OUT": tmp_path / "out.jsonl", "EMPTY": tmp_path / "e.jsonl",
             "FOLDER": tmp_path / "folder", "CUT": tmp_path / "c.csv.gz"}  # fmt: skip
    names["FILE"].write_text('{"text": "A row that is good enough to stay."}\n{"text": "no"}\n')
    names["EMPTY"].touch()
    names["CUT"].write_bytes(gzip.compress(b"text\nA row that is good enough to stay.\n")[:-8])
    names["FOLDER"].mkdir()
    names["OUT"].write_text("earlier\n")
    script = ["clean_data.py", *(str(names.get(argument, argument)) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", script)
    with pytest.raises(SystemExit if code == 2 else DataError) as raised:
        clean_data.main()
    said = capsys.readouterr().err if code == 2 else f"{raised.value}\n"
    assert len(said.splitlines()) == 1 and words in said
    assert names["OUT"].read_text() == "earlier\n" and not list(tmp_path.glob("*.tmp"))


def test_full_disk_is_one_line(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(dumps({"text": text}) + "\n" for text in real_texts()), encoding="utf-8")

    def limit():  # no file may grow beyond this: writing then fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    removed = tmp_path / "removed.jsonl"
    removed.write_text("earlier\n")
    result = run(path, "--out", tmp_path / "out.jsonl", "--removed", removed, preexec_fn=limit)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cannot be written: File too large" in result.stderr.splitlines()[-1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f.jsonl", "removed.jsonl"]
    assert removed.read_text() == "earlier\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_one_line(tmp_path):
    path, folder = tmp_path / "f.jsonl", tmp_path / "fixed"
    path.write_text('{"text": "A row that is good enough to stay."}\n')
    folder.mkdir(mode=0o500)
    result = run(path, "--out", folder / "out.jsonl")
    assert result.returncode == 1 and "cannot be written: Permission denied" in result.stderr.splitlines()[-1]


def children(pid: int) -> list[int]:
    """Processes that this one started and that clean rows."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_killed_worker_is_one_line_and_leaves_nothing(tmp_path):
    path = tmp_path / "raw.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for n in range(300):
            file.writelines(dumps({"text": f"{n} {text}"}) + "\n" for text in real_texts())
    command = [
        sys.executable,
        ROOT / "scripts" / "clean_data.py",
        path,
        "--out",
        tmp_path / "o.jsonl",
        "--num_proc",
        "2",
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (workers := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert "a worker process was killed" in errors.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["raw.jsonl"]
