"""The faster forms of trainer/speed.py against the plain ones."""

import math
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cli import ROOT
from model.model import LoRAConfig, MiniMindConfig, MoEFeedForward, add_lora, attention, each_expert
from tests.helpers import next_token_loss, shifted
from trainer import speed
from trainer.speed import (
    additive,
    blocked_attention,
    compile_blocks,
    cross_entropy,
    grouped_experts,
    install,
    padded_experts,
)

CPU = torch.device("cpu")
needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")


def tokens(rows: int, length: int, vocab: int = 320, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ cross-entropy


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_torchs_in_fp32(compiled, dtype, monkeypatch):
    monkeypatch.setattr(speed, "is_compiled", compiled)
    torch.manual_seed(0)
    for n in (7, 64, 33, 1):  # compiled once for all but the last
        logits = (5 * torch.randn(n, 6400)).to(dtype).requires_grad_()
        labels = torch.randint(0, 6400, (n,))
        loss, expected = cross_entropy(logits, labels), F.cross_entropy(logits.float(), labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        (ours,), (theirs,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_batch_without_labels_has_loss_zero_not_nan(tiny, compiled, monkeypatch):
    """Its weight in an accumulated step is 0, and 0 * nan would spoil the others."""
    monkeypatch.setattr(speed, "is_compiled", compiled)
    model, ids = tiny().train(), tokens(1, 20)
    loss = next_token_loss(model, ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 127, 128, 300])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocked_attention_equals_the_plain_one(kv_heads, length, masked):
    torch.manual_seed(0)
    q = torch.randn(2, 4, length, 16, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, length, 16, requires_grad=True) for _ in range(2))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    segments = torch.arange(length)[None] // torch.tensor([[50], [77]])  # (B, T)
    mask = (causal & (segments[:, :, None] == segments[:, None]))[:, None] if masked else None
    upstream = torch.randn(2, 4, length, 16)
    expected, got = attention(q, k, v, mask), blocked_attention(q, k, v, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    if masked:
        assert torch.equal(got, blocked_attention(q, k, v, additive(mask)))
    gradients = [torch.autograd.grad((y * upstream).sum(), (q, k, v)) for y in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize("fast", [pytest.param(grouped_experts, marks=needs_grouped_mm), padded_experts])
@pytest.mark.parametrize("sizes", [[70, 0, 79, 1], [0, 0, 0, 150], [40, 40, 40, 30], [0, 128, 22, 0]])
def test_experts_together_equal_one_after_the_other(sizes, fast):
    torch.manual_seed(0)
    layer = MoEFeedForward(MiniMindConfig(hidden_size=64, intermediate_size=96, num_experts=4))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(150, 64, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    results = []
    for form in (fast, each_expert):
        with torch.autocast("cpu", torch.bfloat16):
            y = form(layer.experts, x, ends).float()
        results.append([y, *torch.autograd.grad(y.square().mean(), [x, *layer.experts.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max() + 1e-6


# ------------------------------------------------------------------------------------------------ the whole model


@pytest.mark.parametrize(("dtype", "rel", "cosine"), [(torch.bfloat16, 5e-3, 0.98), (torch.float32, 1e-6, 0.99999)])
@pytest.mark.parametrize("experts", [0, 4])
def test_an_installed_model_trains_like_the_plain_one(tiny, experts, dtype, rel, cosine):
    """Loss and gradients, with packed rows; and what is installed is not the plain form."""
    ids, segments = tokens(2, 150), torch.arange(150).div(60, rounding_mode="floor").expand(2, 150)
    results = []
    for fast in (False, True):
        model = tiny(qk_norm=True, num_experts=experts).train()
        if fast:
            install(model, dtype, CPU)
            assert model.model.layers[0].self_attn.attend is blocked_attention
            if experts:
                assert (model.model.layers[0].mlp.experts.compute is padded_experts) == (dtype == torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = next_token_loss(model, ids, shifted(ids), segment_ids=segments)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=rel)
    for plain, fast in zip(*results, strict=True):
        assert torch.nn.functional.cosine_similarity(plain.flatten(), fast.flatten(), dim=0) > cosine


def test_no_kernel_for_bf16_is_installed_for_fp32_nor_passes_an_adapter_by(tiny):
    model, card = tiny(num_experts=4), torch.device("cuda")
    experts = model.model.layers[0].mlp.experts
    install(model, torch.float32, card)
    assert model.model.layers[0].self_attn.attend is attention
    assert experts.compute is each_expert
    install(model, torch.bfloat16, card)
    assert (experts.compute is grouped_experts) == hasattr(F, "grouped_mm")
    add_lora(model, "mine", LoRAConfig(rank=2))
    install(model, torch.bfloat16, card)  # as a run does, once the script has changed the model
    assert experts.compute is each_expert


def test_a_torch_without_grouped_mm_trains_all_the_same(tiny, monkeypatch):
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    model, ids = tiny(num_experts=4).train(), tokens(2, 60)
    install(model, torch.bfloat16, torch.device("cuda"))
    assert model.model.layers[0].mlp.experts.compute is each_expert
    with torch.autocast("cpu", torch.bfloat16):
        next_token_loss(model, ids, shifted(ids)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept_for_the_next_step():
    """Of 64 MB that are freed and taken again and again, hardly a page comes from the system, once there is room."""
    script = """
import resource, statistics, torch
from trainer.speed import keep_freed_memory
keep_freed_memory()
counts = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(counts)))"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000


def test_threads_do_not_spin_for_long_while_they_wait():
    """Else a training step beside another busy process takes several times as long."""
    script = "import os, sys, cli; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    for env, count in (({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77")):
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | env
        run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.stdout.split() == [count, "False"]


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_compiled_blocks_equal_eager(tiny, moe):
    changes = dict(num_experts=4, num_experts_per_tok=2) if moe else {}
    eager, compiled = tiny(qk_norm=True, **changes).train(), tiny(qk_norm=True, **changes).train()
    names = list(compiled.state_dict())
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == names
    ids = tokens(2, 150)
    few = shifted(ids).masked_fill(torch.rand(ids.shape) < 0.6, -100)  # logits are computed for the labels only
    losses = []
    for model in (eager, compiled):
        for labels in (shifted(ids), few):
            loss = next_token_loss(model, ids, labels)
            loss.backward()
            losses.append(loss.item())
    assert losses[:2] == pytest.approx(losses[2:], abs=1e-5)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-4 * a.grad.abs().max() + 1e-6, name


@pytest.mark.slow
def test_activation_checkpointing_of_compiled_blocks(tiny):
    ids, grads = tokens(2, 64), []
    for on in (False, True):
        model = tiny(qk_norm=True).train()
        model.activation_checkpointing = on
        compile_blocks(model)
        next_token_loss(model, ids, shifted(ids)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_short_run_is_not_compiled_unless_asked(tiny):
    said = []
    for wish, seconds, expected in (("auto", 10, False), ("0", 1e9, False)):
        assert speed.compile_if_worth(tiny(), wish, CPU, seconds, said.append) is expected
    assert not said


def test_matmul_peak():
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e6 < speed.matmul_peak(CPU, dtype, size=128) < 1e16
    assert torch.equal(state, torch.get_rng_state())
    assert math.isfinite(speed.matmul_peak(CPU, torch.float32, size=64, repeat=1))
