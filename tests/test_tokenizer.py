"""The shipped tokenizer and train_tokenizer.py: `pytest tests/test_tokenizer.py`."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_tokenizer
from cli import UsageError
from dataset.chat import MARKERS, SPECIAL_MARKERS, TOKENIZER_DIR, load_tokenizer
from dataset.jsonl import DataError
from dataset.tokenizer import TokenizerError

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "tests" / "fixtures" / "real_text" / "texts.jsonl"
IDENTITY = train_tokenizer.IDENTITY


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def transformers_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def random_text(rng: random.Random, length: int) -> str:
    """Characters from all planes but surrogates, with plenty of ASCII, spaces and CJK."""
    ranges = [(0, 0x80), (9, 33), (0x4E00, 0x9FFF), (0x80, 0xD7FF), (0xE000, 0x10FFFF), (0x1F300, 0x1FAFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(length))


def test_vocabulary_is_6400_with_the_markers_first(tokenizer):
    assert tokenizer.get_vocab_size() == 6400
    assert sorted(tokenizer.get_vocab().values()) == list(range(6400))
    named = "<|endoftext|> <|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call> <tool_response>"
    markers = [*named.split(), "</tool_response>", *(f"<|reserved_{i}|>" for i in range(7))]
    assert [tokenizer.id_to_token(i) for i in range(16)] == markers


def test_all_256_bytes_are_in_the_vocabulary(tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    assert all(tokenizer.token_to_id(symbol) is not None for symbol in ByteLevel.alphabet())


@pytest.mark.parametrize("name", IDENTITY)
def test_encode_then_decode_is_the_identity(tokenizer, transformers_tokenizer, name):
    text = IDENTITY[name]
    assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False) == text
    assert transformers_tokenizer.decode(transformers_tokenizer.encode(text)) == text


def test_identity_on_random_unicode(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng, rng.randint(1, 80))
        ids = ids_of(tokenizer, text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert min(ids) >= len(MARKERS)


def test_digits_are_single_tokens(tokenizer):
    text = "0123456789 12345.678 a99b 2024年3月"
    pieces = [tokenizer.decode([i]) for i in ids_of(tokenizer, text)]
    digits = [piece for piece in pieces if any(c.isdigit() for c in piece)]
    assert digits == [c for c in text if c.isdigit()]
    assert not [t for t in tokenizer.get_vocab() if t not in MARKERS and sum(c in "0123456789" for c in t) > 1]


def test_text_never_becomes_a_marker(tokenizer):
    for marker in MARKERS:
        text = f"a{marker}b {marker}\n{marker}"
        ids = ids_of(tokenizer, text)
        assert min(ids) >= len(MARKERS)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode([tokenizer.token_to_id(marker)], skip_special_tokens=False) == marker


def test_transformers_loads_the_folder(tokenizer, transformers_tokenizer):
    theirs = transformers_tokenizer
    assert len(theirs) == 6400
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    for text in IDENTITY.values():
        if "<|im_start|>" not in text:  # transformers reads markers in text as markers: its behaviour, not ours
            assert theirs(text)["input_ids"] == ids_of(tokenizer, text)
    hidden = theirs.decode(list(range(16)), skip_special_tokens=True)
    assert hidden == "".join(marker for marker in MARKERS if marker not in SPECIAL_MARKERS)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "llama"])
def test_an_exported_folder_keeps_its_tokenizer(tokenizer, tmp_path, model_type):
    """With a config.json beside it, transformers may pick the tokenizer class of that architecture instead."""
    from transformers import AutoTokenizer

    for path in TOKENIZER_DIR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "Don't 12345\n\n  你好，世界！ é Å 🇨🇳"
    assert theirs(text)["input_ids"] == ids_of(tokenizer, text)
    assert theirs.decode(theirs(text)["input_ids"]) == text


def test_real_text_needs_at_most_a_token_per_3_3_bytes(tokenizer):
    with open(TEXTS, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    assert sum(len(text.encode()) for text in texts) / tokens >= 3.3


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train_tokenizer.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


def write_rows(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ANSWER = {"content": "好的", "reasoning_content": "marvellous reasoning"}
CALL = {"name": "get_weather_report", "arguments": {}}
ROWS = [
    {"text": "今天天气很好，我们去公园散步。The weather is fine today."},
    {
        "conversations": [
            {"role": "user", "content": "wonderful question"},
            {"role": "assistant", "tool_calls": [CALL]} | ANSWER,
        ]
    },
    {
        "chosen": [{"role": "assistant", "content": "delicious chosen"}],
        "rejected": [{"role": "assistant", "content": "horrible rejected"}],
    },
]


@pytest.mark.slow
def test_training_through_the_command_line(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [*ROWS * 150, "not json", '{"other": 1}', ""])
    first = run("--data_path", data, "--vocab_size", "400", "--out_dir", "tok", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert all(part in first.stdout for part in ("450 rows", "3 skipped", "line 451"))
    assert "Chinese" in first.stdout and "English" in first.stdout
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert tokenizer.get_vocab_size() == 400
    words = "wonderful marvellous delicious horrible get_weather_report assistant"  # one from each field
    assert len(ids_of(tokenizer, words)) < len(words) / 2.5
    train_tokenizer.check_identity(tokenizer)

    second = run("--data_path", data, "--vocab_size", "400", "--out_dir", "again", cwd=tmp_path)
    assert second.returncode == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "tok" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "tok").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_weights_and_sample_size_thin_out_the_rows(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"text": f"row {n}"} for n in range(100)])
    texts = list(train_tokenizer.stream_texts([(data, 0.3), (data, 2.0)], "training"))
    assert [times for _, times in texts] == [1] * 30 + [2] * 100
    assert texts[0][0] == "row 3" and texts[29][0] == "row 99" and texts[30:32] == [("row 0", 2), ("row 1", 2)]
    held_out = []
    trained = list(train_tokenizer.training_texts([(data, 3.0)], held_out))
    assert len(held_out) == 1 and len(trained) == 99 * 3 and not set(held_out) & set(trained)
    size = data.stat().st_size
    ((_, weight),) = train_tokenizer.weighted_files([str(data)], [1.0], size / 4 / 1e6)
    assert weight == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (["--data_path", "absent.jsonl"], 1, "absent.jsonl"),
        (["--data_path", "bad.jsonl"], 1, "line 1"),
        (["--data_path", "empty.jsonl"], 1, "empty.jsonl"),
        (["--data_path", "good.jsonl", "--vocab_size", "271"], 2, "--vocab_size"),
        (["--data_path", "good.jsonl", "--weight", "1", "2"], 2, "--weight"),
        (["--data_path", "good.jsonl", "--sample_mb", "0"], 2, "--sample_mb"),
        (["--data_path", "good.jsonl", "--out_dir", "good.jsonl"], 1, "good.jsonl"),
    ],
)
def test_mistakes_get_one_line(tmp_path, args, code, named):
    write_rows(tmp_path / "good.jsonl", ROWS)
    write_rows(tmp_path / "bad.jsonl", ["{'text': 'python, not JSON'}"])
    (tmp_path / "empty.jsonl").touch()
    before = sorted(tmp_path.iterdir())
    result = run("--vocab_size", "300", "--out_dir", "tok", *args, cwd=tmp_path)
    assert result.returncode == code
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and named in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_replaced_unasked(tmp_path):
    """Not the shipped tokenizer, by default or by its name, and no other one; it is said before the work begins."""
    assert Path(train_tokenizer.OUT_DIR).relative_to(ROOT) == Path("out") / "tokenizer" != TOKENIZER_DIR
    data = write_rows(tmp_path / "data.jsonl", ROWS * 50)
    with pytest.raises(UsageError, match="--overwrite 1"):
        train_tokenizer.check_folder(TOKENIZER_DIR, overwrite=False)
    folder = tmp_path / "tok"
    done = run("--data_path", data, "--vocab_size", "300", "--out_dir", folder)
    assert done.returncode == 0 and f"train_pretrain.py --tokenizer {folder}" in done.stdout
    before = (folder / "tokenizer.json").read_bytes()
    refused = run("--data_path", data, "--vocab_size", "290", "--out_dir", folder)
    assert refused.returncode == 2 and "--overwrite 1" in refused.stderr and str(folder) in refused.stderr
    assert refused.stderr.count("\n") == 1 and not refused.stdout
    assert (folder / "tokenizer.json").read_bytes() == before
    asked = run("--data_path", data, "--vocab_size", "290", "--out_dir", folder, "--overwrite", "1")
    assert asked.returncode == 0 and load_tokenizer(folder).get_vocab_size() == 290


@pytest.mark.parametrize("unit", ["ACGT", "的一是不了", "=", "_", " ", "\n"])
def test_one_endless_word_costs_no_more_than_its_length(unit, capsys):
    rng = random.Random(0)
    word = "".join(rng.choices(unit, k=400_000))
    started = time.process_time()
    tokenizer = train_tokenizer.train_bpe(iter([f"a{word}b"]), 300)
    assert time.process_time() - started < 10  # uncut: minutes
    assert "1 words" in capsys.readouterr().out
    assert tokenizer.decode(ids_of(tokenizer, word[:1000])) == word[:1000]


def test_the_cut_changes_nothing_for_ordinary_text(monkeypatch):
    texts = [json.loads(line)["text"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    cut = train_tokenizer.train_bpe(iter(texts), 2000).to_str()
    monkeypatch.setattr(train_tokenizer, "LONGEST_PIECE", 100_000)
    assert train_tokenizer.train_bpe(iter(texts), 2000).to_str() == cut
    shipped = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(cut)["pre_tokenizer"] == shipped["pre_tokenizer"]  # what other engines know


def test_ctrl_c_is_heard_while_the_trainer_works(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 200))) for _ in range(30_000)]
    data = write_rows(tmp_path / "data.jsonl", [{"text": " ".join(words[n : n + 50])} for n in range(0, 30_000, 50)])
    command = [sys.executable, str(ROOT / "train_tokenizer.py"), "--data_path", data, "--vocab_size", "60000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--out_dir", tmp_path / "tok"], **pipes)
    assert "rows for training" in process.stdout.readline()  # from here on the trainer works alone
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - asked < 3, (out, err)
    assert "Traceback" not in err and err.count("\n") == 1 and not (tmp_path / "tok").exists()


def test_faults_are_told_in_full_and_other_forms_are_read(tmp_path):
    rows = [{"instruction": "q", "output": "a"}, {"q": 1}, {"question": "q", "answer": "a", "choices": [1]}, {"q": 2}]
    path = write_rows(tmp_path / "data.jsonl", rows)
    done = run("--data_path", path, "--vocab_size", "300", "--out_dir", tmp_path / "tok")
    assert "1 rows" in done.stdout and "3 skipped" in done.stdout and "2 lines (2, 4)" in done.stdout
    assert '"q"' in done.stdout and '"choices"' in done.stdout


def test_a_lossy_tokenizer_is_refused():
    tokenizer = train_tokenizer.train_bpe(iter(["abc " * 50]), train_tokenizer.MIN_VOCAB)
    train_tokenizer.check_identity(tokenizer)
    from tokenizers.normalizers import NFC

    tokenizer.normalizer = NFC()
    with pytest.raises(DataError, match="combining marks"):
        train_tokenizer.check_identity(tokenizer)


def test_a_missing_or_broken_folder_is_named(tmp_path):
    with pytest.raises(TokenizerError, match="train_tokenizer.py"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
