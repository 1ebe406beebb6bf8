"""Unlikelihood training: its loss by hand, and that a stage of one file gets resume, processes, log and curve."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.kill_test import kill_stages
from tests.processes import Script, largest_difference, log, one_error, small_data, small_weights
from train_unlikelihood import repeats, unlikelihood_loss

A, B, C, D, E = range(5)  # tokens


def repeats_by_hand(row: list[int], said: list[int], n: int) -> list[bool]:
    found = []
    for t in range(len(row)):
        text = [*row[: t + 1], said[t]]
        grams = [text[i : i + n] for i in range(len(text) - n + 1)]
        found.append(bool(grams) and grams[-1] in grams[:-1])
    return found


@pytest.mark.parametrize("n", [2, 3, 4, 12])
def test_repeats_are_those_of_a_loop_over_ngrams(n):
    generator = random.Random(n)
    rows, said = ([[generator.randrange(3) for _ in range(11)] for _ in range(20)] for _ in range(2))
    expected = [repeats_by_hand(*both, n) for both in zip(rows, said, strict=True)]
    assert repeats(torch.tensor(rows), torch.tensor(said), n).tolist() == expected
    assert any(map(any, expected)) == (n < 12) and not all(map(all, expected))


def loss_of(text: list[int], said: list[int], alpha: float, n: int = 3):
    """(loss, its gradient by the logits (T, vocab), metrics) of a model that holds `said` likeliest."""
    logits = torch.zeros(1, len(said), 5)
    logits[0, torch.arange(len(said)), said] = 2.0
    logits.requires_grad_()
    batch = {"input_ids": torch.tensor([text[:-1]]), "labels": torch.tensor([text[1:]])}

    def model(input_ids):
        return SimpleNamespace(logits=logits, aux_loss=0.0, metrics={})

    loss, metrics = unlikelihood_loss(model, batch, n, alpha)
    loss.backward()
    plain = F.cross_entropy(logits.detach()[0], batch["labels"][0])
    return loss.item() - plain.item(), logits.grad[0], metrics


def test_a_token_that_would_repeat_becomes_less_likely():
    """`a b c` was there, and after the second `a b` the model would say c once more; the text goes on with d."""
    text, said = [A, B, C, A, B, D], [B, C, A, B, C]
    more, gradient, metrics = loss_of(text, said, alpha=0.5)
    _, plain, _ = loss_of(text, said, alpha=0.0)
    p = torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0]).softmax(-1)[C]
    assert more == pytest.approx(-0.5 * (1 - p).log().item() / 5, abs=1e-6)
    assert metrics["repeats"] == pytest.approx(1 / 5)
    change = gradient - plain
    assert change[4, C] > 0 > change[4, D] and not change[:4].any()


@pytest.mark.parametrize(
    "text, said",
    [
        ([A, B, C, D, E, A], [B, C, D, E, A]),  # nothing repeats
        ([A, B, C, A, B, C], [B, C, A, B, C]),  # the text itself repeats: that is to be learnt
        ([A, B, C, A, B, D], [B, C, A, B, E]),  # the model would not repeat it
    ],
)
def test_otherwise_it_is_plain_cross_entropy(text, said):
    more, gradient, metrics = loss_of(text, said, alpha=10.0)
    assert more == pytest.approx(0, abs=1e-6) and metrics["repeats"] == 0
    assert torch.equal(gradient, loss_of(text, said, alpha=0.0)[1])


# ------------------------------------------------------------------------------------------------ what comes with a run


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Copies (DDP) and shares (FSDP2); log and curve are there."""
    with small_data(tmp_path) as data:
        base = small_weights(tmp_path)["dense"]
        flags = ["train_unlikelihood.py", "--data_path", data["text"], "--val_path", data["textval"], "--steps", 4]
        flags += ["--from_weight", base, "--max_seq_len", 32, "--ngram", 2, "--accumulation_steps", 2, "--compile", 0]
        flags += ["--dtype", "fp32", "--device", "cpu", "--log_interval", 1, "--out_dir"]
        Script(tmp_path, [*flags, tmp_path / "one", "--batch_size", 4]).succeed()
        jobs = [
            [*flags, tmp_path / name, "--batch_size", 2, *more] for name, more in (("ddp", []), ("fsdp", ["--fsdp"]))
        ]
        Script(tmp_path, *jobs, count=2).succeed()
    one = tmp_path / "one" / "unlikelihood_64.pth"
    assert [row["step"] for row in log(one) if "loss" in row] == [1, 2, 3, 4]
    assert all(row["repeats"] > 0 for row in log(one) if "loss" in row) and log(one)[-1]["val_repeats"] > 0
    for name in ("ddp", "fsdp"):
        two = tmp_path / name / one.name
        assert two.with_suffix(".png").exists()
        assert largest_difference(one, two) < 1e-5
        losses = [[row["loss"] for row in log(path) if "loss" in row] for path in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_killed_and_resumed():
    moments = kill_stages(["unlikelihood"], kills=1, seed=0, steps=8)
    assert moments["unlikelihood"].total() >= 1


@pytest.mark.parametrize("flags", [["--ngram", 1], ["--alpha", -1]])
def test_numbers_that_make_no_sense(tmp_path, flags):
    one_error(Script(tmp_path, ["train_unlikelihood.py", *flags]).wait(), 2, flags[0])
