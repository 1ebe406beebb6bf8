"""eval_model.py as its users run it: as a program, with pipes and with a terminal."""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import cli
import eval_model
from dataset.chat import load_tokenizer
from dataset.jsonl import DataError
from evaluation.scoreboard import read_heldout
from model import checkpoint
from model.export.huggingface import save_hf
from model.inference import chatbot
from model.inference.engine import SamplingParams, generate
from model.model import MiniMindConfig, MiniMindLM

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
GREEDY = ["--temperature", "0", "--max_new_tokens", "12", "--dtype", "fp32"]
PLAIN = ["--compile", "0"]  # no note of what is compiled, or cannot be


def parrot(sentence: str, ends: bool = True) -> MiniMindLM:
    """A model that answers every prompt with this sentence, no token of which comes twice; or goes on for ever.

    Its blocks add nothing, so the logit of m after n is the product of their embeddings, each channel times the norm's
    weight. Token n shares a channel with n + 1, with a larger product than with n - 1, and has one alone whose weight
    is negative, so that it does not follow itself.
    """
    tokenizer = load_tokenizer()
    model = MiniMindLM(MiniMindConfig(**{**TINY, "hidden_size": 64}))
    ids = [tokenizer.encode("assistant\n").ids[-1], *tokenizer.encode(sentence).ids, *([2] if ends else [])]
    assert len(set(ids)) == len(ids)
    weight = [0.0] + [1 + 0.5 * n for n in range(len(ids))]  # of the channel before token n, squared
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
                p.zero_()
        embedding, norm = model.model.embed_tokens.weight, model.model.norm.weight
        norm[:32], norm[32:] = 50.0, -50.0
        for n, token in enumerate(ids):
            embedding[token, n], embedding[token, n + 1] = weight[n] ** 0.5, weight[n + 1] ** 0.5
            embedding[token, 32 + n] = (weight[n] + weight[n + 1] + 1) ** 0.5
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random weights of three stages, and in sub-folders a parrot and a Hugging Face folder."""
    out = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    model = MiniMindLM(MiniMindConfig(**TINY, initializer_range=0.3))
    for stage in ("pretrain", "full_sft", "reason"):
        checkpoint.save(out / f"{stage}_32.pth", model, {"arguments": {"max_seq_len": 96}})
    checkpoint.save(out / "parrot" / "full_sft_64.pth", parrot("我叫MiniMind。"), {"note": "parrot"})
    checkpoint.save(out / "endless" / "full_sft_64.pth", parrot("一二三", ends=False), {"note": "parrot"})
    save_hf(out / "hf", model, load_tokenizer(), torch.float32)
    return out


class Done(NamedTuple):
    code: int
    out: str
    err: str


def run_program(*args, stdin: bytes = b"", cwd: Path | None = None) -> Done:
    command = [sys.executable, str(ROOT / "eval_model.py"), *map(str, args)]
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=cwd, env=ENV, timeout=60)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def run(monkeypatch, capsys):
    """The same within this process: most tests need not wait for torch to start again."""

    def run_here(*args, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["eval_model.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            cli.run(eval_model.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return Done(code, *capsys.readouterr())

    return run_here


def is_one_error_line(done: Done, code: int, text: str) -> bool:
    lines = done.err.splitlines()
    assert done.code == code and len(lines) == 1 and "error: " in lines[0], done.err
    return text in lines[0]


# ------------------------------------------------------------------------------------------------ one answer


def test_ask_prints_the_answer_and_nothing_else(weights, tmp_path, run):
    done = run_program("--out_dir", weights / "parrot", "--ask", "你是谁？", *PLAIN, cwd=tmp_path)
    assert done == (0, "我叫MiniMind。\n", "")
    assert run("--out_dir", weights / "parrot", "--ask", "x", "--stream", 0).out == "我叫MiniMind。\n"


def test_ask_continues_a_text_as_the_engine_does(weights, run):
    model, _ = checkpoint.load(weights / "pretrain_32.pth")
    tokenizer = load_tokenizer()
    params = SamplingParams(0, max_new_tokens=12, stop_token_ids=(0, 1, 2))
    expected = generate(model, [[0, *tokenizer.encode("小猫").ids]], params, tokenizer)[0].text
    assert run("--out_dir", weights, "--model_mode", 0, "--ask", "小猫", *GREEDY).out == expected + "\n"


def test_seed_and_huggingface_folder_give_the_same_answer(weights, run):
    options = ["--ask", "hello", "--max_new_tokens", 12, "--dtype", "fp32"]
    raw = run("--out_dir", weights, "--seed", 5, *options)
    assert len(raw.out) > 5
    assert run("--load", 1, "--model_path", weights / "hf", "--seed", 5, *options) == raw
    assert run("--out_dir", weights, "--seed", 6, *options) != raw


def test_another_tokenizer_is_used_as_transformers_uses_it(weights, tmp_path, run):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "foreign"
    shutil.copytree(weights / "hf", folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hi": 3, "there": 4}
    words |= {f"w{i}": i for i in range(len(words), 6400)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = theirs.generate(**tokenizer("hi there", return_tensors="pt"), do_sample=False, max_new_tokens=12)
    options = ["--load", 1, "--model_path", folder, *GREEDY]
    done = run(*options, "--model_mode", 0, "--ask", "hi there")
    assert done.code == 0 and done.out.split() == tokenizer.decode(ids[0, 2:], skip_special_tokens=True).split()
    told = run(*options, "--ask", "hi there")  # in our template, with its own end of a turn
    assert told.code == 0 and "chat template" in told.err
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}), encoding="utf-8")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    refused = run(*options, "--ask", "hi there")
    assert refused.code == 1 and "chat template" in refused.err.splitlines()[-1]


def test_another_architecture_goes_through_transformers(weights, tmp_path, run):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "untied"
    shutil.copytree(weights / "hf", folder)
    config = transformers.AutoConfig.from_pretrained(folder, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    options = ["--load", 1, "--model_path", folder, *GREEDY]
    done = run(*options, "--ask", "hi there")
    assert done.code == 0 and done.out.strip() and "through transformers" in done.err
    refused = run(*options, "--ask", "hi there", "--quantize", "int8")
    assert refused.code == 1 and "quantised" in refused.err.splitlines()[-1]


def test_reasoning_answers_begin_with_thinking(weights, run):
    def opens_with_thinking(*args):
        return run("--out_dir", weights, *args, "--ask", "hi", *GREEDY).out.startswith("<think>\n")

    assert opens_with_thinking("--model_mode", 3) and opens_with_thinking("--thinking", 1)
    assert not opens_with_thinking("--model_mode", 3, "--thinking", 0) and not opens_with_thinking()


def test_of_several_sizes_the_newest_is_taken_and_said(tmp_path, run):
    for size, age in ((16, 100), (48, 0), (64, 50)):
        config = MiniMindConfig(**{**TINY, "hidden_size": size})
        path = checkpoint.checkpoint_path(tmp_path, "full_sft", config)
        checkpoint.save(path, MiniMindLM(config), {"n": size})
        os.utime(path, (time.time() - age,) * 2)
    done = run("--out_dir", tmp_path, "--ask", "x", *GREEDY)
    assert done.code == 0 and "the newest, full_sft_48.pth" in done.err
    assert run("--out_dir", tmp_path, "--ask", "x", "--hidden_size", 16, *GREEDY).err == ""


def test_one_model_by_many_names(weights, run):
    """A path, a stage, a folder: what is given is one model, and so is the answer."""
    options = ["--ask", "hello", "--seed", 5, "--max_new_tokens", 12, "--dtype", "fp32"]
    expected = run("--out_dir", weights, *options)
    assert expected.code == 0 and len(expected.out) > 5
    for name in (
        ["--model", weights / "full_sft_32.pth"], ["--model", weights / "hf"],
        ["--weight", weights / "full_sft_32.pth"],
        ["--weight", "full_sft", "--out_dir", weights], ["--out_dir", weights, "--hidden_size", 32, "--use_moe", 0],
        ["--load", 0, "--model_mode", 1, "--out_dir", weights], ["--load", 1, "--model_path", weights / "hf"],
    ):  # fmt: skip
        assert run(*name, *options) == expected, name


# ------------------------------------------------------------------------------------------------ conversation


@pytest.mark.parametrize("mode", [0, 1])
def test_automatic_test_through_a_pipe(weights, mode):
    done = run_program("--out_dir", weights, "--model_mode", mode, *GREEDY, *PLAIN, stdin=b"nonsense\n0\n")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("[0] 自动测试") == 2  # asked again after nonsense
    assert ("法国的首都是" if mode == 0 else "you> 你是谁？\nminimind> ") in done.out
    assert done.out.count("tokens/s]") >= 8


@pytest.mark.parametrize("stdin", [b"1\nhello\n/exit\n", b"1\nhello\n", b"1\n\n\xff\xfe broken\n/clear\n"])
def test_manual_input_through_a_pipe_ends_politely(weights, run, stdin):
    done = run("--out_dir", weights / "parrot", stdin=stdin)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("minimind> 我叫MiniMind。") == 1


def test_the_model_sees_the_conversation(weights, monkeypatch, run):
    seen = []
    render = chatbot.render_chat

    def watched(tokenizer, messages, **options):
        seen.append(messages)
        return render(tokenizer, messages, **options)

    monkeypatch.setattr(chatbot, "render_chat", watched)

    def prompts(*args, stdin):
        seen.clear()
        run("--out_dir", weights / "parrot", *args, stdin=stdin)
        return [[message["content"] for message in messages] for messages in seen]

    answer = "我叫MiniMind。"
    assert prompts(stdin=b"1\na\nb\n/clear\nc\n")[-1] == ["c"]
    assert prompts(stdin=b"1\na\nb\n")[-1] == ["a", answer, "b"]
    assert prompts("--history_cnt", 2, stdin=b"1\na\nb\nc\n")[-1] == ["b", answer, "c"]
    assert prompts("--max_seq_len", 50, "--max_new_tokens", 12, "--system", "Be kind.", stdin=b"1\na\nb\nc\n")[-1] == [
        "Be kind.", "b", answer, "c",
    ]  # fmt: skip
    assert prompts("--history_cnt", 0, "--system", "Be kind.", stdin=b"1\na\nb\n")[-1] == ["Be kind.", "b"]


def test_old_turns_are_dropped_and_it_is_said(weights, run):
    conversation = b"1\n" + "把这些数从小到大排列：3, 1, 2\n".encode() * 5
    options = ["--out_dir", weights, *GREEDY]
    assert "oldest messages were dropped]" in run(*options, stdin=conversation).out
    assert "dropped" not in run(*options, "--history_cnt", 0, stdin=conversation).out
    too_long = run(*options, stdin=b"1\n" + "很长".encode() * 200 + b"\nhi\n").out
    assert "too long by" in too_long and too_long.count("tokens/s]") == 1


class Terminal:
    """eval_model.py in a pseudo-terminal."""

    def __init__(self, *args):
        import pty  # Windows has none

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
            os.execve(sys.executable, [sys.executable, str(ROOT / "eval_model.py"), *args], {**ENV, "TERM": "xterm"})
        self.seen = ""

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.time() + 60
        while self.seen.count(text) < times:
            assert time.time() < deadline, f"no {text!r} in:\n{self.seen}"
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"ended without {text!r}:\n{self.seen}") from None

    def wait_until_idle(self) -> None:
        """Until it sleeps: a Ctrl-C between the prompt and the wait for a key gets lost in Python's readline."""
        stat = Path(f"/proc/{self.pid}/stat")
        deadline = time.time() + 60
        while stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "S":
            assert time.time() < deadline, self.seen

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self) -> int:
        deadline = time.time() + 30
        while time.time() < deadline:
            try:
                if select.select([self.fd], [], [], 0.1)[0]:
                    self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
            except OSError:
                pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("did not end")


SLOW = [pytest.param(key, marks=pytest.mark.slow) for key in ("\x04", "\x03")]


@pytest.mark.posix
@pytest.mark.parametrize("leave", ["/exit\r", *SLOW], ids=["exit", "ctrl-d", "ctrl-c"])
def test_manual_input_in_a_terminal(weights, leave):
    terminal = Terminal("--out_dir", str(weights / "parrot"))
    terminal.wait_for("manual input")
    terminal.type("1\r")
    terminal.wait_for("you> ")
    terminal.type("你好，MiniMind 👶\r")
    terminal.wait_for("tokens/s]")
    assert "minimind> 我叫MiniMind。" in terminal.seen
    terminal.wait_for("you> ", 2)
    terminal.wait_until_idle()
    terminal.type(leave)
    assert terminal.exit_code() == 0, terminal.seen
    assert "Traceback" not in terminal.seen


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_but_not_the_conversation(weights):
    terminal = Terminal("--out_dir", str(weights / "endless"), "--max_seq_len", "30000", "--max_new_tokens", "15000")
    terminal.wait_for("manual input")
    terminal.type("1\r")
    terminal.wait_for("you> ")
    terminal.type("hi\r")
    terminal.wait_for("minimind> ")
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.wait_for(", stopped]")
    terminal.wait_for("you> ", 2)
    terminal.type("/exit\r")
    assert terminal.exit_code() == 0


@pytest.mark.slow
def test_thinking_is_dim_in_a_terminal(weights):
    terminal = Terminal("--out_dir", str(weights), "--model_mode", "3", *GREEDY)
    terminal.wait_for("manual input")
    terminal.type("0\r")
    terminal.wait_for("tokens/s]")
    assert "\033[2m<think>" in terminal.seen
    assert terminal.exit_code() == 0


# ------------------------------------------------------------------------------------------------ score


def test_score(weights, tmp_path, run):
    name = {"skill": "name", "conversations": [{"role": "user", "content": "你叫什么？"}]}
    rows = [
        name | {"answers": ["别的", "我叫minimind"]},
        name | {"answers": ["我叫minimind。"], "exact": True},
        name | {"skill": "other", "must_contain": ["MINI", "我叫"]},
        name | {"skill": "other", "must_contain": ["dog"]},
    ]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    scores = tmp_path / "scores.json"
    done = run("--out_dir", weights / "parrot", "--score", heldout, "--scores_out", scores, "--show_wrong", 1)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    score = json.loads(lines[-1])["score"]
    assert (score["n"], score["correct"], score["percent"]) == (4, 2, 50.0)
    assert score["skills"] == {skill: {"n": 2, "correct": 1, "percent": 50.0} for skill in ("name", "other")}
    assert lines[0].split() == ["skill", "n", "correct", "percent"]
    assert lines[3].split() == ["overall", "4", "2", "50.0"]
    assert "line 2, name: 你叫什么？" in lines and "  answered: 我叫MiniMind。" in lines and "dog" not in str(lines)
    saved = json.loads(scores.read_text(encoding="utf-8"))
    assert saved["score"] == score and [q["right"] for q in saved["questions"]] == [True, False, True, False]
    assert "4/4 questions" in done.err


def test_every_question_gets_its_own_answer(weights, tmp_path, run):
    questions = ["为什么今天的天空是蓝色的？", "Who?", "hello there"]
    rows = [
        {"skill": "x", "conversations": [{"role": "user", "content": q}], "answers": ["unlikely"]} for q in questions
    ]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--out_dir", weights, *GREEDY]
    run(*options, "--score", tmp_path / "heldout.jsonl", "--scores_out", tmp_path / "scores.json")
    answers = [q["answer"] for q in json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["questions"]]
    assert answers == [run(*options, "--ask", q).out.strip() for q in questions]
    assert len(set(answers)) == 3


# ------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_one_line(weights, tmp_path, run):
    assert is_one_error_line(run_program("--out_dir", tmp_path / "none", "--ask", "x"), 1, "train_full_sft.py first")
    assert is_one_error_line(run_program("--nonsense"), 2, "--nonsense")
    cases = [
        (1, ["--score", tmp_path / "none.jsonl"], "no such file"),
        (1, ["--ask", "很长" * 200], "--max_seq_len"),
        (2, ["--device", "abacus", "--ask", "x"], "--device abacus"),
    ]
    for code, args, text in cases:
        assert is_one_error_line(run("--out_dir", weights, *args), code, text)


def parsed(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval_model.py", *map(str, args)])
    return eval_model.arguments()


def test_weights_that_cannot_be_had(weights, tmp_path, monkeypatch):
    (tmp_path / "full_sft_32.pth").touch()
    cases = [
        (["--out_dir", tmp_path], "is empty"),
        (["--out_dir", weights, "--model_mode", 2], "train_dpo.py"),
        (["--out_dir", weights, "--hidden_size", 33], "full_sft_33"),
        (["--out_dir", weights, "--use_moe", "True"], "full_sft_SIZE_moe.pth"),
        (["--weight", tmp_path / "none.pth"], "none.pth"),
        (["--weight", "none", "--out_dir", weights], "none_"),
        (["--model", tmp_path / "none.pth"], "none.pth"),
        (["--out_dir", weights, "--lora_name", "nope"], "nope_32.pth"),
        (["--load", 1, "--model_path", tmp_path], "config.json"),
        (["--load", 1, "--model_path", tmp_path / "none"], "does not exist"),
    ]
    for args, text in cases:
        with pytest.raises(checkpoint.CheckpointError) as caught:
            eval_model.load(parsed(monkeypatch, *args, "--device", "cpu"))
        assert text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="empty"):
        (tmp_path / "empty.jsonl").touch()
        read_heldout(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    "args",
    [["--model_path", "x"], ["--model", "x", "--weight", "y"], ["--model", "x", "--hidden_size", "64"],
     ["--history_cnt", "3"], ["--temperature", "-1"], ["--top_p", "0"],
     ["--ask", " "], ["--model_mode", "9"], ["--max_seq_len", "0"], ["--max_new_tokens", "0"], ["--show_wrong", "1"],
     ["--stream", "maybe"], ["--thinking", "2"], ["--tools", "1", "--score", "FILE"],
     ["--tools", "1", "--model_mode", "0"], ["--thinking", "0", "--model_mode", "0"]],
)  # fmt: skip
def test_bad_flags_are_usage_errors(args, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(monkeypatch, *args)
    assert caught.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert args[0].strip("-") in error


@pytest.mark.slow
def test_help_is_quick_and_a_closed_pipe_is_quiet(weights):
    begin = time.time()
    assert "--model_mode" in run_program("--help").out
    assert time.time() - begin < 10  # on a quiet machine one second
    command = f"{sys.executable} {ROOT / 'eval_model.py'} --out_dir {weights} --compile 0 --ask x | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, env=ENV, timeout=60)
    assert done.stderr == b""
