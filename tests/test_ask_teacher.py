"""scripts/ask_teacher.py with a model of ours and with a server on this machine: pytest tests/test_ask_teacher.py"""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import cli
from dataset.chat import EOS_ID, load_tokenizer, render_chat
from dataset.checks import conversation_faults
from dataset.lm_dataset import sft_dataset, summary
from evaluation import endpoint
from evaluation.endpoint import Endpoint
from model import checkpoint
from model.export.huggingface import save_hf
from model.inference.engine import SamplingParams, generate
from model.inference.tools import SCHEMAS
from scripts import ask_teacher

SCRIPT = Path(ask_teacher.__file__).resolve()
CALL = {"name": "calculator", "arguments": {"expression": "1 + 1"}}


class Done(NamedTuple):
    code: int
    err: str


@pytest.fixture(autouse=True)
def no_key_and_no_proxy(monkeypatch):
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*flags) within this process: most tests need not wait for torch to start again."""

    def run_here(*args) -> Done:
        monkeypatch.setattr(sys, "argv", ["ask_teacher.py", *map(str, args)])
        try:
            cli.run(ask_teacher.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return Done(code, capsys.readouterr().err)

    return run_here


def write(path: Path, *rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(path: Path) -> dict[str, dict]:
    """{the last question: the answer} of an output file."""
    rows = [row["conversations"] for row in read(path)]
    assert len({row[-2]["content"] for row in rows}) == len(rows)
    return {row[-2]["content"]: row[-1] for row in rows}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


# ------------------------------------------------------------------------------------------------ models of ours


@pytest.fixture
def teacher(tiny, tmp_path):
    """Random weights that end some of their answers."""
    model = tiny(vocab_size=6400, num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[EOS_ID] *= 3
    checkpoint.save(tmp_path / "full_sft_64.pth", model, {"arguments": {"max_seq_len": 128}})
    save_hf(tmp_path / "hf", model, load_tokenizer(), torch.float32)
    return model


def test_a_model_of_ours_teaches_what_it_generates(teacher, tmp_path, run):
    questions = [f"What is {n}?" for n in range(16)]
    prompts = write(tmp_path / "p.jsonl", *({"prompt": text} for text in questions), {"prompt": "word " * 120})
    command = ["--teacher", tmp_path / "full_sft_64.pth", "--prompts", prompts, "--out", tmp_path / "a.jsonl"]
    command += "--max_new_tokens 24 --dtype fp32 --device cpu --batch_size 5".split()
    done = subprocess.run([sys.executable, SCRIPT, *command], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr

    tokenizer = load_tokenizer()
    ids = [render_chat(tokenizer, [user(text)], add_generation_prompt=True)[0] for text in questions]
    params = SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=tuple(load_tokenizer().stop_ids))
    results = generate(teacher, ids, params, tokenizer)
    texts = dict(zip(questions, results, strict=True))
    ended = {text: result.text.strip() for text, result in texts.items() if result.finish_reason == "stop"}
    ended = {text: answer for text, answer in ended.items() if answer}
    assert {text: message["content"] for text, message in answers(tmp_path / "a.jsonl").items()} == ended
    dropped = {row["conversations"][0]["content"]: row["why"] for row in read(tmp_path / "a.dropped.jsonl")}
    assert dropped.keys() == texts.keys() - ended.keys()
    assert {text for text, why in dropped.items() if why == "cut off"} == {
        text for text, result in texts.items() if result.finish_reason == "length"
    }
    assert 3 <= len(ended) <= 13 and "1 too long" in done.stderr and f"{len(ended)} answers" in done.stderr

    assert not [fault for row in read(tmp_path / "a.jsonl") for fault in conversation_faults(row)]
    figures = summary(sft_dataset(tmp_path / "a.jsonl", tokenizer, 128, cache_dir=tmp_path, quiet=True))
    assert figures["used"] == figures["lines"] == len(ended)

    before = (tmp_path / "a.jsonl").read_bytes()
    again = run(*command)  # asks only what is too long, again in vain but at once
    assert again.code == 0 and f"{len(ended)} prompts have an answer" in again.err
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_folder_answers_the_same_and_a_sampled_answer_does_not_depend_on_the_run(teacher, tmp_path, run):
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"What is {n}?"} for n in range(12)))
    flags = "--max_new_tokens 24 --dtype fp32 --device cpu --temperature 1 --top_p 0.9 --seed 7".split()
    for name, out in (("full_sft_64.pth", "a.jsonl"), ("hf", "b.jsonl")):
        done = run("--teacher", tmp_path / name, "--prompts", prompts, "--out", tmp_path / out, *flags)
        assert done.code == 0, done.err
    whole = answers(tmp_path / "a.jsonl")
    assert (
        len(whole) >= 3 and len({m["content"] for m in whole.values()}) > 1 and answers(tmp_path / "b.jsonl") == whole
    )
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:2]))
    run("--teacher", tmp_path / "hf", "--prompts", prompts, "--out", tmp_path / "a.jsonl", *flags, "--batch_size", 2)
    assert answers(tmp_path / "a.jsonl") == whole


# ------------------------------------------------------------------------------------------------ an endpoint


class Server:
    """Speaks chat completions; `reply(body)` gives (status, headers, JSON value or bytes), or None to hang up."""

    def __init__(self):
        self.bodies, self.headers, self.paths = [], [], []
        self.reply = lambda body: completion(f"Answer to {question(body)}")
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.headers.append(self.headers)
                server.paths.append(self.path)
                reply = server.reply(body)
                if reply is None:
                    return
                status, headers, content = reply
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in (headers | {"Content-Length": str(len(content))}).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client was killed

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def asked(self) -> list[str]:
        return sorted(map(question, self.bodies))


def question(body: dict) -> str:
    return body["messages"][-1]["content"]


def completion(content: str | None, finish_reason: str = "stop", **fields) -> tuple[int, dict, dict]:
    message = {"role": "assistant", "content": content, **fields}
    return 200, {}, {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


@pytest.fixture
def server(monkeypatch):
    openai = pytest.importorskip("openai")
    monkeypatch.setattr(endpoint, "RETRIES", 4)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def ask(server, tmp_path, run):
    """ask(*rows, flags=[]) -> the end of a run with these prompts; the answers are in a.jsonl."""

    def ask_server(*rows, flags=()) -> Done:
        prompts = write(tmp_path / "p.jsonl", *rows)
        command = ["--teacher", server.url, "--model", "m", "--prompts", prompts, "--out", tmp_path / "a.jsonl"]
        return run(*command, *flags)

    return ask_server


def test_every_answer_belongs_to_its_prompt_in_whatever_order_they_come(server, ask, tmp_path):
    together = threading.Barrier(4, timeout=20)  # nobody gets an answer before four have asked

    def reply(body):
        together.wait()
        return completion(f"Answer to {question(body)}")

    server.reply = reply
    done = ask(*({"prompt": f"q{n}"} for n in range(12)), flags=["--concurrency", 4])
    assert done.code == 0, done.err
    assert {q: m["content"] for q, m in answers(tmp_path / "a.jsonl").items()} == {
        f"q{n}": f"Answer to q{n}" for n in range(12)
    }
    assert set(server.paths) == {"/v1/chat/completions"} and "12/12" in done.err
    assert server.bodies[0] == {
        "model": "m",
        "messages": server.bodies[0]["messages"],
        "temperature": 0,
        "max_tokens": 512,
    }
    assert server.headers[0]["Authorization"] is None


def test_prompts_are_asked_once_and_faulty_lines_are_named(server, ask, tmp_path):
    pair = [user("a"), {"role": "assistant", "content": "old"}]
    done = ask(
        {"prompt": "a"}, {"conversations": pair}, {"conversations": pair[:1], "other": 1},
        {"conversations": [*pair, user("b"), {"role": "assistant", "content": ""}]},
        "{not json", {"conversations": pair[1:]}, {"text": "x"}, {"prompt": 3}, {"prompt": " "},
        {"conversations": [{"role": "system", "content": "s"}]}, {"conversations": [{"from": "human"}]},
        {"prompt": "c"},
    )  # fmt: skip
    assert done.code == 0 and server.asked() == ["a", "b", "c"]
    assert "12 lines, 3 prompts, 2 duplicates, 7 faulty" in done.err
    assert "2 lines (6, 10): no user message" in done.err and "line 5: invalid JSON" in done.err
    (history,) = [row["conversations"] for row in read(tmp_path / "a.jsonl") if row["conversations"][-2] == user("b")]
    assert history == [*pair, user("b"), {"role": "assistant", "content": "Answer to b"}]
    again = ask({"prompt": "c"}, {"prompt": "d"}, {"prompt": "e"}, flags=["--limit", 2])
    assert server.asked() == ["a", "b", "c", "d"] and "1 prompts have an answer" in again.err
    none = ask({"text": "x"})
    assert none.code == 1 and none.err.count("\n") == 1 and 'no "prompt" and no "conversations" key' in none.err


def test_what_passes_is_tried_again(server, ask, tmp_path):
    troubles = [(429, {"Retry-After": "0"}, {}), None, (503, {}, b"busy"), (500, {}, {"error": "oh"})]

    def reply(body):
        return troubles.pop() if troubles else completion("good")

    server.reply = reply
    done = ask({"prompt": "a"}, flags=["--concurrency", 1])
    assert done.code == 0 and len(server.bodies) == 5 and answers(tmp_path / "a.jsonl")["a"]["content"] == "good"
    server.reply = lambda body: (503, {}, {"error": {"message": "still\nbusy"}})
    done = ask({"prompt": "a"}, {"prompt": "b"})
    assert done.code == 1 and len(server.bodies) == 10
    assert "HTTP 503: still busy" in done.err.splitlines()[-1]


def test_a_server_that_was_there_is_tried_again_when_it_is_gone(server):
    teacher = Endpoint(server.url, "m", {}, None)
    answer, reason = teacher.answer([user("a")], None)
    assert (answer.content, reason) == ("Answer to a", "stop")
    server.reply = lambda body: None
    with pytest.raises(endpoint.EndpointError, match="run again"):
        teacher.answer([user("a")], None)
    assert len(server.bodies) == 1 + 5


@pytest.mark.parametrize(
    "reply, text",
    [
        ((401, {}, {"error": {"message": "sk-secret is wrong"}}), "OPENAI_API_KEY"),
        ((404, {}, {"error": {"message": "no model m"}}), "HTTP 404: no model m"),
        ((200, {}, b"<html>hello"), "<html>hello"),
        ((200, {}, {"choices": []}), "not a chat completion"),
        ((302, {"Location": "/elsewhere"}, b""), "HTTP 501"),
    ],
)  # fmt: skip
def test_what_stays_wrong_ends_in_one_line(server, ask, reply, text):
    server.reply = lambda body: reply
    done = ask({"prompt": "a"}, {"prompt": "b"}, flags=["--concurrency", 1])
    errors = done.err.splitlines()[1:]  # after the line about the prompts
    assert done.code == 1 and len(errors) == 1 and errors[0].startswith("error: ") and text in errors[0]
    assert len(server.bodies) == (5 if reply[0] == 302 else 1) and "secret" not in done.err


def test_a_key_comes_from_the_environment_and_goes_to_one_server_only(server, ask, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-123\n")
    assert "unencrypted" not in ask({"prompt": "a"}).err
    assert server.headers[0]["Authorization"] == "Bearer sk-123" and "sk-123" not in (tmp_path / "a.jsonl").read_text()
    other = Server()
    seen = []
    other.http.RequestHandlerClass.do_GET = lambda self: seen.append(self.headers["Authorization"])
    server.reply = lambda body: (302, {"Location": f"{other.url}/x"}, b"")
    assert ask({"prompt": "b"}).code == 1 and seen and set(seen) == {None}
    other.http.shutdown()
    other.http.server_close()
    server.reply = lambda body: (401, {}, b"")
    assert "does not accept the key in OPENAI_API_KEY (HTTP 401)" in ask({"prompt": "b"}).err

    capsys.readouterr()
    for url, warns in (("http://example.org/v1", 1), ("https://example.org/v1", 0), ("http://[::1]:80/v1", 0)):
        Endpoint(url, "m", {}, "sk-123")
        assert capsys.readouterr().err.count("example.org unencrypted") == warns
    with pytest.raises(endpoint.EndpointError, match="characters that no key has"):
        Endpoint("https://example.org/v1", "m", {}, "sk\n-1")


def test_no_server_no_file_no_sense(run, tmp_path, server):
    prompts, out = write(tmp_path / "p.jsonl", {"prompt": "a"}), tmp_path / "a.jsonl"
    rest = ["--prompts", prompts, "--out", out]
    dead = Server()
    dead.http.shutdown()
    dead.http.server_close()
    begin = time.perf_counter()
    cases = [
        (["--teacher", dead.url, "--model", "m", *rest], 1, "cannot be reached"),
        (["--teacher", "http://h:port/v1", "--model", "m", *rest], 1, "is not a URL"),
        (["--teacher", tmp_path / "no.pth", *rest], 2, "no such file or folder"),
        (["--teacher", prompts, *rest], 1, "p.jsonl"),
        (["--teacher", server.url, *rest], 2, "--model"),
        (["--teacher", "x", "--prompts", tmp_path / "no.jsonl", "--out", out], 1, "no such file"),
        (["--teacher", "x", "--prompts", prompts, "--out", prompts], 2, "another file"),
        (["--teacher", "x", "--prompts", prompts, "--out", tmp_path / "no" / "a.jsonl"], 2, "no such folder"),
        (["--teacher", "x", *rest, "--top_p", 0], 2, "top_p"),
        (["--teacher", "x", *rest, "--limit", 0], 2, "--limit 0"),
    ]
    for command, code, text in cases:
        done = run(*command)
        assert done.code == code and text in done.err.splitlines()[-1] and "Traceback" not in done.err, done
        assert not out.exists()
    assert time.perf_counter() - begin < 5


def test_without_the_openai_package_an_endpoint_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    prompts = write(tmp_path / "p.jsonl", {"prompt": "a"})
    command = [
        "--teacher",
        "http://127.0.0.1:9/v1",
        "--model",
        "m",
        "--prompts",
        prompts,
        "--out",
        tmp_path / "a.jsonl",
    ]
    done = run(*command)
    assert done.code == 2 and "pip install openai" in done.err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ which answers


LOOP = "The sun rises in the east. " * 6
TABLE = "Primes: 2, 3, 5, 7. " + "=" * 40


@pytest.mark.parametrize(
    "reply, expected",
    [
        (completion(" yes \n"), {"content": "yes"}),
        (completion("<think>\nhm\n</think>\n\nyes"), "markers in the text"),
        (completion("hm</think>yes"), "markers in the text"),
        (completion("yes", reasoning_content="hm"), {"content": "yes", "reasoning_content": "hm"}),
        (completion("yes", reasoning="hm", tool_calls=None), {"content": "yes", "reasoning_content": "hm"}),
        (completion("Write <think> and </think>."), {"content": "Write <think> and </think>."}),
        (completion(TABLE), {"content": TABLE}),
        (completion("yes", "length"), "cut off"),
        (completion("yes", "content_filter"), "filtered"),
        (completion(None), "empty"),
        (completion(" ", reasoning_content="hm"), "empty"),
        (completion("<think> hm"), "markers in the text"),
        (completion("Well. " + LOOP), "repeats endlessly"),
        (completion("yes", reasoning_content="x" * 100), "repeats endlessly"),
        (completion('<tool_call>{"name": </tool_call>'), "markers in the text"),
        (completion("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "malformed tool call"),
        (completion("half \ud800"), "content has a lone surrogate, which is not a Unicode character"),
        (completion(None, tool_calls=[{"function": {"name": "rm", "arguments": "{}"}}]), 'calls "...", which tools'),
    ],
)  # fmt: skip
def test_answers_of_no_use_are_kept_apart_and_not_asked_again(server, ask, tmp_path, reply, expected):
    server.reply = lambda body: reply if question(body) == "a" else completion("good")
    done = ask({"prompt": "a"}, {"prompt": "b"})
    assert done.code == 0 and answers(tmp_path / "a.jsonl")["b"]["content"] == "good"
    if isinstance(expected, dict):
        assert answers(tmp_path / "a.jsonl")["a"] == {"role": "assistant"} | expected
        assert not (tmp_path / "a.dropped.jsonl").exists()
    else:
        (row,) = read(tmp_path / "a.dropped.jsonl")
        assert expected in row["why"] and f"no use: 1 {row['why']}" in done.err
        again = ask({"prompt": "a"}, {"prompt": "b"})
        assert again.code == 0 and "1 dropped (delete a.dropped.jsonl" in again.err and len(server.bodies) == 2
        (tmp_path / "a.dropped.jsonl").unlink()
        ask({"prompt": "a"}, {"prompt": "b"})
        assert server.asked() == ["a", "a", "b"]


def test_tools_go_to_the_server_and_calls_come_back(server, ask, tmp_path):
    in_openai_form = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1 + 1"}'}}
    server.reply = lambda body: completion("", "tool_calls", tool_calls=[{"id": "call_x", **in_openai_form}])
    system = {"role": "system", "content": "Be brief.", "tools": json.dumps(SCHEMAS)}
    history = [system, user("1 + 1 = ?"), {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL, CALL])}]
    results = [{"role": "tool", "content": '{"result": 2}'}, {"role": "tool", "content": '{"result": 3}'}]
    assert ask({"conversations": [*history, *results]}).code == 0
    body = server.bodies[0]
    assert body["tools"] == SCHEMAS and body["messages"][0] == {"role": "system", "content": "Be brief."}
    calls = body["messages"][2]["tool_calls"]
    assert [{**call, "id": ""} for call in calls] == [{"id": "", **in_openai_form}] * 2
    assert [m["tool_call_id"] for m in body["messages"][3:]] == [call["id"] for call in calls] and calls[0] != calls[1]
    (row,) = read(tmp_path / "a.jsonl")
    assert json.loads(row["conversations"][-1]["tool_calls"]) == [CALL] and row["conversations"][:-1] == [
        *history,
        *results,
    ]
    assert not [fault for fault in conversation_faults(row) if fault.level == "error"]


def test_refused_prompts_are_counted_and_too_many_end_the_run(server, ask, tmp_path):
    refusal = (400, {}, {"error": {"message": "too many tokens"}})
    server.reply = lambda body: refusal if question(body) == "long" else completion("good")
    done = ask({"prompt": "long"}, {"prompt": "b"})
    assert done.code == 0 and "line 1: HTTP 400: too many tokens" in done.err and "no use: 1 refused" in done.err
    server.reply = lambda body: refusal
    done = ask(*({"prompt": f"q{n}"} for n in range(50)), flags=["--concurrency", 1])
    assert done.code == 1 and "refused 10 prompts in a row, the last with HTTP 400: too many" in done.err
    assert len(server.bodies) < 50 and len(read(tmp_path / "a.jsonl")) == 1


# ------------------------------------------------------------------------------------------------ killed and resumed


def test_killed_while_it_waits_and_resumed(server, ask, tmp_path):
    release, waiting = threading.Event(), threading.Event()

    def reply(body):
        if len(server.bodies) > 4:
            waiting.set()
            release.wait(60)
        return completion(f"Answer to {question(body)}")

    server.reply = reply
    rows, out = [{"prompt": f"q{n}"} for n in range(9)], tmp_path / "a.jsonl"
    prompts = write(tmp_path / "p.jsonl", *rows)
    command = [sys.executable, SCRIPT, "--teacher", server.url, "--model", "m", "--prompts", prompts, "--out", out]
    process = subprocess.Popen([*command, "--concurrency", "2"], stderr=subprocess.DEVNULL, env={**os.environ})
    assert waiting.wait(60)
    deadline = time.monotonic() + 30
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    release.set()
    kept = answers(out)
    assert 3 <= len(kept) <= 4
    before = server.asked()
    with open(out, "ab") as file:  # as if killed in the middle of a write
        file.write(b'{"conversations": [{"role": "user", "content": "q8"}, {"role": "assis')
    done = ask(*rows)
    assert done.code == 0 and f"line {len(kept) + 1} was written in part: cut off" in done.err
    assert f"{len(kept)} prompts have an answer in a.jsonl; {9 - len(kept)} are left" in done.err
    assert answers(out).keys() == {row["prompt"] for row in rows}
    assert sorted(before + [q for q in answers(out) if q not in kept]) == server.asked()


def test_a_file_that_is_not_of_answers_stays_as_it_is(server, ask, tmp_path):
    for content in (b"dear diary", b'{"text": "x"}\n', b'{"conversations": []}\n', b'{}\n{"conversations": [{"ro'):
        (tmp_path / "a.jsonl").write_bytes(content)
        done = ask({"prompt": "a"})
        assert (
            done.code == 1
            and "a.jsonl" in done.err
            and done.err.count("\n") < 3
            and (tmp_path / "a.jsonl").read_bytes() == content
        )
    write(tmp_path / "a.jsonl", {"conversations": [user("a"), {"role": "assistant", "content": "old"}]})
    os.truncate(tmp_path / "a.jsonl", (tmp_path / "a.jsonl").stat().st_size - 1)  # as some editors leave it
    assert ask({"prompt": "a"}, {"prompt": "b"}).code == 0
    assert server.asked() == ["b"] and answers(tmp_path / "a.jsonl").keys() == {"a", "b"}
