"""Rows as other projects write them become ours where there is one way to read them: `pytest tests/test_mapping.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import train_tokenizer
from dataset.chat import load_tokenizer
from dataset.lm_dataset import DataError, preference_dataset, pretrain_dataset, sft_dataset, summary
from dataset.mapping import Doubt, as_ours
from dataset.packing import read_row
from tests.samples import assistant, dumps, real_chats, real_texts, system, tool, user

ROOT = Path(__file__).resolve().parent.parent
TURNS = [user("q"), assistant("a")]
PARTS = [{"type": "text", "text": "q"}]
WEATHER = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}])
CALL = json.dumps([{"name": "weather", "arguments": {}}])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def share(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": text} for role, text in turns]


CHATS = [
    ({"messages": TURNS}, TURNS, "messages"),
    ({"messages": TURNS, "conversations": None}, TURNS, "messages"),
    ({"messages": TURNS, "conversations": TURNS}, TURNS, ""),
    ({"conversations": share(("human", "q"), ("gpt", "a"))}, TURNS, "ShareGPT"),
    ({"messages": share(("user", "q"), ("assistant", "a"))}, TURNS, "ShareGPT"),
    ({"conversations": share(("system", "s"), ("human", "q"), ("gpt", "a"))}, [system("s"), *TURNS], "ShareGPT"),
    ({"conversations": share(("human", "q"), ("gpt", "a")), "system": "s"}, [system("s"), *TURNS], "system"),
    ({"conversations": [system("s"), *TURNS], "system": "s"}, [system("s"), *TURNS], "system"),
    ({"conversations": TURNS, "system": None, "tools": ""}, TURNS, ""),
    ({"conversations": [{"role": "Human", "content": "q"}, {"role": "bot", "content": "a"}]}, TURNS, "roles"),
    ({"conversations": [{"role": "user", "content": PARTS}, assistant("a")]}, TURNS, "one part"),
    ({"messages": [{"role": "developer", "content": "s"}, *TURNS]}, [system("s"), *TURNS], "roles"),
    (
        {
            "tools": WEATHER,
            "conversations": share(("human", "q"), ("function_call", CALL), ("observation", "r"), ("gpt", "a")),
        },
        [system(None, tools=WEATHER), user("q"), assistant("", tool_calls=CALL), tool("r"), assistant("a")],
        "tools",
    ),
    ({"instruction": "q", "input": "", "output": "a"}, TURNS, "Alpaca"),
    ({"instruction": "q", "output": "a"}, TURNS, "Alpaca"),
    ({"instruction": "q", "input": "more", "output": "a"}, [user("q\nmore"), assistant("a")], "Alpaca"),
    ({"instruction": "q", "input": "", "output": "a", "system": "s"}, [system("s"), *TURNS], "system"),
    (
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q0", "a0"]]},
        [system("s"), user("q0"), assistant("a0"), *TURNS],
        "history",
    ),
    ({"instruction": "q", "input": "", "output": "a", "history": []}, TURNS, "Alpaca"),
    ({"instruction": "q", "input": "", "output": "a", "text": "### q: a", "id": 3}, TURNS, 'without "text", "id"'),
    (
        {"instruction": "q", "context": "c", "response": "a", "category": "qa"},
        [user("q\nc"), assistant("a")],
        "context",
    ),
    ({"prompt": "q", "completion": "a"}, TURNS, "prompt/completion"),
    ({"prompt": [user("q")], "completion": [assistant("a")]}, TURNS, "prompt/completion"),
    ({"prompt": share(("human", "q")), "completion": share(("gpt", "a"))}, TURNS, "prompt/completion"),
    ({"prompt": "q", "response": "a"}, TURNS, "prompt/response"),
    ({"question": "q", "answer": "a"}, TURNS, "question/answer"),
    ({"system_prompt": "s", "question": "q", "response": "a", "id": "x"}, [system("s"), *TURNS], "question/response"),
    ({"query": "q", "response": "a"}, TURNS, "query/response"),
    ({"input": "q", "output": "a"}, TURNS, "input/output"),
    (
        {"question": "q", "answer": "a", "reasoning_content": "r"},
        [user("q"), assistant("a", reasoning_content="r")],
        "question/answer",
    ),
]


@pytest.mark.parametrize(("row", "messages", "form"), CHATS, ids=range(len(CHATS)))
def test_conversations(row, messages, form):
    before = json.dumps(row)
    ours, found, faults = read_row("sft", 1, dumps(row).encode())
    assert not [fault for fault in faults if fault.level == "error"], faults
    assert ours["conversations"] == messages and form in found and bool(form) == bool(found)
    assert as_ours("reason", row)[0]["conversations"] == messages
    assert json.dumps(row) == before  # nothing of the caller's is changed


PAIR = ([user("q"), assistant("a")], [user("q"), assistant("b")])
PAIRS = [
    ({"chosen": PAIR[0], "rejected": PAIR[1]}, PAIR),
    ({"chosen": PAIR[0], "rejected": PAIR[1], "prompt": "q"}, PAIR),
    ({"chosen": share(("human", "q"), ("gpt", "a")), "rejected": share(("human", "q"), ("gpt", "b"))}, PAIR),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
    ({"question": "q", "chosen": "a", "rejected": "b", "score": 3}, PAIR),
    ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, PAIR),
    ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, PAIR),
    ({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, PAIR),
    (
        {
            "conversations": share(("human", "q")),
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        PAIR,
    ),
    (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        tuple([system("s"), *side] for side in PAIR),
    ),
]


@pytest.mark.parametrize(("row", "pair"), PAIRS, ids=range(len(PAIRS)))
def test_preference_pairs(row, pair):
    ours, _, faults = read_row("preference", 1, dumps(row).encode())
    assert not [fault for fault in faults if fault.level == "error"], faults
    assert (ours["chosen"], ours["rejected"]) == pair


@pytest.mark.parametrize(
    ("kind", "row", "named"),
    [
        ("sft", {"conversations": TURNS, "messages": [user("x"), assistant("y")]}, ["conversations", "messages"]),
        ("sft", {"conversations": [{"role": "user", "from": "gpt", "value": "q"}]}, ["role", "from"]),
        ("sft", {"conversations": [{"from": "human", "content": "q", "value": "p"}]}, ["content", "value"]),
        ("sft", {"conversations": [system("s"), *TURNS], "system": "t"}, ["system"]),
        ("sft", {"conversations": TURNS, "image": "a.jpg"}, ["image"]),
        ("sft", {"instruction": "q", "output": "a", "response": "b"}, ["output", "response"]),
        ("sft", {"instruction": "q", "input": "", "output": "a", "history": "none"}, ["history"]),
        ("sft", {"prompt": "p", "question": "q", "answer": "a"}, ["prompt", "question"]),
        ("sft", {"prompt": "p", "input": "q", "output": "a"}, ["prompt", "input"]),
        ("sft", {"question": "q", "answer": "a", "choices": ["a", "b"]}, ["choices"]),
        ("sft", {"question": "q", "answer": "a", "context": "c"}, ["context"]),
        ("sft", {"question": "q", "answer": "a", "cot": "c"}, ["cot"]),
        ("sft", {"question": "q", "answer": ["a"]}, ["answer", "list"]),
        ("sft", {"prompt": {"a": 1}, "completion": "a"}, ["prompt", "object"]),
        ("preference", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q"}, ["transcript"]),
        ("preference", {"prompt": "p", "question": "q", "chosen": "a", "rejected": "b"}, ["prompt", "question"]),
        ("preference", {"prompt": "p", "chosen": [assistant("a")], "rejected": PAIR[1]}, ["chosen", "rejected"]),
        ("pretrain", {"content": "a", "question": "q"}, ["content", "question"]),
        ("pretrain", {"content": "a", "context": "q"}, ["context"]),
    ],
)
def test_a_row_of_two_readings_is_refused_by_their_names(kind, row, named):
    with pytest.raises(Doubt) as error:
        as_ours(kind, row)
    assert all(name in str(error.value) for name in named), error.value
    assert read_row(kind, 1, dumps(row).encode())[2][0].level == "error"


@pytest.mark.parametrize(
    ("kind", "row", "named"),
    [
        ("sft", {"question": "q", "reply": "a"}, ["jq", '."question"', '."reply"', "NEW"]),
        ("sft", {"question": "q", "n": 3, "reply": "a"}, ["question", "reply", "prompt and completion"]),
        ("sft", {"text": "a"}, ["train_pretrain.py"]),
        ("sft", {"chosen": [], "rejected": []}, ["train_dpo.py"]),
        ("sft", {"data": [{"instruction": "q", "output": "a"}]}, ["jq", "data"]),
        ("sft", {"conversations": [{"role": "narrator", "content": "a"}]}, ["narrator", "system, user"]),
        ("sft", {"conversations": [{"from": "narrator", "value": "a"}]}, ["narrator", "system, user"]),
        ("sft", {"conversations": [{"speaker": "me", "content": "a"}]}, ["speaker"]),
        ("sft", {"instruction": "q", "input": "", "output": ""}, ["says nothing"]),
        ("pretrain", {"body": "a long text", "id": "3"}, ["jq", '."body"', "NEW"]),
        ("pretrain", {"conversations": TURNS}, ["train_full_sft.py"]),
        ("pretrain", {"instruction": "q", "output": "a"}, ["train_full_sft.py"]),
        ("preference", {"a": 1}, ["chosen", "rejected", "prompt"]),
    ],
)
def test_a_row_of_no_reading_says_what_is_there_and_what_to_do(kind, row, named):
    faults = [fault.text for fault in read_row(kind, 1, dumps(row).encode())[2] if fault.level == "error"]
    assert all(name in faults[0] for name in named), faults[0]


def test_our_own_rows_come_back_as_they_are():
    for kind, rows in (
        ("pretrain", [{"text": text, "content": "other"} for text in real_texts()]),
        ("sft", [{"conversations": chat, "id": 3} for chat in real_chats()]),
        ("preference", [{"chosen": chat, "rejected": chat, "id": 3} for chat in real_chats()]),
    ):
        for row in rows:
            assert as_ours(kind, row) == (row, "") and as_ours(kind, row)[0] is row


# In training


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_training_learns_the_same_of_every_form_and_tells_them(tmp_path, tokenizer, capsys):
    rows = [{"conversations": TURNS}] * 3
    plain = sft_dataset(write(tmp_path / "ours.jsonl", rows), tokenizer, 64, cache_dir=tmp_path).to_dict()
    capsys.readouterr()
    for n, (row, messages, form) in enumerate(CHATS):
        if messages == TURNS and form:
            data = sft_dataset(write(tmp_path / f"{n}.jsonl", [row] * 3), tokenizer, 64, cache_dir=tmp_path)
            assert data.to_dict() == plain
            said = capsys.readouterr().err
            assert "3 rows read as" in said and form in said
    texts = write(tmp_path / "t.jsonl", [{"content": "hello world"}, {"text": "hello world"}])
    data = pretrain_dataset(texts, tokenizer, 64, cache_dir=tmp_path)
    assert summary(data)["used"] == 2 and '1 row read as "content"' in capsys.readouterr().err


def test_the_first_fault_of_each_kind_is_told_in_full(tmp_path, tokenizer, capsys):
    bad = [[{"role": role, "content": "a"}, assistant("b")] for role in ("narrator", "stranger")]
    rows = [{"conversations": messages} for messages in (bad[0], bad[1], TURNS)] + [{"q": 1}, {"q": 2}]
    full = [read_row("sft", 1, dumps(rows[n]).encode())[2][0].text for n in (0, 3)]
    sft_dataset(write(tmp_path / "some.jsonl", rows), tokenizer, 64, cache_dir=tmp_path)
    said = capsys.readouterr().err
    assert all(text in said for text in full) and "stranger" not in said and "2 lines (1, 2)" in said
    with pytest.raises(DataError) as error:
        sft_dataset(write(tmp_path / "none.jsonl", rows[:2] + rows[3:]), tokenizer, 64, cache_dir=tmp_path)
    assert all(text in str(error.value) for text in full) and "\n" not in str(error.value)


def test_a_pair_that_is_too_long_names_the_row_that_it_needs(tmp_path, tokenizer, capsys):
    rows = [{"prompt": "a b c " * n, "chosen": "yes", "rejected": "no"} for n in (1, 40, 50, 60, 400)]
    path = write(tmp_path / "pairs.jsonl", rows)
    assert summary(preference_dataset(path, tokenizer, 128, cache_dir=tmp_path))["used"] == 1
    said = capsys.readouterr().err
    needed = int(said.partition("--max_seq_len ")[2].split()[0])
    assert "4 lines (2, 3, 4, 5)" in said
    assert summary(preference_dataset(path, tokenizer, needed, cache_dir=tmp_path))["used"] == 5
    assert summary(preference_dataset(path, tokenizer, needed - 1, cache_dir=tmp_path))["used"] == 4
    with pytest.raises(DataError, match=f"--max_seq_len {needed} "):
        preference_dataset(write(tmp_path / "long.jsonl", rows[1:]), tokenizer, 64, cache_dir=tmp_path)


# In the scripts


def inspect(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout


def test_inspection_sees_what_training_sees(tmp_path):
    rows = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(5)] + [{"q": 1}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    said = inspect(path)
    assert "5 rows" in said and "Alpaca" in said and "row 6" in said and "rename the keys" in said
    labels = [line.split()[-1] for line in inspect(path, "--row", 3).splitlines() if " * " in line]
    assert labels == ["'a'", "'2'", "<|im_end|>"]
    assert "Training skips" in inspect(path, "--row", 6)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a b c " * 50, "chosen": "yes", "rejected": "no"}] * 2)
    said = inspect(pairs, "--max_seq_len", 64)
    assert "0 rows" in said and "2 lines" in said
    needed = int(said.partition("--max_seq_len ")[2].split()[0])
    assert f"{needed} is enough" in inspect(pairs, "--max_seq_len", 64, "--row", 1)
    assert "No errors" in inspect(pairs, "--max_seq_len", needed)


def test_tokenizer_training_takes_the_text_of_every_form():
    for row, messages, _ in CHATS:
        texts, _ = train_tokenizer.row_texts(json.loads(dumps({"text": None} | row)) if "text" not in row else row)
        if "text" in row:
            assert texts == [row["text"]]
        else:
            assert [text for text in texts if not text.startswith("\n")] == [
                f"{message['role']}\n{message['content']}" for message in messages if message["content"]
            ]
    for row, (chosen, rejected) in PAIRS:
        assert len(train_tokenizer.row_texts(row)[0]) == len(chosen) + len(rejected)
    assert train_tokenizer.row_texts({"content": "plain"})[0] == ["plain"]
    assert "choices" in train_tokenizer.row_texts({"question": "q", "answer": "a", "choices": [1]})[1]
