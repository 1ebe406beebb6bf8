"""Data files as people have them: read where there is one way to read them, else refused with what they are and the
remedy: `pytest tests/test_data_files.py`."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dataset import files
from dataset.cache import content_hash
from dataset.chat import load_tokenizer
from dataset.files import DataError, DataFile
from dataset.jsonl import parse_line, read_jsonl
from dataset.lm_dataset import preference_dataset, pretrain_dataset, sft_dataset, summary
from model import checkpoint
from tests.processes import ROOT, Script

CHINESE = [
    "第{}个箱子是蓝色的，放在桌子下面。",
    "你好，我叫小明{}，今年十岁了。",
    "请问去火车站怎么走{}？谢谢你的帮助。",
]
ROWS = [{"text": CHINESE[n % 3].format(n)} for n in range(40)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False)
LISTED = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n]\n"
PRETTY = json.dumps(ROWS, ensure_ascii=False, indent=2)
OBJECTS = "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS)
COMPRESSIONS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def read(path: Path, data: bytes) -> list[dict | None]:
    """The rows of a file with these bytes; their numbers are right."""
    path.write_bytes(data)
    found = list(read_jsonl(path))
    assert [number for number, _, _ in found] == [*range(1, len(found) + 1)]
    return [row for _, row, _ in found]


def refusal(path: Path, data: bytes) -> str:
    """What is said of a file that is refused, in one line that names it."""
    with pytest.raises(DataError) as error:
        read(path, data)
    text = str(error.value)
    assert text.startswith(f"{path}") and "\n" not in text
    return text


# What is read


@pytest.mark.parametrize("layout", [JSONL, ARRAY, LISTED, PRETTY, OBJECTS, ARRAY + "\n\n", f"  \n{PRETTY}\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_same_rows_of_every_layout_and_encoding(tmp_path, layout, encoding):
    if encoding in ("utf-16-le", "utf-16-be"):
        layout = layout.lstrip()
    assert read(tmp_path / "file", layout.encode(encoding)) == ROWS
    assert read(tmp_path / "file", layout.replace("\n", "\r\n").encode(encoding)) == ROWS


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_the_same_rows_of_every_compression_whatever_the_name(tmp_path, name):
    for data in (JSONL.encode(), ARRAY.encode("gb18030"), PRETTY.encode("utf-16")):
        path = tmp_path / "file.jsonl"
        assert read(path, COMPRESSIONS[name](data)) == ROWS
        assert DataFile(path).kind[0] == name
    parts = JSONL.encode().partition(b"\n")
    two = COMPRESSIONS[name](parts[0] + b"\n") + COMPRESSIONS[name](parts[2])  # as `cat a.gz b.gz` writes it
    assert read(tmp_path / "two", two) == ROWS


def test_any_json_survives_an_array_and_chunks_of_any_size(tmp_path, monkeypatch):
    rng = random.Random(0)

    def value(depth: int):
        kinds = [None, True, -1.5e-7, 123456789012345, '"\\', "], [{}", "行\u2028\n\r\t", "😀", "\\u0041"]
        if depth and rng.random() < 0.5:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        if depth and rng.random() < 0.5:
            return {f"{rng.random()}": value(depth - 1) for _ in range(rng.randint(0, 3))}
        return rng.choice(kinds)

    rows = [{"a": value(3), "b": value(2)} for _ in range(60)]
    for size, indent in itertools.product((1, 7, 64, 1 << 20), (None, 1)):
        monkeypatch.setattr(files, "BUFFER", size)
        assert read(tmp_path / "file", json.dumps(rows, indent=indent).encode()) == rows
        assert read(tmp_path / "file", json.dumps(rows, indent=indent, ensure_ascii=False).encode()) == rows
        assert read(tmp_path / "file", "\n".join(json.dumps(row, indent=2) for row in rows).encode()) == rows


@pytest.mark.parametrize("make", [JSONL.encode, ARRAY.encode, lambda: gzip.compress(JSONL.encode())])
def test_training_reads_them_and_says_what_they_are(tmp_path, tokenizer, capsys, make):
    plain, path = tmp_path / "plain.jsonl", tmp_path / "data"
    plain.write_text(JSONL, encoding="utf-8")
    path.write_bytes(make())
    rows = pretrain_dataset(path, tokenizer, 64, cache_dir=tmp_path / "cache")
    assert rows.to_dict() == pretrain_dataset(plain, tokenizer, 64, cache_dir=tmp_path / "cache").to_dict()
    assert all(kind in capsys.readouterr().err for kind in summary(rows)["file"])


def test_wrong_rows_of_an_array_are_faults_by_their_number(tmp_path):
    text = '[{"text": "a"},\n 3, {"text": "b", "text": "c"}, {"text": NaN}, "e", {"text": "f"},]'
    (tmp_path / "f").write_text(text)
    assert [row for _, row, _ in read_jsonl(tmp_path / "f")] == [{"text": "a"}, *[None] * 4, {"text": "f"}]
    data = ARRAY.encode()
    for cut in range(20, len(data), 97):
        rows = read(tmp_path / "f", data[:cut])
        assert rows[-1] is None and rows[:-1] == ROWS[: len(rows) - 1] and len(rows) > cut // 80 - 1


@pytest.mark.parametrize("line", [b"", b'{"text": "cut', '{"text": "截'.encode()[:-1], b'{"text": "a"', b'{"te', b"{"])
def test_a_cut_file_loses_its_last_line_alone(tmp_path, line):
    (tmp_path / "f").write_bytes(JSONL.encode() + line)
    found = list(read_jsonl(tmp_path / "f"))
    assert [row for _, row, _ in found[:40]] == ROWS
    assert len(found) == (41 if line else 40) and all("cut off" in fault.text for _, _, fault in found[40:])


def test_a_broken_first_line_does_not_hide_the_others(tmp_path):
    for first in ('{"text": "a"', "{'text': 'a'}", '{"text": "a\n', "[1, 2]", "[[", "# JSONL", "text", '{"text": "a",'):
        rows = read(tmp_path / "f", f"{first}\n{JSONL}".encode()) if first != "[[" else ROWS
        assert rows[-40:] == ROWS and set(map(str, rows[:-40])) <= {"None"}


def test_memory_does_not_grow_with_a_compressed_file_or_an_array(tmp_path):
    row = json.dumps({"text": "the cat sat on the mat " * 40}) + "\n"
    peaks = []
    for count in (8_000, 32_000):  # 7 and 30 MB
        (tmp_path / "a.gz").write_bytes(gzip.compress((row * count).encode(), 1))
        (tmp_path / "a.json").write_text("[" + (row.strip() + ",") * (count - 1) + row + "]")
        for name in ("a.gz", "a.json"):
            tracemalloc.start()
            assert sum(1 for _ in DataFile(tmp_path / name).lines()) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[0] and peaks[3] < 1.3 * peaks[1], peaks


# Encodings that might be others


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Où est la bibliothèque ? Élève à côté, où l'été déjà naît. Größe, Übung, Straße, mañana"),
        ("cp1251", "Где находится библиотека? Сегодня хорошая погода, и мы идём гулять в парк."),
        ("koi8-r", "Где находится библиотека? Сегодня хорошая погода, и мы идём гулять в парк."),
        ("euc-kr", "도서관은 어디에 있습니까? 오늘은 날씨가 좋아서 우리는 공원에 산책하러 갑니다."),
        ("big5", "圖書館在哪裡？今天天氣很好，我們去公園散步，然後回家吃飯。謝謝你的幫助。"),
        ("shift-jis", "図書館はどこにありますか。今日は天気がいいので、公園へ散歩に行きます。"),
        ("euc-jp", "図書館はどこにありますか。今日は天気がいいので、公園へ散歩に行きます。"),
    ],
)
def test_no_other_encoding_is_taken_for_chinese(tmp_path, encoding, text):
    data = "".join(json.dumps({"text": f"{text} {n}"}, ensure_ascii=False) + "\n" for n in range(30))
    (tmp_path / "f").write_bytes(data.encode(encoding))
    for _, row, fault in read_jsonl(tmp_path / "f"):
        assert row is None and "not UTF-8" in fault.text and "iconv" in fault.text


def test_one_bad_byte_or_two_encodings_make_no_chinese_file(tmp_path):
    good = JSONL.splitlines(keepends=True)
    for bad in (b'{"text": "\xff"}\n', b'{"text": "caf\xe9 con leche"}\n', good[0].encode("gb18030")):
        rows = read(tmp_path / "f", "".join(good[:20]).encode() + bad + "".join(good[20:]).encode())
        assert rows[:20] + rows[21:] == ROWS and rows[20] is None
    late = read(tmp_path / "f", "".join(good[:30]).encode("gb18030") + "".join(good[30:]).encode())
    assert late[:30] in (ROWS[:30], [None] * 30) and late[30:] == ROWS[30:]


def test_a_line_of_utf8_in_a_chinese_file_is_read_as_what_it_is(tmp_path):
    good = JSONL.splitlines(keepends=True)
    data = [line.encode("utf-8" if n == 20 else "gb18030") for n, line in enumerate(good)]
    assert read(tmp_path / "f", b"".join(data)) == ROWS


def test_traditional_and_short_chinese_is_known_by_its_common_characters(tmp_path):
    for text in ("你好", "這是我們的書，請你看一看。", "人工智能是计算机科学的一个分支"):
        assert read(tmp_path / "f", json.dumps({"text": text}, ensure_ascii=False).encode("gbk")) == [{"text": text}]


def test_the_rows_of_parquet(tmp_path):
    """What a row lacks is no key of it, in nested fields too; rows after others can be asked for alone."""
    chats = [
        {"conversations": [{"role": "user", "content": "你好"}], "n": 1},
        {"conversations": [{"role": "assistant"}]},
    ]
    assert read(tmp_path / "rows", parquet(chats)) == chats
    many = [{"text": f"{n} 小猫"} for n in range(1000)]
    assert read(tmp_path / "rows", parquet(many)) == many
    file = DataFile(tmp_path / "rows")
    assert [number for number, _ in file.lines(after=997)] == [998, 999, 1000]
    assert file.position == (tmp_path / "rows").stat().st_size and file.kind == ["Parquet"]


# What is refused


def parquet(rows: list | None = None) -> bytes:
    table = pyarrow.Table.from_pylist(rows or [{"text": "a"}])
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def arrow() -> bytes:
    table = pyarrow.table({"text": ["a"]})
    sink = io.BytesIO()
    with pyarrow.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()


def zipped(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    return sink.getvalue()


def tarred() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("data.jsonl"))
    return sink.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 123456789\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (LFS, ["LFS", "123,456,789", "git lfs pull"]),
        (b"<!DOCTYPE html>\n<html><body>Please log in</body></html>", ["HTML", "/resolve/"]),
        (b"\n  <html>\n<head>", ["HTML"]),
        (b'<?xml version="1.0"?><rss></rss>', ["XML"]),
        (gzip.compress(parquet()), ["parquet", "unpack"]),
        (parquet()[:-30], ["Parquet", "download"]),
        (b"ARROW1\0\0", ["arrow", "load_dataset"]),
        (zipped("xl/workbook.xml"), ["Excel", "read_excel", ".jsonl"]),
        (zipped("word/document.xml"), ["Word"]),
        (zipped("archive/data.pkl"), ["weights"]),
        (zipped("readme.txt", "train.jsonl"), ["zip", "unzip", "train.jsonl"]),
        (zipped("a")[:-20], ["zip"]),
        (tarred(), ["tar -xf"]),
        (gzip.compress(tarred()), ["tar -xf"]),
        (b"7z\xbc\xaf\x27\x1c", ["7z"]),
        (b"%PDF-1.7\n", ["PDF"]),
        (b"\x7fELF" + bytes(range(100)), ["program"]),
        (b"text,label\nhello,1\nworld,0\n", ["CSV", "read_csv", ".jsonl"]),
        ("问题,回答\n你好,你好！\n再见,再见！\n".encode("gbk"), ["CSV", "gb18030"]),
        (gzip.compress(b"text,label\nhello,1\nworld,0\n"), ["unpack", "CSV"]),
        (b"question\tanswer\nhello there\tgood day\n", ["TSV", "sep="]),
        (b"Once upon a time there was a cat.\nIt sat on a mat, and slept.\n", ["plain text", "python -c"]),
        (b"\0\1\2\3" * 100, ["binary"]),
        (gzip.compress(JSONL.encode())[:-30], ["gzip", "download"]),
        (gzip.compress(JSONL.encode() * 2000)[:2000], ["gzip", "download"]),
        (bz2.compress(JSONL.encode())[:-30], ["bzip2", "download"]),
        (lzma.compress(JSONL.encode())[:-30], ["xz", "download"]),
        (COMPRESSIONS["zstd"](JSONL.encode())[:-30], ["zstd", "download"]),
        (b"\x1f\x8b" + b"x" * 100, ["gzip"]),
        (b'[{"text": "a"}, {"text": "b"} {"text": "c"}]', ["row 3", "comma"]),
        (b'[\n{"text": "a"},\n{"text": b},\n{"text": "c"}]', ["row 2", "line 3"]),
        (b'[{"text": "a"}] trailing', ["more text"]),
        (JSONL.encode("utf-16") + b"\0", ["UTF-16"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",  # archives hold the time
)
def test_what_is_no_file_of_rows_is_named_with_its_remedy(tmp_path, data, words):
    text = refusal(tmp_path / "data.x", data)
    assert all(word in text for word in words), text


def test_a_folder_names_the_files_in_it(tmp_path):
    (tmp_path / "train.jsonl").write_text(JSONL)
    with pytest.raises(DataError, match="folder.*train.jsonl"):
        DataFile(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        DataFile(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("remedy", [("arrow", arrow()), ("csv", b"text,label\nhello,1\n"), ("txt", b"a cat\nb d\n")])
def test_the_remedies_work(tmp_path, remedy):
    """The command that is given makes a file that is read."""
    name, data = remedy
    path = tmp_path / f"data.{name}"
    command = refusal(path, data).partition("python -c ")[2]
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True, capture_output=True, cwd=tmp_path)
    assert all("text" in row for _, row, _ in read_jsonl(tmp_path / "data.jsonl"))


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("{'text': 'a'}", "json.dumps"),
        ('{"text": "a"},', "comma"),
        ('{"text": "a"} {"text": "b"}', "line of its own"),
        ('{"text": "a\tb"}', r"\t"),
        ('[{"role": "user", "content": "a"}]', "jq"),
        ('["a"]', "object"),
        ('"a"', "jq"),
    ],
)
def test_a_bad_line_comes_with_what_its_writer_meant(tmp_path, line, hint):
    (tmp_path / "f").write_text(f"{line}\n{JSONL}", encoding="utf-8")
    _, row, fault = next(read_jsonl(tmp_path / "f"))
    assert row is None and hint in fault.text


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="such names are Linux's")
def test_a_name_that_is_no_unicode(tmp_path, tokenizer, capfd):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/d\xff\xe4\xb8.jsonl"))
    path.write_text(JSONL, encoding="utf-8")
    rows = pretrain_dataset(path, tokenizer, 64, cache_dir=tmp_path / "cache")
    assert summary(rows)["used"] == 40 and "40 used" in capfd.readouterr().err
    with pytest.raises(DataError, match="UTF-8"):
        pretrain_dataset(path, tokenizer, 64, cache_dir=path.with_suffix(""))


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="such names are Linux's")
def test_scripts_take_a_name_that_is_no_unicode(tmp_path):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/d\xff\xe4\xb8.jsonl"))
    path.write_text(JSONL, encoding="utf-8")
    trained = Script(
        tmp_path,
        ["train_pretrain.py", "--data_path", path, "--steps", 1, "--compile", 0, "--out_dir", tmp_path / "out"],
    ).wait()
    assert trained.code == 0 and "40 used" in trained.err, trained.err
    assert checkpoint.load_meta(tmp_path / "out" / "pretrain_256.pth")["arguments"]["data_path"] == str(path)
    for job in (
        ["scripts/inspect_data.py", path],
        ["scripts/inspect_data.py", path, "--row", "1"],
        ["train_tokenizer.py", "--data_path", path, "--vocab_size", "300", "--out_dir", path.with_suffix("")],
    ):
        done = subprocess.run([sys.executable, ROOT / job[0], *job[1:]], capture_output=True, timeout=60)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert (path.with_suffix("") / "tokenizer.json").exists()


def test_the_command_that_training_names_shows_the_skipped_row(tmp_path, tokenizer, capsys):
    """Also where inspect_data.py alone would take the file for another kind, and a row for long enough."""
    pair = {"prompt": "a b c " * 100, "chosen": "yes", "rejected": "no"}
    for name, build, rows in (
        ("text", sft_dataset, [{"text": "a"}, {"text": "b"}, {"prompt": "q", "completion": "a"}]),
        ("pairs", preference_dataset, [{"prompt": "a", "chosen": "yes", "rejected": "no"}, pair]),
    ):
        path = tmp_path / f"{name} file.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        build(path, tokenizer, 128, cache_dir=tmp_path / "cache")
        command = capsys.readouterr().err.partition("see python ")[2]
        shown = subprocess.check_output(f"{sys.executable} {command}", shell=True, cwd=ROOT, text=True)
        assert "Training skips this row" in shown


@pytest.mark.parametrize("packer", [gzip, bz2, lzma], ids=lambda module: module.__name__)
def test_contents_are_those_that_a_compressed_file_holds(tmp_path, packer):
    rows = json.dumps({"text": "ja"}).encode() + b"\n"
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.packed"
    plain.write_bytes(rows)
    packed.write_bytes(packer.compress(rows))
    assert content_hash(plain, tmp_path) == content_hash(packed, tmp_path)
    packed.write_bytes(packer.compress(rows + rows))
    assert content_hash(plain, tmp_path) != content_hash(packed, tmp_path)
    packed.write_bytes(packer.compress(rows)[:-5])  # who reads the rows says what is wrong
    assert len(content_hash(packed, tmp_path)) == 64


@pytest.mark.parametrize(
    "line, hint",
    [
        ('{"text": "a",}', "comma"),
        ('{"text": ["a", ]}', "comma"),
        ("{\u201ctext\u201d: \u201ca\u201d}", "quotes"),
        ('{"text": \u201ca\u201d}', "quotes"),
        ('{text: "a"}', "key"),
        ("// rows", "comments"),
        ("<<<<<<< HEAD", "merge"),
    ],
)
def test_what_writers_take_for_json(line, hint):
    row, fault = parse_line(1, line.encode() + b"\n")
    assert row is None and hint in fault.text.partition("; ")[2]
