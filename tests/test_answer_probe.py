"""--eval_tasks: what is measured while a model trains, and that it changes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset.chat import load_tokenizer
from dataset.choices import read_choices
from evaluation.asking import Examinee
from evaluation.multiple_choice import run_choice
from evaluation.tasks import OURS, Task
from model import checkpoint
from model.inference.chatbot import AnswerSettings, Chatbot
from model.model import MiniMindConfig, MiniMindLM
from trainer.answers import AnswerProbe

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)


@pytest.mark.parametrize("chat", [True, False])
def test_figures_are_those_of_the_evaluation(chat):
    torch.manual_seed(0)
    model = MiniMindLM(MiniMindConfig(**SHAPE, initializer_range=0.2)).eval()
    tokenizer, file = load_tokenizer(), OURS["school"]
    bot = Chatbot(Path("x"), model, tokenizer, 512, AnswerSettings())
    task = Task("school", "choice", read_choices(file))
    expected = run_choice(Examinee(bot, chat), task, forms=("cloze",))
    figures = AnswerProbe(file, tokenizer, chat).measure(model)
    assert figures["val_answer_bpb"] == pytest.approx(expected.bits_per_byte[0], abs=1e-4)
    assert figures["val_answer_accuracy"] == pytest.approx(expected.rows[0].accuracy)


def test_a_training_is_asked_and_learns_the_same(tmp_path):
    texts = [{"text": f"{q.question} {q.choices[q.answer]}"} for q in read_choices(OURS["school"])]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts), encoding="utf-8")
    command = [sys.executable, "train_pretrain.py", "--data_path", tmp_path / "t.jsonl", "--steps", "4", "--batch_size"]
    command += ["2", "--max_seq_len", "64", "--hidden_size", "64", "--compile", "0", "--val_interval", "2"]
    asked = ["--eval_tasks", OURS["everyday"]]
    for name, more in (("a", asked), ("b", [])):
        options = ["--out_dir", tmp_path / name, "--cache_dir", tmp_path / "cache"]
        done = subprocess.run(
            list(map(str, command + options + more)), cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        if more:
            assert f"{read_choices(OURS['everyday'])[0].question} -> " in done.stderr
    weights = [checkpoint.load(tmp_path / name / "pretrain_64.pth")[0].state_dict() for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    log = [json.loads(line) for line in (tmp_path / "a/pretrain_64.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [row["val_answer_bpb"] for row in log if "val_answer_bpb" in row]
    assert len(values) == 3 and len(set(values)) == 3
