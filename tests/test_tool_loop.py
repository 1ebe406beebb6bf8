"""eval_model.py --tools 1: calls are shown, carried out and answered: `pytest tests/test_tool_loop.py`."""

import argparse
import copy
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
import eval_model
from dataset.chat import load_tokenizer, render_chat
from dataset.checks import validate_messages
from model import checkpoint
from model.inference.tools import SCHEMAS
from model.model import MiniMindConfig, MiniMindLM
from tests.helpers import next_token_loss
from tests.spelled import pieces_of

ROOT = Path(__file__).resolve().parent.parent
ARGS = argparse.Namespace(tools=True, system="Be brief.", stream=True, ask=None, seed=3, history_cnt=8, model_mode=1)


def call(expression) -> str:
    return f'<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}\n</tool_call>'


class Actor:
    """Gives the answers it was given, keeps the prompts, and has room for so many messages; KeyboardInterrupt in place
    of an answer is Ctrl-C in the middle of the one after it."""

    def __init__(self, *answers, room=1000):
        self.answers, self.room, self.prompts, self.tokens, self.max_len = list(answers), room, [], 0, 64

    def overflow(self, prompt):
        return max(0, len(prompt) - self.room)

    def stream(self, prompt, seed):
        self.prompts.append(copy.deepcopy(prompt))
        answer = self.answers.pop(0)
        if answer is KeyboardInterrupt:
            yield from pieces_of(self.answers.pop(0))
            raise KeyboardInterrupt
        self.tokens += 1
        yield from pieces_of(answer)


def with_args(**changes):
    return argparse.Namespace(**vars(ARGS) | changes)


def talk(bot, *questions, **changes):
    history = []
    for n, text in enumerate(questions):
        history = eval_model.respond(bot, history, text, with_args(**changes), n)
    return history


def roles(messages):
    return [message["role"] for message in messages]


def test_a_call_is_carried_out_and_its_result_goes_to_the_model(capsys):
    bot = Actor(call("123 + 456"), "It is 579.")
    ((user, called, tool, answer),) = talk(bot, "123 + 456?")
    assert user == {"role": "user", "content": "123 + 456?"}
    assert called["tool_calls"] == [{"name": "calculator", "arguments": {"expression": "123 + 456"}}]
    assert tool == {"role": "tool", "content": '{"result": 579}'}
    assert answer == {"role": "assistant", "content": "It is 579."}
    assert bot.prompts[0] == [{"role": "system", "content": "Be brief.", "tools": SCHEMAS}, user]
    assert bot.prompts[1] == [*bot.prompts[0], called, tool]
    shown = capsys.readouterr().out
    assert f"minimind> {call('123 + 456')}\n" in shown and '\ntool> {"result": 579}\nminimind> It is 579.\n' in shown


def test_two_calls_at_once_and_words_around_them():
    bot = Actor(f"Two sums.\n{call('1 + 1')}\n{call('1 / 0')}", "2, and none.")
    ((_, called, first, second, answer),) = talk(bot, "?")
    assert (called["content"], len(called["tool_calls"])) == ("Two sums.", 2)
    assert (first["content"], second["content"]) == ('{"result": 2}', '{"error": "division by zero"}')
    assert answer["content"] == "2, and none."


def test_a_model_that_never_stops_calling_is_stopped(capsys):
    bot = Actor(*[call(n) for n in range(9)])
    (exchange,) = talk(bot, "?")
    assert roles(exchange) == ["user"] + ["assistant", "tool"] * 4 + ["assistant"]
    assert "tool_calls" not in exchange[-1] and len(bot.answers) == 4
    assert "no more are carried out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("<tool_call>\ncalculator(1)\n</tool_call>", "malformed tool call"),
        ('<tool_call>\n{"name": "calculator"', "malformed tool call: it has no end"),
        (f"<think>\n{call(1)}\n</think>\n\nIt is 1.", None),  # thought about, not called
        ("It is 1.", None),
    ],
)
def test_what_is_not_a_call_is_not_carried_out(answer, fault, capsys):
    (exchange,) = talk(Actor(answer, "never asked for"), "?")
    assert roles(exchange) == ["user", "assistant"]
    shown = capsys.readouterr().out
    assert "tool>" not in shown and (fault is None or f"[{fault}" in shown)


def test_without_tools_or_after_ctrl_c_nothing_is_carried_out(capsys):
    bot = Actor(call(1), "never asked for")
    assert roles(talk(bot, "?", tools=False)[0]) == ["user", "assistant"] and "tools" not in bot.prompts[0][0]
    assert roles(talk(Actor(KeyboardInterrupt, call(1), "never asked for"), "?")[0]) == ["user", "assistant"]
    shown = capsys.readouterr().out
    assert "tool>" not in shown and ", stopped]" in shown


@pytest.mark.parametrize("seed", range(20))
def test_no_result_is_parted_from_its_call(seed):
    """Whatever is dropped for --history_cnt or for room: what the model sees is a conversation without a fault."""
    rng = random.Random(seed)
    history_cnt, room = rng.choice([0, 2, 4, 8]), rng.choice([5, 7, 8, 12, 1000])
    answers = [rng.choice([call(1), f"{call(1)}\n{call(2)}", "done", "done"]) for _ in range(60)]
    bot = Actor(*answers, room=room)
    history = talk(bot, *"abcdefgh", history_cnt=history_cnt)
    for prompt in bot.prompts:
        errors = [fault.text for fault in validate_messages([*prompt, {"role": "assistant", "content": "x"}])]
        assert [text for text in errors if "is a list, not a JSON string" not in text] == []
        assert len(prompt) <= room and roles(prompt)[:2] == ["system", "user"]
        assert roles(prompt).count("user") <= history_cnt // 2 + 1
    assert all(exchange[0]["role"] == "user" and exchange[-1]["content"] for exchange in history)


def test_a_result_that_does_not_fit_is_said(capsys):
    bot = Actor("hi", call(1), "never asked for", room=3)
    before = talk(Actor("hi"), "hello")
    assert roles(eval_model.respond(bot, before, "?", ARGS, 1)[0]) == ["user", "assistant"]
    assert eval_model.respond(bot, before, "?", ARGS, 1) == before
    assert "too long by 1 tokens" in capsys.readouterr().out
    with pytest.raises(eval_model.DataError, match="too long by 1 tokens"):
        eval_model.ask(Actor(call(1), room=3), with_args(ask="?"))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("<think>\nhm\n</think>\n\nYes", "<think>\nhm\n</think>\n\nYes"),  # as it is trained
        ("<think>hm</think>Yes", "<think>\nhm\n</think>\nYes"),
        ("Well <tool_call>{}</tool_call><tool_call>{}", "Well \n<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}"),
        ("ab\nc", "ab\nc"),
    ],
)
def test_tags_stand_on_lines_of_their_own(answer, shown, capsys):
    screen = eval_model.Screen()
    for piece in pieces_of(answer):
        screen.show(piece)
    screen.close()
    assert capsys.readouterr().out == shown


def test_on_a_terminal_only_what_is_between_tags_is_dim(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen = eval_model.Screen()
    for piece in pieces_of("a\n<think>\nb\n</think>\nc\n<tool_call>\ncut off"):
        screen.show(piece)
    screen.close()
    shown = capsys.readouterr().out
    assert shown == "a\n\033[2m<think>\nb\n</think>\033[0m\nc\n\033[2m<tool_call>\ncut off\033[0m"


# ------------------------------------------------------------------------------------------------ a real model


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A folder with a model that has learnt one exchange by heart: question, call, result, answer."""
    out = tmp_path_factory.mktemp("caller")
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = MiniMindLM(MiniMindConfig(**shape, intermediate_size=96, initializer_range=0.1))
    messages = [
        {"role": "system", "content": "", "tools": json.dumps(SCHEMAS)},
        {"role": "user", "content": "Calculate 12 + 34."},
        {"role": "assistant", "tool_calls": [{"name": "calculator", "arguments": {"expression": "12 + 34"}}]},
        {"role": "tool", "content": '{"result": 46}'},
        {"role": "assistant", "content": "It is 46."},
    ]
    ids, mask = render_chat(load_tokenizer(), messages)
    ids, mask = torch.tensor([ids]), torch.tensor([mask])  # (1, T)
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(40):
        loss = next_token_loss(model, ids[:, :-1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    checkpoint.save(out / "full_sft_64.pth", model, {"finished": {"max_seq_len": 1024}})
    return out


GREEDY = ["--temperature", "0", "--dtype", "fp32", "--tools", "1"]


def test_a_trained_model_calls_and_answers(caller):
    """As a program: through the template, the engine, the parser, the tool and back."""
    command = [sys.executable, str(ROOT / "eval_model.py"), "--out_dir", str(caller), *GREEDY]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--ask", "Calculate 12 + 34."], capture_output=True, text=True, env=env, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f'{call("12 + 34")}\ntool> {{"result": 46}}\nIt is 46.\n'


def test_a_trained_model_in_conversation_and_on_the_scoreboard(caller, tmp_path, monkeypatch, capsys):
    def run(*args, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["eval_model.py", "--out_dir", *map(str, [caller, *args])])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        cli.run(eval_model.main)
        return capsys.readouterr().out

    shown = run(*GREEDY, stdin=b"1\nCalculate 12 + 34.\n/exit\n")
    assert shown.index(call("12 + 34")) < shown.index('tool> {"result": 46}\nminimind> It is 46.\n[')
    assert "you> What date is 10 days after 2026-11-24?" in run(*GREEDY, "--max_new_tokens", 8, stdin=b"0\n")

    system, user = {"role": "system", "content": "", "tools": json.dumps(SCHEMAS)}, "Calculate 12 + 34."
    row = {"skill": "call", "conversations": [system, {"role": "user", "content": user}]}
    sums = [{"name": "calculator", "arguments": {"expression": text}} for text in ("12 + 34", "12 + 35")]
    used = [*row["conversations"], {"role": "assistant", "content": None, "tool_calls": sums[:1]}]
    used.append({"role": "tool", "content": '{"result": 46}'})
    rows = [{**row, "call": sums[0]}, {**row, "call": sums[1]}]
    rows.append({"skill": "use", "conversations": used, "answers": ["It is 46"]})
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shown = run("--dtype", "fp32", "--score", tmp_path / "heldout.jsonl", "--show_wrong", 1)
    skills = json.loads(shown.splitlines()[-1])["score"]["skills"]
    assert {skill: counts["correct"] for skill, counts in skills.items()} == {"call": 1, "use": 1}
    assert f"  expected: {json.dumps(sums[1])}\n  answered: {call('12 + 34')}" in shown
