"""The model against transformers' own, and against itself: `pytest tests/test_model.py`."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import checkpoint
from model.model import (
    PRESETS,
    Experts,
    FeedForward,
    LoRAConfig,
    MiniMindConfig,
    MiniMindLM,
    MoEFeedForward,
    add_lora,
    lora_layers,
)
from tests.helpers import next_token_loss, shifted
from trainer.speed import grouped_experts


def tokens(rows: int, length: int, vocab: int = 320, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def moe_config(**changes) -> MiniMindConfig:
    shape = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, vocab_size=320, initializer_range=0.2)
    return MiniMindConfig(**(shape | dict(num_experts=4, num_experts_per_tok=2) | changes))


def moe_layer(seed: int = 0, **changes) -> MoEFeedForward:
    config = moe_config(**changes)
    torch.manual_seed(seed)
    layer = MoEFeedForward(config)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return layer


# ------------------------------------------------------------------------------------------------ transformers

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MOE = dict(moe_intermediate_size=48, num_experts=4)
ARCHITECTURES = {
    "llama": ("Llama", {}, 200),
    "llama-yarn": ("Llama", dict(yarn=YARN), 300),
    "qwen3": ("Qwen3", dict(head_dim=16), 200),
    "qwen3-head_dim": ("Qwen3", dict(head_dim=24), 200),
    "qwen3-yarn": ("Qwen3", dict(head_dim=16, yarn=YARN | {"beta_fast": 8.0, "attention_factor": 0.9}), 300),
    "moe-k1-normalised": ("Qwen3Moe", MOE | dict(num_experts_per_tok=1, norm_topk_prob=True), 200),
    "moe-k2-normalised": ("Qwen3Moe", MOE | dict(num_experts_per_tok=2, norm_topk_prob=True), 200),
    "moe-k2": ("Qwen3Moe", MOE | dict(num_experts_per_tok=2, norm_topk_prob=False), 200),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(name, tmp_path):
    import transformers

    kind, changes, length = ARCHITECTURES[name]
    changes = dict(changes)
    rope = {"rope_theta": 10000.0, "rope_type": "default"} | changes.pop("yarn", {})
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=112,
        vocab_size=320, max_position_embeddings=512, rope_parameters=rope, initializer_range=0.2,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
        for name, p in theirs.named_parameters():
            if name.endswith("mlp.gate.weight"):  # without this the router of a random model hardly prefers anything
                p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours, _ = checkpoint.load(tmp_path)
    ids = tokens(2, length)
    with torch.no_grad():
        expected = theirs(ids).logits
        difference = (ours(ids).logits - expected).abs().max().item()
    assert expected.std() > 0.5
    assert difference < 1e-4


def test_rotary_frequencies_stay_fp32_in_a_bf16_model(tiny):
    model = tiny(rope_scaling=YARN)
    frequencies = model.inv_freq.clone()
    model.bfloat16()
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(model.inv_freq, frequencies)
    assert model.to("meta").inv_freq.device.type == "meta"


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("packed", [False, True])
def test_training_and_eval_paths_agree(tiny, packed):
    model, ids = tiny(qk_norm=True), tokens(2, 200)
    segments = torch.arange(200)[None].expand(2, -1) // 70 + 1 if packed else None
    with torch.no_grad():
        difference = model(ids, segment_ids=segments).logits - model.train()(ids, segment_ids=segments).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_packed_conversations_do_not_see_each_other(tiny, training):
    model = tiny(qk_norm=True).train(training)
    first, second = tokens(1, 60, seed=1), tokens(1, 90, seed=2)
    segments = torch.tensor([[1] * 60 + [2] * 90 + [0] * 10])
    row = torch.cat((first, second, torch.zeros(1, 10, dtype=torch.long)), dim=1)
    with torch.no_grad():
        packed = model(row, segment_ids=segments).logits
        alone = model(first).logits, model(second).logits
        # RoPE only sees distances, so a conversation that starts at position 60 gives the same logits.
        assert (packed[:, :60] - alone[0]).abs().max() < 1e-4
        assert (packed[:, 60:150] - alone[1]).abs().max() < 1e-4
        row[:, :60] = (row[:, :60] + 7) % 320
        changed = model(row, segment_ids=segments).logits
    assert torch.equal(changed[:, 60:150], packed[:, 60:150])
    assert not torch.allclose(changed[:, :60], packed[:, :60])
    assert packed.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_causal(tiny, training):
    model, ids = tiny(num_experts=4).train(training), tokens(1, 150)
    with torch.no_grad():
        before = model(ids).logits
        ids[:, 100] = (ids[:, 100] + 1) % 320
        after = model(ids).logits
    torch.testing.assert_close(after[:, :100], before[:, :100], rtol=0, atol=1e-5)
    assert (after[:, 100:] - before[:, 100:]).abs().amax(-1).min() > 1e-3


# ------------------------------------------------------------------------------------------------ mixture of experts


def naive_moe(layer: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        probs = layer.gate(token).softmax(-1)
        weights, chosen = probs.topk(layer.k)
        if layer.norm_topk_prob:
            weights = weights / weights.sum()
        y = sum(w * layer.experts[int(e)](token) for w, e in zip(weights, chosen, strict=True))
        rows.append(y + sum(expert(token) for expert in layer.shared_experts))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_moe_equals_a_loop_over_tokens(k, norm):
    layer = moe_layer(num_experts_per_tok=k, norm_topk_prob=norm, num_shared_experts=1)
    x = torch.randn(2, 20, 64)
    y, (_, load) = layer(x)
    torch.testing.assert_close(y, naive_moe(layer, x), rtol=1e-5, atol=1e-5)
    assert load.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_expert_that_nobody_chose_is_not_computed(autocast):
    """Its weights are NaN and yet all stays finite; each expert computes exactly the rows that chose it."""
    layer = moe_layer(num_experts_per_tok=2, norm_topk_prob=True)
    x = torch.randn(1, 100, 64)
    with torch.no_grad():
        layer.gate.weight[3] = 0
        x[..., 0] = 10.0
        layer.gate.weight[:, 0] = torch.tensor([0.0, 0.0, 0.0, -10.0])
        for p in layer.experts[3].parameters():
            p.fill_(math.nan)
    rows = [0] * 4
    for e, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda _, args, __, e=e: rows.__setitem__(e, rows[e] + len(args[0])))
    if autocast:
        layer.experts.compute = grouped_experts
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, (aux_loss, load) = layer(x)
        (y.float().square().mean() + aux_loss).backward()
    assert y.isfinite().all() and load[3] == 0
    chosen = [p for e in range(3) for p in layer.experts[e].parameters()]
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in chosen + [layer.gate.weight])
    for p in layer.experts[3].parameters():
        assert p.grad is None or not p.grad.any()
    if not autocast:
        assert rows == [round(share * 200) for share in load.tolist()]


@pytest.mark.parametrize("autocast", [False, True])
def test_all_tokens_at_one_expert(autocast):
    layer = moe_layer(num_experts_per_tok=1)
    x = torch.randn(1, 100, 64)
    with torch.no_grad():
        x[..., 0] = 10.0
        layer.gate.weight[:, 0] = torch.tensor([-10.0, 10.0, -10.0, -10.0])
    if autocast:
        layer.experts.compute = grouped_experts
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, (_, load) = layer(x)
        y.float().sum().backward()
    assert load.tolist() == [0, 1, 0, 0]
    expected = layer.experts[1](x)
    assert (y - expected).abs().max() < (0.02 * expected.abs().max() if autocast else 1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_router_learns_from_the_language_model_loss(tiny, k, norm):
    model = tiny(num_experts=4, num_experts_per_tok=k, norm_topk_prob=norm).train()
    ids = tokens(2, 40)
    next_token_loss(model, ids, shifted(ids)).backward()
    for block in model.model.layers:
        assert block.mlp.gate.weight.grad.abs().max() > 1e-6


def test_top1_router_gradient_is_that_of_the_probability_over_its_value():
    """With k = 1 and normalisation the weight is 1 whatever the router says; its gradient is d log p of the chosen."""
    layer = moe_layer(num_experts_per_tok=1, norm_topk_prob=True)
    x, upstream = torch.randn(1, 30, 64), torch.randn(1, 30, 64)
    y, _ = layer(x)
    (y * upstream).sum().backward()
    log_probs = layer.gate(x).log_softmax(-1).max(-1).values
    expected = torch.autograd.grad((log_probs * (y.detach() * upstream).sum(-1)).sum(), layer.gate.weight)[0]
    torch.testing.assert_close(layer.gate.weight.grad, expected, rtol=1e-4, atol=1e-5)
    # Without the trick, w / w = 1 for every router: moving it a little changes nothing.
    with torch.no_grad():
        layer.gate.weight += 1e-5 * torch.randn_like(layer.gate.weight)
        assert torch.equal(layer(x)[0], y)


def test_aux_loss_is_one_when_balanced_and_grows_with_imbalance():
    layer = moe_layer(num_experts_per_tok=1)
    x = torch.eye(64)[:4].repeat(25, 1)[None]  # (1, 100, 64): each quarter of the tokens is one unit vector
    losses = []
    for bias in (0.0, 3.0, 30.0):
        with torch.no_grad():
            layer.gate.weight.zero_()
            layer.gate.weight[:4, :4] = 10 * torch.eye(4)
            layer.gate.weight[0, :4] += bias
        losses.append(layer(x)[1].aux_loss.item())
    assert losses[0] == pytest.approx(1.0, abs=1e-5)
    assert losses[0] < losses[1] < losses[2] == pytest.approx(4.0, abs=1e-3)


def test_aux_loss_of_the_model_is_the_mean_times_its_coefficient(tiny):
    model, ids = tiny(num_experts=4, router_aux_loss_coef=0.5).train(), tokens(2, 40)
    seen = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _, __, output: seen.append(output[1].aux_loss.item()))
    out = model(ids)
    assert out.aux_loss.item() == pytest.approx(0.5 * sum(seen) / 2)
    assert out.expert_load.shape == (2, 4)
    assert torch.allclose(out.expert_load.sum(-1), torch.ones(2))
    assert tiny()(ids).aux_loss == 0


@pytest.mark.parametrize("rows", [40, 100])  # below and above the size from which the grouped kernel is used
def test_experts_in_bf16_are_near_fp32(rows):
    torch.manual_seed(0)
    experts = Experts(FeedForward(moe_config()) for _ in range(4))
    x, ends = torch.randn(rows, 64), torch.tensor([10, 10, 37, rows], dtype=torch.int32)
    with torch.no_grad():
        expected = experts(x, ends)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = experts(x, ends)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()


# ------------------------------------------------------------------------------------------------ sizes and start


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("small", 25.83, 25.83),
        ("base", 104.03, 104.03),
        ("moe", 145.03, 91.95),
        ("v3", 63.91, 63.91),
        ("v3-moe", 198.42, 63.94),
    ],
)
def test_parameter_counts(preset, total, active):
    with torch.device("meta"):
        model = MiniMindLM(PRESETS[preset])
    assert model.num_parameters() / 1e6 == pytest.approx(total, abs=0.006)
    assert model.num_parameters(active=True) / 1e6 == pytest.approx(active, abs=0.006)


def test_nano_is_small():
    with torch.device("meta"):
        assert 3e6 < MiniMindLM(PRESETS["nano"]).num_parameters() < 8e6


def test_flops_per_token():
    with torch.device("meta"):
        model = MiniMindLM(PRESETS["small"])
    # QK^T and its use on V: 2 products of 2 * 512 FLOPs per pair, half the pairs, three times for forward and backward
    assert model.flops_per_token(512) == 6 * model.num_parameters() + 8 * 3 * 2 * 2 * 512 * 512 // 2


def test_initialisation():
    torch.manual_seed(0)
    config = MiniMindConfig(num_experts=4, num_shared_experts=1, qk_norm=True)
    model = MiniMindLM(config)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
            continue
        residual = "o_proj" in name or "down_proj" in name
        std = 0.02 / math.sqrt(2 * config.num_hidden_layers) if residual else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.1), name
        assert abs(p.mean().item()) < std / 10
    ids = tokens(4, 64, vocab=6400)
    with torch.no_grad():
        loss = next_token_loss(model, ids, shifted(ids)) - model(ids).aux_loss
    assert loss.item() == pytest.approx(math.log(6400), abs=0.1)


def test_the_tied_embedding_learns_from_both_uses(tiny):
    model, ids = tiny().train(), torch.arange(0, 20)[None]
    next_token_loss(model, ids, ids + 100).backward()
    grad = model.model.embed_tokens.weight.grad
    assert grad[:20].abs().sum() > 0  # as input; as output every row gets some
    frozen = tiny().train()
    table = frozen.model.embed_tokens.weight.detach().clone()
    frozen.model.embed_tokens.forward = lambda ids: F.embedding(ids, table)
    next_token_loss(frozen, ids, ids + 100).backward()
    output_only = frozen.model.embed_tokens.weight.grad
    torch.testing.assert_close(grad[20:], output_only[20:], rtol=1e-4, atol=1e-6)  # rows that are not in the input
    assert (grad[:20] - output_only[:20]).abs().amax(-1).min() > 1e-5
    assert "lm_head.weight" not in model.state_dict()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(hidden_size=100, num_attention_heads=3), "hidden_size 100"),
        (dict(head_dim=33), "head_dim 33"),
        (dict(hidden_size=0), "hidden_size 0"),
        (dict(num_key_value_heads=0), "num_key_value_heads 0"),
        (dict(rope_scaling={"rope_type": "yarn"}), "needs factor"),
        (dict(num_attention_heads=4, num_key_value_heads=3), "num_key_value_heads"),
        (dict(num_experts=4, num_experts_per_tok=5), "num_experts_per_tok 5"),
        (dict(num_experts=4, num_experts_per_tok=0), "num_experts_per_tok 0"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "yarn"),
    ],
)
def test_configuration_errors_are_one_clear_line(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        MiniMindConfig(**changes)
    assert "\n" not in str(caught.value)


def test_unknown_configuration_field_is_named():
    with pytest.raises(ValueError, match="hidden_sise"):
        MiniMindConfig.from_dict({"hidden_sise": 64})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("experts", [0, 4])
def test_activation_checkpointing_changes_no_bit(tiny, experts, autocast):
    """Loss, balance and gradients, with a mask and with the random numbers of the adapters' dropout."""
    ids, segments = tokens(2, 40), torch.arange(40).div(20, rounding_mode="floor").expand(2, 40)
    results = []
    for on in (False, True):
        model = tiny(qk_norm=True, num_experts=experts).train()
        add_lora(model, "mine", LoRAConfig(rank=4, dropout=0.3))
        model.requires_grad_(True)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B_mine, std=0.1)
        model.activation_checkpointing = on
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = next_token_loss(model, ids, shifted(ids), segment_ids=segments)
        loss.backward()
        results.append([loss.detach(), torch.get_rng_state(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_activation_checkpointing_holds_less(tiny):
    """Elements that the operations of a forward keep for the backward."""
    ids, held = tokens(2, 128), []
    for on in (False, True):
        model = tiny(num_hidden_layers=4).train()
        model.activation_checkpointing = on
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            next_token_loss(model, ids, ids)
        held.append(sum({t.untyped_storage().data_ptr(): t.numel() for t in kept}.values()))
    assert held[1] < held[0] / 4
