"""Reinforcement learning: the objectives against trl's, GAE against its double sum, rollouts, resume, processes.
pytest tests/test_rl.py"""

import copy
import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

import train_grpo
import train_ppo
from dataset.chat import EOS_ID, load_tokenizer
from dataset.jsonl import DataError
from dataset.questions import Question, read_questions
from model.export.huggingface import save_hf
from model.inference.engine import generate
from model.inference.sampling import SamplingParams
from tests.processes import ROOT, Script, assert_same, one_error, small_weights
from trainer.parallel import Processes
from trainer.policy import advantages_of, entropy, gae, group_advantages, policy_batches, token_log_probs
from trainer.rewards import right_answer
from trainer.rollout import Generator, OneTurn, Rollout, leaders_first, pass_at_k, snapshot
from trainer.speed import install

QUESTIONS = ["What is 3 + 4 - 2?", "今天是星期一，3 天后是星期几？", "What is 5 + 1 - 4?"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def question(n: int) -> Question:
    return Question(n, "sum", [{"role": "user", "content": QUESTIONS[n % 3]}], "answers", ["5"], False)


def fake_run(**changes) -> SimpleNamespace:
    args = dict(max_seq_len=64, rows=2)
    return SimpleNamespace(args=Namespace(**args | changes), processes=Processes())


def rollout(n: int, prompt: int, sampled: int, reward: float = 0.0, tools: int = 0) -> Rollout:
    """Of random tokens; the last sampled one ends the turn; with `tools` tokens of a tool in the middle."""
    draw = torch.Generator().manual_seed(n)
    ids = torch.randint(40, 6400, (prompt + sampled + tools,), generator=draw).tolist()
    ids[-1] = EOS_ID
    trained = [False] * prompt + [True] * (sampled // 2) + [False] * tools + [True] * (sampled - sampled // 2)
    return Rollout(question(n), [], ids, trained, log_probs=[0.0] * sampled, reward=reward)


GROUPS = [
    [rollout(0, 7, 9, 1.0), rollout(1, 7, 4, 0.0, tools=3), rollout(2, 7, 12, 0.0)],
    [rollout(3, 5, 6, 0.0), rollout(4, 5, 11, 1.0)],
]
FLAT = [r for group in GROUPS for r in group]


def settings(**changes) -> Namespace:
    values = dict(objective="grpo", aggregate="token", ratio="token", clip_low=0.2, clip_high=0.2, weight_cap=5.0)
    return Namespace(**values | dict(beta=0.0, max_new_tokens=16, divide_by_deviation=1) | changes)


def batches_for(args: Namespace, **changes) -> list[dict]:
    weigh = "tokens" if args.aggregate == "token" else "sequences"
    advantages = {"advantages": advantages_of(GROUPS, args.divide_by_deviation)}
    return policy_batches(FLAT, advantages, weigh, fake_run(**changes))


@pytest.fixture(scope="module")
def policies():
    """Policy and the one that sampled: related, not equal."""
    from model.model import MiniMindConfig, MiniMindLM

    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, qk_norm=True)
    policy = MiniMindLM(MiniMindConfig(**shape, intermediate_size=96, vocab_size=6400, initializer_range=0.1))
    old = copy.deepcopy(policy).eval()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return policy.eval(), old


def gradients(policy, old, args, **changes) -> tuple[float, dict]:
    """Loss and gradients of one update over all batches, each weighted as Run.backward() does."""
    policy.zero_grad()
    batches = batches_for(args, **changes)
    weight, total = sum(batch["weight"] for batch in batches), 0.0
    for batch in batches:
        old_log_probs = None
        if old is not None:
            with torch.no_grad():
                old_log_probs = token_log_probs(old, batch)[0]
        loss, _, _ = train_grpo.grpo_loss(policy, batch, old_log_probs, None, args)
        loss = loss * (batch["weight"] / weight)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in policy.named_parameters()}


def assert_close(found: dict, expected: dict, **tolerance) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **tolerance)


# ------------------------------------------------------------------------------------------------ trl

VARIANTS = {
    "grpo": (dict(aggregate="sequence"), {}),
    "dr_grpo": (dict(aggregate="constant", divide_by_deviation=0), {}),
    "dapo": (dict(clip_high=0.28), dict(epsilon_high=0.28)),
    "cispo": (dict(objective="cispo", weight_cap=1.01), dict(epsilon_high=1.01)),
    "gspo": (
        dict(ratio="sequence", aggregate="sequence", clip_low=3e-3, clip_high=4e-3),
        dict(importance_sampling_level="sequence", loss_type="grpo", epsilon=3e-3, epsilon_high=4e-3),
    ),
}


@pytest.fixture(scope="module")
def grpo_trainer(policies, tmp_path_factory, tokenizer):
    """trl's trainer of the same weights: grpo_trainer(name, options), and the batch as it wants it."""
    trl = pytest.importorskip("trl")
    if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 13):
        pytest.skip(f"trl {trl.__version__}: its private methods were others before 1.13")
    import transformers
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("trl")
    save_hf(folder / "policy", policies[0], tokenizer, dtype=torch.float32)

    def build(name: str, **options):
        values = dict(loss_type=name, beta=0.0, epsilon=0.2, max_completion_length=16, num_generations=2)
        config = trl.GRPOConfig(
            str(folder), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2, **values | options
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
        trainer = trl.GRPOTrainer(
            model, reward_funcs=lambda completions, **rest: [0.0] * len(completions), args=config,
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder / "policy"),
        )  # fmt: skip
        trainer.model.eval()
        return trainer

    return build


def as_trl(old, divide: bool) -> dict:
    """The rollouts as trl has them: prompts padded on the left, completions on the right, tools masked."""
    rows, advantages = [], torch.tensor([values[0] for values in advantages_of(GROUPS, divide)])
    for r in FLAT:
        prompt = r.trained.index(True)
        rows.append((r.ids[:prompt], r.ids[prompt:], r.trained[prompt:]))
    P, C = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    pad = lambda values, n: values + [0] * (n - len(values))  # noqa: E731
    inputs = {
        "prompt_ids": torch.tensor([[0] * (P - len(p)) + p for p, _, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p, _, _ in rows]),
        "completion_ids": torch.tensor([pad(c, C) for _, c, _ in rows]),
        "completion_mask": torch.tensor([pad([1] * len(c), C) for _, c, _ in rows]),
        "tool_mask": torch.tensor([pad([int(t) for t in trained], C) for _, _, trained in rows]),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(float(sum(r.sampled for r in FLAT))),
    }
    logps = torch.zeros(len(rows), C)
    with torch.no_grad():
        for i, (p, c, _) in enumerate(rows):
            log_probs = old(torch.tensor([p + c])).logits[0].log_softmax(-1)
            logps[i, : len(c)] = log_probs[len(p) - 1 : -1].gather(-1, torch.tensor(c)[:, None])[:, 0]
    return inputs | {"old_per_token_logps": logps}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_trains_answers_also_without_the_compiled_step(tiny, monkeypatch, dtype):
    """Its kernels for training cannot read a cache, so the copy that generates has others."""
    model = tiny(num_experts=4).train()
    install(model, dtype, torch.device("cpu"))
    monkeypatch.setattr("trainer.rollout.step_works", lambda *_: False)
    monkeypatch.setattr("trainer.rollout.decoding_step", lambda *_: False)
    copied, step = snapshot(model, dtype)
    params = SamplingParams(temperature=0, max_new_tokens=5, stop_token_ids=())
    assert len(generate(copied, [list(range(5, 40))], params, compiled=step)[0].token_ids) == 5


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_are_those_of_trl(name, policies, grpo_trainer):
    policy, old = policies
    ours, theirs = VARIANTS[name]
    args = settings(**ours)
    loss, found = gradients(policy, old, args)
    trainer = grpo_trainer(theirs.pop("loss_type", name) if name == "gspo" else name, **dict(theirs))
    trainer.model.zero_grad()
    reference = trainer._compute_loss(trainer.model, as_trl(old, args.divide_by_deviation))
    reference.backward()
    assert loss == pytest.approx(reference.item(), abs=2e-6)
    expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert expected.keys() >= {"model.embed_tokens.weight"}
    assert_close({n: found[n] for n in expected}, expected, atol=2e-6, rtol=2e-4)


def test_log_probs_entropy_and_advantages_are_those_of_trl(policies):
    utils = pytest.importorskip("trl.trainer.utils")
    policy, _ = policies
    [batch] = batches_for(settings(), rows=4)
    log_probs, distribution, out = token_log_probs(policy, batch)
    labels = batch["labels"][batch["labels"] >= 0]
    torch.testing.assert_close(log_probs, utils.selective_log_softmax(out.logits, labels))
    torch.testing.assert_close(entropy(distribution), utils.entropy_from_logits(out.logits).mean())
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5])
    expected = (rewards - rewards.mean()) / (utils.nanstd(rewards) + 1e-4)
    torch.testing.assert_close(torch.tensor(group_advantages(rewards.tolist(), True)).float(), expected)


# ------------------------------------------------------------------------------------------------ what must hold


def test_at_ratio_one_all_objectives_are_reinforce(policies):
    policy, _ = policies
    _, grpo = gradients(policy, None, settings())
    _, cispo = gradients(policy, None, settings(objective="cispo"))
    assert_close(grpo, cispo, atol=1e-7, rtol=1e-5)
    policy.zero_grad()
    loss, count = 0.0, sum(r.sampled for r in FLAT)
    for r, advantages in zip(FLAT, advantages_of(GROUPS, True), strict=True):
        log_probs = policy(torch.tensor([r.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(r.ids)):
            if r.trained[t]:
                loss = loss - advantages[0] * log_probs[t - 1, r.ids[t]] / count
    loss.backward()
    assert_close(grpo, {n: p.grad for n, p in policy.named_parameters()}, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_the_size_of_batches_and_padding_change_nothing(policies, aggregate):
    args = settings(aggregate=aggregate)
    loss, whole = gradients(*policies, args, rows=8)
    for shape in (dict(rows=1), dict(rows=2, max_seq_len=40)):
        again, parts = gradients(*policies, args, **shape)
        assert again == pytest.approx(loss, abs=1e-6)
        assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_tokens_that_were_not_sampled_have_no_gradient_and_the_end_has(policies):
    policy, _ = policies
    [batch] = batches_for(settings(), rows=4)
    kept = {}
    original = policy.forward

    def forward(*args, **options):
        out = original(*args, **options)
        out.logits.retain_grad()
        kept["logits"], kept["labels"] = out.logits, batch["labels"][options["logits_at"]]
        return out

    policy.forward = forward
    try:
        train_grpo.grpo_loss(policy, batch, None, None, settings())[0].backward()
    finally:
        del policy.forward
    assert len(kept["labels"]) == sum(r.sampled for r in FLAT)  # of no other place a logit is computed
    sizes = kept["logits"].grad.abs().sum(-1)
    assert (kept["labels"] == EOS_ID).sum() == len(FLAT) and (sizes[kept["labels"] == EOS_ID] > 1e-4).all()


def test_equal_rewards_have_no_gradient(policies):
    policy, _ = policies
    assert group_advantages([1.0] * 4, True) == group_advantages([0.0] * 4, False) == [0.0] * 4
    batch = policy_batches(FLAT, {"advantages": [[0.0] * r.sampled for r in FLAT]}, "tokens", fake_run(rows=8))[0]
    policy.zero_grad()
    train_grpo.grpo_loss(policy, batch, None, None, settings())[0].backward()
    assert all(p.grad.abs().max() == 0 for p in policy.parameters())


def test_gae_is_the_double_sum():
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(9, generator=draw), torch.randn(9, generator=draw)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)):
        following = torch.cat([values[1:], torch.zeros(1)])
        deltas = rewards + gamma * following - values
        expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(9 - t)) for t in range(9)]
        torch.testing.assert_close(gae(rewards, values, gamma, lam), torch.stack(expected))
    last = torch.zeros(9)
    last[-1] = 1.0
    torch.testing.assert_close(gae(last, values, 1.0, 1.0), 1 - values)  # R - V
    torch.testing.assert_close(gae(last, torch.zeros(9), 1.0, 1.0), torch.ones(9))  # REINFORCE


def test_clipped_value_loss_and_objective_against_loops():
    draw = torch.Generator().manual_seed(1)
    values, old, returns = (torch.randn(20, generator=draw) for _ in range(3))
    expected = []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = min(max(v, o - 0.2), o + 0.2)
        expected.append(max((v - r) ** 2, (near - r) ** 2) / 2)
    torch.testing.assert_close(train_ppo.value_loss(values, old, returns, 0.2), torch.tensor(expected))
    objective, cut = train_ppo.clipped_objective(values, old, returns, 0.2)
    other, cut_too = train_grpo.policy_objective(values, old, returns, {}, settings())
    assert torch.equal(objective, other) and torch.equal(cut, cut_too) and 0 < cut.sum() < 20


@pytest.mark.parametrize("objective", ["grpo", "cispo"])
def test_a_bandit_learns_the_rewarded_arm(objective):
    """One decision, reward for one of five tokens: a wrong sign unlearns it."""
    logits = torch.zeros(5, requires_grad=True)
    optimizer, draw = torch.optim.SGD([logits], lr=20.0), torch.Generator().manual_seed(0)
    args = settings(objective=objective)
    for _ in range(60):
        arms = torch.multinomial(logits.detach().softmax(-1), 16, replacement=True, generator=draw)
        advantages = torch.tensor(group_advantages((arms == 3).float().tolist(), False)).float()
        log_probs = logits.log_softmax(-1)[arms]
        gain, _ = train_grpo.policy_objective(log_probs, log_probs.detach(), advantages, {}, args)
        optimizer.zero_grad()
        (-gain.mean()).backward()
        optimizer.step()
    assert logits.softmax(-1)[3] > 0.95


def test_pass_at_k():
    assert pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 1, 4) == 1
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # C(3, 2) of C(5, 2) pairs miss


# ------------------------------------------------------------------------------------------------ rollouts


@pytest.mark.parametrize("moe", [{}, dict(num_experts=4, num_experts_per_tok=2)])
def test_engine_and_trainer_agree_and_seeds_decide(tiny, tokenizer, moe):
    model = tiny(vocab_size=6400, initializer_range=0.1, **moe)
    play = OneTurn(tokenizer, right_answer, Namespace(thinking=1, max_new_tokens=12))
    asked = [play.begin(question(n), n, member) for n in range(3) for member in range(3)]
    assert [r.member for r in leaders_first(asked)] == [0, 0, 0, 1, 2, 1, 2, 1, 2]
    with Generator(model, tokenizer, torch.float32, 64) as generator:
        play.answer(generator, asked)
        alone = play.begin(question(1), 1, 2)
        play.answer(generator, [alone])
    assert alone.ids == asked[5].ids  # whatever else runs
    assert len({tuple(r.ids) for r in asked[:3]}) == 3
    batches = policy_batches(asked, {}, "tokens", fake_run(max_seq_len=128))
    found = torch.cat([token_log_probs(model, batch)[0] for batch in batches])
    engine = torch.cat([batch["engine_log_probs"] for batch in batches])
    known = ~engine.isnan()
    assert known.sum() == sum(r.sampled for r in asked if r.member == 0)
    assert (found - engine)[known].abs().max() < 1e-4
    assert all(r.reward == 0 for r in asked if r.truncated) and any(r.truncated for r in asked)


def test_a_further_turn_appends_and_never_renders_again(tiny, tokenizer):
    model = tiny(vocab_size=6400)
    play = OneTurn(tokenizer, right_answer, Namespace(thinking=0, max_new_tokens=6))
    asked, prompts = play.begin(question(0), 0, 0), []

    def next_turn(r):
        prompts.append(list(r.ids))
        r.append([5, 6, 7], [{"role": "tool", "content": "7"}])
        return r.turns < 3

    model.config.eos_token_id = 9
    with Generator(model, tokenizer, torch.float32, 200) as generator:
        generator.stop_ids = tuple(range(0, 6400, 3))  # answers end soon
        generator.complete([asked], 6, next_turn=next_turn)
    assert asked.turns >= 1 and len(prompts) >= 1
    for before, after in zip(prompts, [*prompts[1:], asked.ids], strict=True):
        assert after[: len(before) + 3] == [*before, 5, 6, 7] or after[: len(before)] == before
    assert sum(asked.trained) == asked.sampled and len(asked.trained) == len(asked.ids)


# ------------------------------------------------------------------------------------------------ questions


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_minimind_rows_are_read_and_what_cannot_be_checked_is_counted(tmp_path, capsys):
    asked = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": ""}]
    rows = [{"conversations": asked}, {"conversations": asked, "gt": [42]}, {"conversations": asked, "gt": ["42", "x"]}]
    found = read_questions(write(tmp_path / "rl.jsonl", rows))
    assert [q.right for q in found] == [["42"], ["42", "x"]] and found[0].messages == asked[:1]
    assert "1 of 3 rows left out" in capsys.readouterr().err
    for text, right in (("It is 42.", 1.0), ("42.0", 1.0), ("142", 0.0), ("4 2", 0.0)):
        assert right_answer(found[0], [*asked[:1], {"role": "assistant", "content": text}]) == right
    with pytest.raises(DataError, match="no row"):
        read_questions(write(tmp_path / "none.jsonl", rows[:1]))


# ------------------------------------------------------------------------------------------------ the scripts

TINY = (
    "--max_seq_len 64 --max_new_tokens 8 --batch_size 4 --group_size 4 --dtype fp32 --device cpu --rows 2 --thinking 0"
)
TINY = f"{TINY} --save_interval 1 --measure 0 --enough 0 --refills 0".split()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Questions, and random weights that end their answers now and then, which half of the time are right."""
    folder = tmp_path_factory.mktemp("rl")
    rows = [
        {"skill": "s", "conversations": [{"role": "user", "content": f"{n}?"}], "must_contain_one": list("aeio")}
        for n in range(12)
    ]
    weights = small_weights(folder)
    for path in weights.values():
        content = torch.load(path, weights_only=True)
        embedding = content["model"]["model.embed_tokens.weight"]
        embedding[EOS_ID] = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(0)).to(embedding)
        torch.save(content, path)
    return folder, weights, write(folder / "questions.jsonl", rows)


def job(script, material, *flags):
    _, weights, questions = material
    return [script, *TINY, "--from_weight", weights["dense"], "--data_path", questions, *flags]


@pytest.mark.posix
@pytest.mark.parametrize("script", ["train_grpo.py", pytest.param("train_ppo.py", marks=pytest.mark.slow)])
def test_killed_and_resumed_is_the_same(script, material, tmp_path):
    command = job(script, material, "--steps", 4, "--updates_per_rollout", 2)
    Script(tmp_path, [*command, "--out_dir", tmp_path / "whole"]).succeed()
    assert any('"entropy"' in line for line in (tmp_path / "whole").rglob("*.jsonl").__next__().open())  # it learns
    running = Script(tmp_path, [*command, "--out_dir", tmp_path / "parts"])
    running.wait_for_state(tmp_path / "parts", 2)
    running.kill()
    Script(tmp_path, [*command, "--out_dir", tmp_path / "parts", "--from_resume", 1]).succeed()
    name = f"{script[6:-3]}_64.pth"
    assert_same(tmp_path / "whole" / name, tmp_path / "parts" / name)


ENGINES = {"ddp": [], "fsdp": ["--fsdp"], "zero2": ["--deepspeed", ROOT / "configs" / "zero2.json"]}


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero2"))])
def test_two_processes_are_one(material, tmp_path, engine):
    command = job("train_grpo.py", material, "--steps", 2, "--out_dir")
    Script(tmp_path, [*command, tmp_path / "one"]).succeed()
    two = [*command[:-1], *map(str, ENGINES[engine]), command[-1]]
    two[two.index("--batch_size") + 1] = "2"
    Script(tmp_path, [*two, tmp_path / "two"], count=2).succeed()
    one, two = (torch.load(tmp_path / n / "grpo_64.pth", weights_only=True)["model"] for n in ("one", "two"))
    start = torch.load(material[1]["dense"], weights_only=True)["model"]
    moved, apart = (torch.cat([(one[n] - other[n]).float().flatten() for n in one]).norm() for other in (start, two))
    assert moved > 0.01 and apart < 0.02 * moved


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--use_moe", "1"), ("--lora_name", "rl"), ("--beta", "0.1", "--objective", "cispo")]
)
def test_moe_adapter_and_kl_run(material, tmp_path, flags):
    folder, weights, questions = material
    command = job("train_grpo.py", material, "--steps", 2, "--out_dir", tmp_path, *flags)
    if "--use_moe" in flags:
        command[command.index("--from_weight") + 1] = weights["moe"]
    Script(tmp_path, command).succeed()
    assert list(tmp_path.rglob("*.pth")) and list(tmp_path.rglob("*.md")) and list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(("script", "own"), [("train_grpo.py", []), ("train_ppo.py", ["--critic_warmup", 0])])
def test_what_is_written_is_the_mean_of_before_and_after(material, tmp_path, script, own):
    written = {}
    for share in (0, 0.25):
        flags = ["--steps", 4, "--dtype", "fp32", "--start_share", share, "--out_dir", tmp_path / str(share)]
        Script(tmp_path, job(script, material, *own, *flags)).succeed()
        path = tmp_path / str(share) / f"{script[6:-3]}_64.pth"
        written[share] = torch.load(path, weights_only=True)["model"]
    before, moved = torch.load(material[1]["dense"], weights_only=True)["model"], 0.0
    for name, after in written[0].items():
        moved = max(moved, (after - before[name]).abs().max().item())
        torch.testing.assert_close(written[0.25][name], 0.25 * before[name] + 0.75 * after, rtol=1e-4, atol=1e-6)
    assert moved > 1e-4


def test_mistakes_get_one_line(material, tmp_path):
    unchecked = write(tmp_path / "no.jsonl", [{"conversations": [{"role": "user", "content": "?"}]}])
    command = job("train_grpo.py", material, "--steps", 1, "--out_dir", tmp_path)
    one_error(Script(tmp_path, [*command, "--data_path", unchecked]).wait(), 1, "no row", unchecked)
    one_error(Script(tmp_path, [*command, "--max_new_tokens", 60]).wait(), 1, "--max_seq_len")
    one_error(Script(tmp_path, [*command, "--group_size", 1]).wait(), 2, "--group_size")
    one_error(Script(tmp_path, [*command, "--start_share", 1]).wait(), 2, "--start_share")
    one_error(Script(tmp_path, [*command, "--temperature", 0.7]).wait(), 2, "--temperature")
