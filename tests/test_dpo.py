"""train_dpo.py: its losses and rewards against trl's, and the traps of preference data. pytest tests/test_dpo.py"""

import argparse
import copy
import json

import pytest
import torch

import train_dpo
from cli import UsageError
from dataset.chat import BOS_ID, EOS_ID, load_tokenizer, render_chat
from dataset.lm_dataset import batches, preference_dataset, summary, validation_batches
from model.export.huggingface import save_hf

WORDS = "sun moon tea cat 苹果 red 大 river seven 好".split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def pair(n: int, turns: int = 0) -> dict:
    """Answers of different lengths; `turns` earlier exchanges in the prompt."""
    prompt = [{"role": "system", "content": "Be kind."}] if n % 2 else []
    for t in range(turns):
        prompt += [{"role": "user", "content": f"{n} {t}?"}, {"role": "assistant", "content": WORDS[(n + t) % 10]}]
    prompt.append({"role": "user", "content": f"Say {WORDS[n % 10]} {n}."})
    chosen, rejected = " ".join(WORDS[: 1 + n % 5]), " ".join(WORDS[n % 7 :])
    return {
        "chosen": [*prompt, {"role": "assistant", "content": chosen}],
        "rejected": [*prompt, {"role": "assistant", "content": rejected}],
    }


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(**changes) -> argparse.Namespace:
    values = dict(beta=0.3, loss="dpo", label_smoothing=0.0, length_normalize=False, simpo_gamma=0.5)
    return argparse.Namespace(**(values | changes))


@pytest.fixture
def rows(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl", [pair(n, turns=n % 3) for n in range(7)])
    return preference_dataset(path, tokenizer, 256, cache_dir=tmp_path, quiet=True)


@pytest.fixture
def models(tiny):
    """Policy and reference: related, not equal."""
    policy = tiny(vocab_size=6400, qk_norm=True, initializer_range=0.05)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return policy, reference


# ------------------------------------------------------------------------------------------------ trl


@pytest.fixture
def trl_loss(models, tmp_path, tokenizer):
    """trl's loss and rewards of the same pairs by the same weights: trl_loss(loss_type, **config)."""
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folders = []
    for name, model in zip(("policy", "reference"), models, strict=True):
        save_hf(tmp_path / name, model, tokenizer, dtype=torch.float32)
        folders.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32))
    examples = []
    for row in (pair(n, turns=n % 3) for n in range(7)):
        prompt = render_chat(tokenizer, row["chosen"][:-1], add_generation_prompt=True)[0]
        answers = {}
        for side in ("chosen", "rejected"):
            ids = render_chat(tokenizer, row[side])[0]
            assert ids[: len(prompt)] == prompt
            answers[f"{side}_ids"] = ids[len(prompt) : len(ids) - ids[::-1].index(EOS_ID)]  # up to its end token
        examples.append({"prompt_ids": prompt, **answers})

    def compute(loss_type: str, **config) -> tuple[float, dict]:
        options = DPOConfig(
            str(tmp_path / "trl"), loss_type=[loss_type], report_to=[], use_cpu=True, bf16=False, beta=0.3, **config
        )
        data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        processing = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
        trainer = DPOTrainer(folders[0], folders[1], options, train_dataset=data, processing_class=processing)
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(examples))
        return loss.item(), {name: values[-1] for name, values in trainer._metrics["eval"].items()}

    return compute


VARIANTS = {
    "dpo": ({}, "sigmoid"),
    "ipo": (dict(loss="ipo"), "ipo"),
    "normalised": (dict(length_normalize=True), "sigmoid_norm"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_rewards_equal_trl(name, models, rows, trl_loss):
    changes, loss_type = VARIANTS[name]
    policy, reference = models
    (batch,) = validation_batches(rows, len(rows))
    loss, metrics = train_dpo.dpo_loss(policy, batch, reference, arguments(**changes))
    expected, theirs = trl_loss(loss_type)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    ours = {
        "rewards/chosen": "chosen_reward",
        "rewards/rejected": "rejected_reward",
        "rewards/margins": "reward_margin",
    }
    ours |= {"rewards/accuracies": "reward_accuracy"}
    ours |= {"logps/chosen": "chosen_log_prob", "logps/rejected": "rejected_log_prob"}
    for their_name, our_name in ours.items():
        assert float(metrics[our_name]) == pytest.approx(theirs[their_name], rel=1e-3, abs=1e-4), our_name


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_cdpo_and_simpo_equal_trl(loss):
    """trl has them in CPOTrainer, whose loss is a function of log-probabilities: cDPO's are log-ratios, SimPO's are per
    token."""
    from trl.experimental.cpo import CPOTrainer

    random = torch.Generator().manual_seed(0)
    policy, reference = -10 * torch.rand(2, 6, 2, generator=random)
    lengths = torch.randint(1, 9, (6, 2), generator=random).float()
    args = arguments(loss=loss, label_smoothing=0.1)
    of_trl = policy / lengths if loss == "simpo" else policy - reference
    settings = argparse.Namespace(
        alpha=0.0, beta=args.beta, label_smoothing=args.label_smoothing, simpo_gamma=args.simpo_gamma,
        loss_type="simpo" if loss == "simpo" else "sigmoid", accelerator=argparse.Namespace(device="cpu"),
    )  # fmt: skip
    expected, *expected_rewards = CPOTrainer.cpo_loss(settings, *of_trl.unbind(1))
    losses, rewards = train_dpo.preference_loss(policy, reference, lengths, args)
    assert torch.allclose(losses, expected, rtol=1e-5)
    assert torch.allclose(rewards, torch.stack(expected_rewards, 1), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ by hand


def log_prob(model, tokenizer, row: dict, side: str) -> float:
    """Of one answer with its end token, alone in the batch."""
    prompt = render_chat(tokenizer, row[side][:-1], add_generation_prompt=True)[0]
    ids, _ = render_chat(tokenizer, row[side])
    end = len(ids) - ids[::-1].index(EOS_ID)
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), end))


def test_log_probs_are_of_the_last_answer_alone_however_it_is_packed(models, rows, tokenizer, tmp_path):
    """Not of padding, of the prompt, of earlier answers, of the newline after the end token, or of the neighbour."""
    policy, _ = models
    expected = {}
    for n in range(7):
        row = pair(n, turns=n % 3)
        expected[n] = [log_prob(policy, tokenizer, row, side) for side in ("chosen", "rejected")]
    found = []
    for batch in validation_batches(rows, 2):
        sums, _, _ = train_dpo.answer_log_probs(policy, batch)
        assert len(sums) == batch["weight"] and batch["answer_lengths"].sum() == batch["tokens"]
        found += sums.tolist()
    assert sorted(map(tuple, found)) == [
        pytest.approx(values, abs=2e-4) for values in sorted(map(tuple, expected.values()))
    ]


def test_the_sum_is_made_in_fp32_under_bf16(models, rows):
    """A bf16 sum of a long answer is off by whole nats."""
    policy, _ = models
    (batch,) = validation_batches(rows, len(rows))
    exact = train_dpo.answer_log_probs(policy, batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        sums, log_probs, _ = train_dpo.answer_log_probs(policy, batch)
    assert sums.dtype == log_probs.dtype == torch.float32
    assert (sums - exact).abs().max() < 0.02 * exact.abs().max()
    assert not torch.equal(sums, sums.bfloat16().float())


def test_at_the_start_nothing_is_preferred_and_the_reference_never_learns(models, rows):
    policy, _ = models
    reference = copy.deepcopy(policy)
    before = {name: w.clone() for name, w in reference.state_dict().items()}
    (batch,) = validation_batches(rows, len(rows))
    _, metrics = train_dpo.dpo_loss(policy.eval(), batch, reference, arguments())
    assert metrics["kl"].abs() < 1e-4
    loss, _ = train_dpo.dpo_loss(policy.train(), batch, reference, arguments())
    assert loss.item() == pytest.approx(0.6931, abs=1e-3)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters())
    assert policy.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert all(torch.equal(w, before[name]) for name, w in reference.state_dict().items())


def test_simpo_runs_no_reference_and_a_training_step_no_kl(models, rows):
    policy, reference = models
    (batch,) = validation_batches(rows, len(rows))
    loss, metrics = train_dpo.dpo_loss(policy.train(), batch, None, arguments(loss="simpo"))
    assert loss.isfinite() and "kl" not in metrics
    assert "kl" not in train_dpo.dpo_loss(policy.train(), batch, reference, arguments())[1]
    assert train_dpo.dpo_loss(policy.eval(), batch, reference, arguments())[1]["kl"] > 0


def test_label_smoothing_is_a_mixture_and_simpo_needs_no_reference():
    policy, lengths = torch.tensor([[-4.0, -9.0], [-7.0, -2.0]]), torch.tensor([[2.0, 3.0], [7.0, 4.0]])
    reference = torch.tensor([[-5.0, -8.0], [-6.0, -3.0]])
    plain, rewards = train_dpo.preference_loss(policy, reference, lengths, arguments())
    swapped, _ = train_dpo.preference_loss(policy.flip(1), reference.flip(1), lengths.flip(1), arguments())
    smoothed, _ = train_dpo.preference_loss(policy, reference, lengths, arguments(label_smoothing=0.2))
    assert torch.allclose(smoothed, 0.8 * plain + 0.2 * swapped)
    assert torch.allclose(rewards, 0.3 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    losses, rewards = train_dpo.preference_loss(policy, None, lengths, arguments(loss="simpo"))
    assert torch.allclose(rewards, 0.3 * torch.tensor([[-2.0, -3.0], [-1.0, -0.5]]))
    margins = torch.tensor([0.3, -0.15]) - 0.5
    assert torch.allclose(losses, torch.log1p((-margins).exp()))


@pytest.mark.parametrize(
    "flags",
    [
        "--loss ipo --label_smoothing 0.1",
        "--loss ipo --length_normalize",
        "--loss simpo --length_normalize",
        "--simpo_gamma 1",
    ],
)
def test_a_flag_that_a_loss_ignores_is_refused(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_dpo.py", *flags.split()])
    with pytest.raises(UsageError, match=flags.split("--")[-1].split()[0]):
        train_dpo.parse_arguments()


# ------------------------------------------------------------------------------------------------ data


def test_every_fault_of_a_pair_is_counted_with_its_line(tmp_path, tokenizer, capsys):
    good, other = pair(0), pair(1)
    long = pair(2)
    long["chosen"][-1] = {"role": "assistant", "content": "tea " * 300}
    faulty = [
        good,
        {"chosen": good["chosen"], "rejected": other["rejected"]},
        {"chosen": good["chosen"]},
        {"chosen": good["chosen"], "rejected": good["chosen"]},
        {"chosen": good["chosen"][:-1], "rejected": good["chosen"][:-1]},
        long,
    ]
    rows = preference_dataset(write(tmp_path / "f.jsonl", faulty), tokenizer, 256, cache_dir=tmp_path)
    figures = summary(rows)
    assert (figures["lines"], figures["used"]) == (6, 1)
    assert sorted(line for reason in figures["skipped"].values() for line in reason["lines"]) == [2, 3, 4, 5, 6]
    said = capsys.readouterr().err
    assert "line 2: different prompts" in said and "line 6: pair longer than a row" in said


def test_a_batch_weighs_pairs_and_loses_none(rows):
    found = list(validation_batches(rows, 1))
    assert sum(batch["weight"] for batch in found) == 7
    for batch in found:
        first = batch["segment_ids"][0].max().item()
        assert first == 2 * batch["weight"]
        starts = (batch["input_ids"] == BOS_ID).sum().item()
        assert starts > first  # each segment has its own prompt
    stream = batches(rows, 2, seed=0)
    assert next(stream)["weight"] >= 2
