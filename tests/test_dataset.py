"""Reading, packing, caching and the order of batches: nothing lost, nothing trained twice, one order everywhere."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from dataset import cache, packing
from dataset.chat import load_tokenizer, render_chat
from dataset.lm_dataset import (
    DataError,
    batches,
    bytes_per_token,
    cache_folders,
    collate,
    content_hash,
    default_cache_dir,
    pretrain_dataset,
    read_jsonl,
    sft_dataset,
    summary,
    validation_batches,
)
from dataset.sources import parse_sources
from tests.samples import messy_chats, messy_text

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the cat 小猫 sat on 山 and 3 + 4 = 7 😀 river 读书 quickly 今天天气很好。 élan\n".split(" ")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def documents(count: int, most: int = 40) -> list[dict]:
    rng = random.Random(0)
    return [{"text": f"{i} {words(rng, most)}"} for i in range(count)]


def conversations(count: int, most: int = 25) -> list[dict]:
    rng = random.Random(1)
    rows = []
    for i in range(count):
        messages = [{"role": "system", "content": words(rng, 9)}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 4)):
            messages.append({"role": "user", "content": f"{i} {words(rng, most)}"})
            messages.append({"role": "assistant", "content": words(rng, most)})
        rows.append({"conversations": messages})
    return rows


# Reading


def read(tmp_path: Path, data: bytes) -> list:
    (tmp_path / "file.jsonl").write_bytes(data)
    return list(read_jsonl(tmp_path / "file.jsonl"))


def test_lines_end_at_newline_only(tmp_path):
    text = "a\u2028b\u2029c\u0085d\x0be"
    rows = read(tmp_path, b"\xef\xbb\xbf" + json.dumps({"text": text.replace("\x0b", "")}, ensure_ascii=False).encode())
    assert [row["text"] for _, row, _ in rows] == [text.replace("\x0b", "")]
    assert [(n, row) for n, row, _ in read(tmp_path, b'{"a": 1}\r\n{"a": 2}\n{"a": 3}')] == [
        (n, {"a": n}) for n in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"", "empty line"),
        (b"\r", "empty line"),
        (b" \t", "line of blanks only"),
        (b'{"text": NaN}', "invalid JSON"),
        (b'{"text": -Infinity}', "invalid JSON"),
        (b'{"text": "a\tb"}', "invalid JSON"),
        (b'{"text": "a"} {"text": "b"}', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "invalid JSON"),  # a byte order mark belongs before the first line only
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud83d"}', "lone surrogate"),
        (b'{"text": {"\\udc00": 1}}', "lone surrogate"),
        (b'{"text": "a", "text": "b"}', "duplicate JSON key"),
        (b'["a"]', "not an object"),
        (b"null", "not an object"),
    ],
)
def test_bad_line_is_an_error_and_the_next_one_is_read(tmp_path, line, kind):
    (_, row, fault), (number, good, none) = read(
        tmp_path, b'{"text": "a"}\n' + line + b'\n{"text": "\\ud83d\\ude00"}\n'
    )[1:]
    assert row is None and fault.level == "error" and fault.text.split(":")[0] == kind
    assert (number, good, none) == (3, {"text": "😀"}, None)


# Packing


@pytest.mark.parametrize("seq_len", [2, 7, 64, 100_000])
def test_pretraining_rows_are_the_documents_in_one_stream(tmp_path, tokenizer, seq_len):
    rows = documents(30)
    path = write_jsonl(tmp_path / "text.jsonl", rows)
    dataset = pretrain_dataset(path, tokenizer, seq_len, cache_dir=tmp_path)
    figures = summary(dataset)
    stream, weight = [tokenizer.document_id], 0
    for batch in validation_batches(dataset, 4):
        assert batch["input_ids"].shape == batch["labels"].shape == (4, seq_len)
        assert "segment_ids" not in batch and batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            labels = [label for label in labels if label != -100]
            assert inputs[: len(labels)] == [*stream[-1:], *labels[:-1]][: len(labels)]
            stream += labels
        weight += batch["weight"]
    assert weight == len(stream) - 1 == figures["labels"]
    texts, ids = [], []
    for token in [*stream[1:], tokenizer.document_id]:
        if token == tokenizer.document_id:
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))
            ids = []
        else:
            ids.append(token)
    assert texts == [row["text"] for row in rows]
    assert len(dataset) == -(-weight // seq_len)


def contexts(ids: list[int], labels: list[int], start: int) -> Counter:
    """Every label with the (up to) four tokens that stand before it."""
    return Counter(
        (tuple(ids[max(start, t - 3) : t + 1]), label) for t, label in enumerate(labels, start) if label != -100
    )


@pytest.mark.parametrize("seq_len", [16, 61, 256, 1024])
def test_sft_rows_train_every_assistant_token_once_and_never_across_conversations(tmp_path, tokenizer, seq_len):
    rows = conversations(120)
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    dataset = sft_dataset(path, tokenizer, seq_len, cache_dir=tmp_path)
    expected = Counter()
    for number, row in enumerate(rows, 1):  # every fifth answers with thinking switched off
        ids, mask = render_chat(tokenizer, row["conversations"], thinking_off=number % 5 == 0)
        expected += contexts(ids, [i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)], 0)
    found = Counter()
    for batch in validation_batches(dataset, 3):
        assert batch["weight"] == (batch["labels"] != -100).sum()
        assert batch["segment_ids"].dtype == torch.int32 and batch["segment_ids"].shape == (3, seq_len)
        for ids, labels, segments in zip(
            *(batch[k].tolist() for k in ("input_ids", "labels", "segment_ids")), strict=True
        ):
            for t, label in enumerate(labels):
                assert label == -100 or (ids[t + 1] == label and segments[t + 1] == segments[t] > 0)
            for segment in set(segments) - {0}:
                first, size = segments.index(segment), segments.count(segment)
                assert segments[first : first + size] == [segment] * size  # in one piece
                found += contexts(ids, labels[first : first + size], first)
    assert found == expected
    figures = summary(dataset)
    assert figures["labels"] == sum(expected.values())
    assert figures["continued"] == sum(len(render_chat(tokenizer, r["conversations"])[0]) > seq_len for r in rows)


def test_sft_rows_are_well_filled(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "chat.jsonl", conversations(600))
    dataset = sft_dataset(path, tokenizer, 512, cache_dir=tmp_path)
    assert summary(dataset)["fill"] > 0.95
    assert all(len(row["input_ids"]) == sum(row["segment_lengths"]) <= 512 for row in dataset)


def test_collate_pads_with_nothing_to_learn():
    row = {"input_ids": [1, 5, 6, 1, 7], "loss_mask": [False, True, True, True, True], "segment_lengths": [3, 2]}
    batch = collate([row, {}], 6, "sft")
    assert batch["input_ids"].tolist() == [[1, 5, 6, 1, 7, 0], [0] * 6]
    assert batch["labels"].tolist() == [[5, 6, -100, 7, -100, -100], [-100] * 6]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6]
    assert batch["weight"] == 3


@pytest.mark.parametrize("build", [pretrain_dataset, sft_dataset])
def test_several_processes_give_the_same_rows(tmp_path, tokenizer, build, monkeypatch):
    path = write_jsonl(tmp_path / "f.jsonl", documents(200) if build is pretrain_dataset else conversations(200))
    monkeypatch.setattr(packing, "CHUNK", 2000)
    one = build(path, tokenizer, 64, cache_dir=tmp_path / "1", num_proc=1)
    two = build(path, tokenizer, 64, cache_dir=tmp_path / "2", num_proc=2)
    assert one.to_dict() == two.to_dict()


# What cannot be used


@pytest.mark.parametrize(("make", "build"), [(messy_text, pretrain_dataset), (messy_chats, sft_dataset)])
def test_messy_file_is_read_and_every_line_counted(tmp_path, tokenizer, make, build, capsys):
    dirty, path = make(), tmp_path / "dirty.jsonl"
    path.write_bytes(dirty.content())
    dataset = build(path, tokenizer, 256, cache_dir=tmp_path)
    figures, bad = summary(dataset), dirty.faults("error")
    assert figures["lines"] == len(dirty.lines)
    assert figures["lines"] - figures["used"] == len(bad)
    assert sum(reason["count"] for reason in figures["skipped"].values()) == len(bad)
    said = capsys.readouterr().err
    for reason in figures["skipped"].values():
        assert set(reason["lines"]) <= set(bad) and len(reason["lines"]) == min(reason["count"], 5)
    most = max(figures["skipped"].values(), key=lambda reason: reason["count"])
    assert str(figures["used"]) in said and str(most["lines"][0]) in said
    assert sum(batch["weight"] for batch in validation_batches(dataset, 8)) == figures["labels"]


def test_file_that_cannot_be_used_is_one_clear_error(tmp_path, tokenizer):
    empty, bad = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl"
    empty.touch()
    bad.write_text('{"txt": "a"}\n{"text": ""}\n')
    for path in (tmp_path / "none.jsonl", tmp_path, empty):
        for build in (pretrain_dataset, sft_dataset):
            with pytest.raises(DataError) as error:
                build(path, tokenizer, 64, cache_dir=tmp_path / "cache")
            assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match='bad.jsonl.*"text"'):
        pretrain_dataset(bad, tokenizer, 64, cache_dir=tmp_path / "cache")
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]


# The cache


def test_the_cache_goes_by_content(tmp_path, tokenizer, capsys):
    path = write_jsonl(tmp_path / "text.jsonl", documents(20))

    def cached(path: Path = path, seq_len: int = 32) -> bool:
        figures = summary(pretrain_dataset(path, tokenizer, seq_len, cache_dir=tmp_path / "cache"))
        assert figures["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        return "cached" in capsys.readouterr().err

    assert [cached(), cached(), cached(path, 33), cached(path, 33), cached()] == [False, True, False, True, True]
    os.utime(path, ns=(1, 1))
    assert cached()
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(path.read_bytes())
    assert cached(copy)
    write_jsonl(path, documents(21))
    assert [cached(), cached(), cached(copy)] == [False, True, True]


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_an_edit_that_size_and_time_do_not_show_never_meets_old_rows(tmp_path, tokenizer, monkeypatch, small):
    """Also with the hash kept, as that of a large file is."""
    monkeypatch.setattr(cache, "SMALL", small)
    monkeypatch.setattr(cache, "SETTLED", 0)
    path = write_jsonl(tmp_path / "text.jsonl", documents(20))
    before = path.stat()
    first = pretrain_dataset(path, tokenizer, 32, cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache" / cache.KNOWN).exists() == (not small)
    time.sleep(0.02)
    path.write_bytes(path.read_bytes().replace(b"river", b"ocean"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    second = pretrain_dataset(path, tokenizer, 32, cache_dir=tmp_path / "cache")
    assert second.to_dict() != first.to_dict() and summary(second)["sha256"] != summary(first)["sha256"]


def test_the_hash_of_a_large_file_is_kept_until_it_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setattr(cache, "SETTLED", 0)
    path = write_jsonl(tmp_path / "text.jsonl", documents(20))
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert content_hash(path, tmp_path / "cache") == right
    monkeypatch.setattr(cache, "_hash", lambda *_: "hashed anew")
    assert content_hash(path, tmp_path / "cache") == right
    time.sleep(0.02)
    os.utime(path)
    assert content_hash(path, tmp_path / "cache") == "hashed anew"


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "text.jsonl", documents(20))
    pack = packing.pack_file

    def edit_and_pack(*arguments) -> None:
        write_jsonl(path, documents(21))
        pack(*arguments)

    monkeypatch.setattr(packing, "pack_file", edit_and_pack)
    with pytest.raises(DataError, match="text.jsonl.*changed"):
        pretrain_dataset(path, tokenizer, 32, cache_dir=tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_the_place_of_the_cache(tmp_path, monkeypatch):
    def place(root: Path, **environ: str) -> Path:
        return default_cache_dir(environ, root)

    free, shut = tmp_path / "free", tmp_path / "shut"
    free.mkdir()
    shut.touch()  # a file: nothing can be made in it, whoever asks
    home, xdg = {"HOME": str(tmp_path / "home")}, {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert place(free, MINIMIND_CACHE="/any/where", **home) == Path("/any/where")
    assert place(free, **home, **xdg) == free / "out" / "cache"
    assert place(shut, **home, **xdg) == tmp_path / "xdg" / "minimind"
    assert place(shut, **home) == tmp_path / "home" / ".cache" / "minimind"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert place(shut, HOME=str(shut)).parent == place(shut).parent == tmp_path / "tmp"
    assert place(Path(os.fsdecode(bytes(tmp_path) + b"/\xff")), **home) == tmp_path / "home" / ".cache" / "minimind"
    assert not any(path.exists() for path in (free / "out", tmp_path / "home", tmp_path / "xdg", tmp_path / "tmp"))


def test_old_entries_of_the_cache_make_room(tmp_path, tokenizer, capsys, monkeypatch):
    def built(n: int) -> str:
        path = write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n} the cat sat. " * 300}])
        pretrain_dataset(path, tokenizer, 32, cache_dir=tmp_path / "cache")
        return capsys.readouterr().err

    assert str(tmp_path / "cache") in built(0) and "cached" not in built(1)
    for age, entry in enumerate(sorted(filter(Path.is_dir, (tmp_path / "cache").iterdir()))):
        os.utime(entry, (100 + age, 100 + age))
    others = [tmp_path / "cache" / name for name in ("photos", "compiled-0123456789ab", "sft-2024")]  # not the cache's
    for other in others:
        other.mkdir()
        (other / "file").write_bytes(b"x" * 10**6)
        os.utime(other, (1, 1))
    assert "cached" in built(0)  # used again, so that 1 is the oldest
    size = (cache.folder_size(tmp_path / "cache") - 3 * 10**6) / 2
    monkeypatch.setenv("MINIMIND_CACHE_GB", str(2.5 * size / 1e9))
    assert "removed" in built(2)
    assert ["cached" in built(n) for n in (2, 0, 1)] == [True, True, False]
    assert all((other / "file").exists() for other in others)
    # What one run trains on stays until it begins, however little fits.
    monkeypatch.setenv("MINIMIND_CACHE_GB", "0")
    sources = parse_sources([str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")])
    mixture = pretrain_dataset(sources, tokenizer, 48, cache_dir=tmp_path / "cache")
    folders = cache_folders(mixture)
    pretrain_dataset(tmp_path / "2.jsonl", tokenizer, 48, cache_dir=tmp_path / "cache", keep=folders)  # to validate on
    assert len(folders) == 2 and all(folder.exists() for folder in folders)
    pretrain_dataset(tmp_path / "0.jsonl", tokenizer, 64, cache_dir=tmp_path / "cache")
    assert not any(folder.exists() for folder in folders)
    monkeypatch.setenv("MINIMIND_CACHE_GB", "much")
    with pytest.raises(DataError, match="MINIMIND_CACHE_GB"):
        built(3)


@pytest.mark.parametrize("damage", ["cut", "no summary", "bad summary", "garbage", "left by a killed run"])
def test_damaged_cache_is_built_again(tmp_path, tokenizer, capsys, damage):
    path = write_jsonl(tmp_path / "text.jsonl", documents(50))
    before = pretrain_dataset(path, tokenizer, 32, cache_dir=tmp_path / "cache").to_dict()
    (folder,) = (entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir())
    rows, figures = folder / "rows.arrow", folder / "summary.json"
    if damage == "cut":
        rows.write_bytes(rows.read_bytes()[:-100])
    elif damage == "no summary":
        figures.unlink()
    elif damage == "bad summary":
        figures.write_text(figures.read_text()[:20])
    elif damage == "garbage":
        rows.write_bytes(os.urandom(rows.stat().st_size))
    else:
        folder.rename(f"{folder}.building")
        figures.parent.with_name(folder.name + ".building").joinpath("rows.arrow").write_bytes(b"half")
    capsys.readouterr()
    again = pretrain_dataset(path, tokenizer, 32, cache_dir=tmp_path / "cache")
    assert "cached" not in capsys.readouterr().err
    assert again.to_dict() == before
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == [folder]


BUILD = """
import resource, sys
from dataset.chat import load_tokenizer
from dataset.lm_dataset import batches, pretrain_dataset
dataset = pretrain_dataset(sys.argv[1], load_tokenizer(), 128, cache_dir=sys.argv[2], num_proc=int(sys.argv[3]))
for _, batch in zip(range(50), batches(dataset, 8, seed=0)): pass
print(len(dataset), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def start_build(path: Path, cache: Path, num_proc: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(path), str(cache), str(num_proc)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_at_once_build_once(tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", documents(3000, most=100))
    outputs = [process.communicate() for process in [start_build(path, tmp_path / "cache") for _ in range(2)]]
    assert outputs[0][0].split()[0] == outputs[1][0].split()[0], outputs
    assert sorted("cached" in err for _, err in outputs) == [False, True]


@pytest.mark.slow
def test_killed_build_leaves_nothing_in_the_way(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "text.jsonl", documents(8000, most=400))
    process = start_build(path, tmp_path / "cache", num_proc=2)
    deadline = time.monotonic() + 60
    while not any(rows.stat().st_size > 10_000 for rows in (tmp_path / "cache").glob("*.building/rows.arrow")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)  # returns when the workers, which share its output, are gone too
    assert list((tmp_path / "cache").glob("*.building"))
    again = start_build(path, tmp_path / "cache", num_proc=2)
    out, err = again.communicate(timeout=60)
    assert int(out.split()[0]) > 100 and "cached" not in err and "waiting" not in err
    assert not list((tmp_path / "cache").glob("*.building"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for count in (4, 20):  # MB
        with open(tmp_path / f"{count}.jsonl", "w", encoding="utf-8") as file:
            for row in itertools.islice(itertools.cycle(documents(1000, most=400)), count * 1000):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        assert count * 0.7e6 < os.path.getsize(tmp_path / f"{count}.jsonl") < count * 1.6e6
        out, err = start_build(tmp_path / f"{count}.jsonl", tmp_path / "cache").communicate()
        peaks.append(int(out.split()[1]) / 1024)
    # The 16 MB of text, 8 MB of tokens in between, would show if anything of them were kept; mapped pages do show.
    assert peaks[1] - peaks[0] < 40, f"{peaks} MB"


# The order of batches


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, tokenizer):
    """23 rows that can be told apart by their tokens, and a function that gives each row of a batch its number."""
    folder = tmp_path_factory.mktemp("numbered")
    rng = random.Random(2)
    text = "".join(rng.choices("0123456789", k=23 * 16))
    dataset = pretrain_dataset(write_jsonl(folder / "n.jsonl", [{"text": text}]), tokenizer, 16, cache_dir=folder)
    index = {tuple(ids[:-1]): i for i, ids in enumerate(dataset["input_ids"])}
    assert len(index) == len(dataset) == 23
    return dataset, lambda batch: [index[tuple(ids)] for ids in batch["input_ids"].tolist()]


def take(numbered, count: int, batch_size: int, **options) -> list[int]:
    dataset, number = numbered
    stream = batches(dataset, batch_size, seed=options.pop("seed", 5), **options)
    return [i for batch in itertools.islice(stream, count) for i in number(batch)]


def test_each_epoch_is_every_row_once_in_its_own_order(numbered):
    order = take(numbered, 3 * 23, 3)
    epochs = [order[start : start + 23] for start in range(0, 9 * 23, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 9
    assert take(numbered, 3 * 23, 3) == order != take(numbered, 3 * 23, 3, seed=6)
    assert take(numbered, 23, 3, shuffle=False) == [*range(23)] * 3
    assert take(numbered, 3, 50) == order[:150]  # a batch larger than the dataset


@pytest.mark.parametrize("start", [0, 1, 22, 23, 24, 100])
def test_resumed_order_goes_on_on_any_number_of_ranks(numbered, start):
    order = take(numbered, 300, 1)
    for world_size, batch_size in ((1, 4), (2, 2), (4, 1), (3, 5)):
        options = {"start_sample": start, "world_size": world_size}
        ranks = [take(numbered, 12, batch_size, rank=rank, **options) for rank in range(world_size)]
        steps = range(0, 12 * batch_size, batch_size)
        union = [i for step in steps for rank in ranks for i in rank[step : step + batch_size]]
        assert union == order[start : start + len(union)]


def test_workers_change_neither_the_order_nor_the_global_random_state(numbered):
    state = torch.get_rng_state()
    for options in ({}, {"start_sample": 17, "rank": 1, "world_size": 2}):
        assert take(numbered, 20, 4, num_workers=2, **options) == take(numbered, 20, 4, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_is_every_row_once_in_batches_of_one_shape(numbered):
    dataset, number = numbered
    found = list(validation_batches(dataset, 5))
    assert [batch["input_ids"].shape for batch in found] == [(5, 16)] * 5
    assert [i for batch in found[:4] for i in number(batch)] == list(range(20))
    assert (found[4]["labels"][3:] == -100).all() and found[4]["weight"] == 3 * 16
    assert sum(batch["weight"] for batch in found) == summary(dataset)["labels"]


# Bytes per token


def test_token_bytes_add_up_to_the_text(tokenizer):
    sizes = bytes_per_token(tokenizer)
    assert sizes.shape == (tokenizer.get_vocab_size(),) and sizes.dtype == torch.int64
    assert (sizes[:16] == 0).all() and (sizes[16:] > 0).all()
    texts = [row["text"] for row in documents(50)] + [
        "𠮷野家 👨‍👩‍👧 \x00\x1b é\u2028 <|im_end|>",
        " \n\n\t ",
        "汉" * 99,
    ]
    for text in texts:
        assert sizes[tokenizer.encode(text).ids].sum() == len(text.encode())
