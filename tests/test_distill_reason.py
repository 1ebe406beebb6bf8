"""train_distill.py and train_reason.py: losses against other people's, and what each must not learn from.

pytest tests/test_distill_reason.py
"""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_distill
import train_full_sft
import train_reason
from dataset.chat import END_THINK_ID, EOS_ID, THINK_ID, load_tokenizer, render_chat
from dataset.lm_dataset import sft_dataset, validation_batches
from dataset.tokenizer import TokenizerError
from model import checkpoint
from model.export.huggingface import save_hf
from model.model import MiniMindConfig, MiniMindLM

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def conversation(question: str, answer: str, reasoning: str = "") -> dict:
    thinking = {"reasoning_content": reasoning} if reasoning else {}
    user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"conversations": [user, assistant | thinking]}


ROWS = [
    conversation("3 + 4 - 2 = ?", "5", "3 + 4 = 7\n7 - 2 = 5"),
    conversation("6 + 1 - 2 = ?", "5"),
    conversation("今天是星期一，2 天后是星期几？", "星期三", "1 星期二, 2 星期三"),
    conversation("Hello", "Hello! Nice to meet you."),
]


def batch_of(tmp_path, tokenizer, make=sft_dataset, rows=ROWS, seq_len=128) -> dict:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    dataset = make(path, tokenizer, seq_len, cache_dir=tmp_path, quiet=True)
    (batch,) = validation_batches(dataset, len(dataset))
    return batch


@pytest.fixture
def pair(tiny):
    """Student and a wider teacher."""
    return tiny(vocab_size=6400, initializer_range=0.05), tiny(1, vocab_size=6400, hidden_size=96, qk_norm=True)


# ------------------------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize("kl, beta", [("forward", 0.0), ("reverse", 1.0)])
def test_the_divergence_equals_trl(kl, beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(1, 7, 50, generator=generator) for _ in range(2))
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=2.0, reduction="sum") / 7
    ours = train_distill.distillation_loss(student[0], teacher[0], 2.0, kl)
    assert ours.item() == pytest.approx(4 * theirs.item(), rel=1e-5)  # T^2 keeps the gradient's size (Hinton et al.)


def test_the_gradient_keeps_its_size_when_the_temperature_rises():
    """For large T the soft gradient is that of a squared difference of logits, divided by the vocabulary (Hinton et
    al. 2015, section 2.1)."""
    student = torch.zeros(4, 20, requires_grad=True)
    teacher = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    teacher = teacher - teacher.mean(-1, keepdim=True)
    train_distill.distillation_loss(student, teacher, 1000.0, "forward").backward()
    assert torch.allclose(student.grad, -teacher / 20 / 4, rtol=1e-2, atol=1e-5)


def test_only_the_answers_are_distilled_and_the_teacher_never_learns(pair, tmp_path, tokenizer):
    """alpha 1 is SFT; with alpha 0 the labels' values do not matter; the mean is over the labels alone."""
    student, teacher = pair
    batch = batch_of(tmp_path, tokenizer)
    args = argparse.Namespace(alpha=1.0, temperature=2.0, kl="forward")
    loss, metrics = train_distill.distill_loss(student, batch, teacher, args)
    assert loss.item() == pytest.approx(train_full_sft.sft_loss(student, batch)[0].item(), rel=1e-5)

    args.alpha = 0.0
    loss, _ = train_distill.distill_loss(student, batch, teacher.requires_grad_(False), args)
    answer = batch["labels"] != -100
    log_s, log_t = (
        (model(batch["input_ids"], segment_ids=batch["segment_ids"]).logits[answer] / 2).log_softmax(-1)
        for model in (student, teacher)
    )
    expected = 4 * F.kl_div(log_s, log_t, log_target=True, reduction="sum") / answer.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    relabelled = batch | {"labels": torch.where(answer, 7, -100)}
    assert train_distill.distill_loss(student, relabelled, teacher, args)[0].item() == pytest.approx(loss.item())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.model.norm.weight.grad.abs().sum() > 0


def test_a_moe_teaches_and_a_student_that_equals_its_teacher_has_nothing_to_learn(tiny, tmp_path, tokenizer):
    teacher = tiny(vocab_size=6400, num_experts=4, num_experts_per_tok=1, qk_norm=True)
    args = argparse.Namespace(alpha=0.0, temperature=1.0, kl="reverse")
    _, metrics = train_distill.distill_loss(copy.deepcopy(teacher), batch_of(tmp_path, tokenizer), teacher, args)
    assert metrics["divergence"].abs() < 1e-5


def test_a_teacher_with_another_vocabulary_is_refused(tiny, tmp_path):
    checkpoint.save(tmp_path / "teacher.pth", tiny(vocab_size=320))
    run = argparse.Namespace(device="cpu", config=tiny(vocab_size=6400).config, tokenizer=load_tokenizer())
    run.args = argparse.Namespace(tokenizer=None)
    with pytest.raises(checkpoint.CheckpointError, match="another vocabulary.*320.*6400"):
        train_distill.load_teacher(tmp_path, str(tmp_path / "teacher.pth"), run)
    save_hf(tmp_path / "folder", tiny(vocab_size=6400), load_tokenizer())
    train_distill.load_teacher(tmp_path, str(tmp_path / "folder"), run)
    path = tmp_path / "folder" / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = spec["model"]["vocab"]
    first, second = [name for name, i in vocabulary.items() if i in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(TokenizerError, match="--teacher"):
        train_distill.load_teacher(tmp_path, str(tmp_path / "folder"), run)


# ------------------------------------------------------------------------------------------------ reasoning


def test_the_four_markers_weigh_more_and_nothing_else_changes(tiny, tmp_path, tokenizer):
    model = tiny(vocab_size=6400, initializer_range=0.05)
    batch = batch_of(tmp_path, tokenizer)
    markers = [tokenizer.marker_ids[marker] for marker in train_reason.WEIGHTED]
    plain, metrics = train_reason.reason_loss(model, batch, markers, 1.0)
    assert plain.item() == pytest.approx(train_full_sft.sft_loss(model, batch)[0].item(), rel=1e-5)
    weighted, same = train_reason.reason_loss(model, batch, markers, 10.0)
    assert same["cross_entropy"].item() == pytest.approx(plain.item(), rel=1e-5)  # what bits per byte measure

    labels = batch["labels"]
    answer = labels != -100
    logits = model(batch["input_ids"], segment_ids=batch["segment_ids"]).logits[answer]
    losses = F.cross_entropy(logits, labels[answer], reduction="none")
    markers = (labels[answer] == THINK_ID) | (labels[answer] == END_THINK_ID)
    assert markers.sum() == 4  # two rows think; the empty blocks of the other two are no labels
    expected = (losses.sum() + 9 * losses[markers].sum()) / answer.sum()
    assert weighted.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_written_is_the_mean_of_before_and_after(tmp_path):
    """From the shell: the same training with and without, and the weights that both began with."""
    rows = tmp_path / "reason.jsonl"
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    start = MiniMindLM(
        MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    )
    checkpoint.save(tmp_path / "full_sft_64.pth", start, {}, tokenizer=load_tokenizer())
    weights = {}
    for share in ("0", "0.25"):
        flags = ["--data_path", str(rows), "--steps", "3", "--save_weight", f"share{share[-1]}", "--start_share", share]
        script = [sys.executable, str(ROOT / "train_reason.py"), "--out_dir", str(tmp_path), "--dtype", "fp32"]
        subprocess.run([*script, *flags, "--max_seq_len", "256"], check=True, capture_output=True, timeout=200)
        weights[share] = checkpoint.load(tmp_path / f"share{share[-1]}_64.pth")[0].state_dict()
    moved = 0.0
    for name, before in start.state_dict().items():
        after = weights["0"][name]
        moved = max(moved, (after - before).abs().max().item())
        torch.testing.assert_close(weights["0.25"][name], 0.25 * before + 0.75 * after, rtol=1e-4, atol=1e-6)
    assert moved > 1e-4


def test_an_earlier_answer_gets_no_empty_block(tokenizer):
    messages = ROWS[3]["conversations"] + ROWS[1]["conversations"]
    ids, mask = render_chat(tokenizer, messages, thinking_off=True)
    assert ids.count(THINK_ID) == 1 and ids.count(EOS_ID) == 4
    at = ids.index(THINK_ID)
    assert at > ids.index(EOS_ID) and mask[at] == mask[ids.index(END_THINK_ID)] == 0
    assert THINK_ID not in render_chat(tokenizer, messages)[0]
