"""Learning-rate schedule, parameter groups, and that both optimizers learn."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.model import MiniMindConfig, MiniMindLM
from tests.helpers import next_token_loss
from trainer import optimizer as optimizer_module
from trainer.optimizer import Muon, build_optimizers, learning_rate_scale, orthogonalize, set_learning_rate


def test_schedule():
    scale = partial(learning_rate_scale, warmup=0.1, decay=0.4)
    assert 0 < scale(0.0) < 0.01
    assert scale(0.05) == pytest.approx(0.5)
    assert scale(0.1) == scale(0.3) == scale(0.599) == 1.0
    assert scale(0.8) == pytest.approx(0.5)
    assert scale(1.0) == scale(1.3) == 0.0
    falling = [scale(0.6 + 0.01 * i) for i in range(41)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate_scale(0.0, warmup=0.0) == 1.0
    assert all(learning_rate_scale(share, warmup=0.0, decay=0.0) == 1.0 for share in (0.999, 1.0, 1.2))


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("experts", [0, 4])
def test_parameter_groups(tiny, name, experts):
    model = tiny(num_experts=experts, qk_norm=True, num_shared_experts=1 if experts else 0)
    optimizers = build_optimizers(model, name, learning_rate=1e-3, weight_decay=0.1)
    name_of = {id(p): param_name for param_name, p in model.named_parameters()}
    seen, decays, muon = [], set(), set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            names = [name_of[id(p)] for p in group["params"]]
            seen += names
            decays |= set(names) if group["weight_decay"] else set()
            muon |= set(names) if isinstance(optimizer, Muon) else set()
    assert sorted(seen) == sorted(name_of.values())
    ends = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    ends += ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    matrices = {n for n in name_of.values() if n.endswith(ends)}
    assert decays == matrices
    assert muon == (matrices if name == "muon" else set())
    assert {n for n in name_of.values() if n.endswith("mlp.gate.weight")} == (
        {f"model.layers.{i}.mlp.gate.weight" for i in range(2)} if experts else set()
    )
    set_learning_rate(optimizers, 0.25)
    rates = {name_of[id(p)]: group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    embedding = rates.pop("model.embed_tokens.weight")
    assert all(rate == pytest.approx(0.25e-3) for rate in rates.values())
    assert embedding == pytest.approx(1e-3 if name == "muon" else 0.25e-3)


def test_frozen_parameters_are_left_out(tiny):
    model = tiny()
    model.model.embed_tokens.requires_grad_(False)
    owned = [p for o in build_optimizers(model) for g in o.param_groups for p in g["params"]]
    assert all(p is not model.model.embed_tokens.weight for p in owned)


def test_muon_is_torchs_but_for_the_iteration(monkeypatch):
    """With torch's own, bit for bit in bf16, over several steps, for tall, wide and square matrices."""

    def jordans(matrices, dtype):
        matrices = matrices.view(-1, *matrices.shape[-2:])
        own = torch.optim._muon._zeropower_via_newtonschulz
        return torch.stack([own(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7) for matrix in matrices])

    monkeypatch.setattr(optimizer_module, "orthogonalize", jordans)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 32), (32, 48), (32, 32))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.01, weight_decay=0.1, momentum=0.95, rise=0, dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_matrices_take_turns_and_go_as_far_as_without():
    torch.manual_seed(0)
    start = [torch.randn(16, 24) for _ in range(5)]
    gradients = [torch.randn(16, 24) for _ in range(5)]

    def train(every: int) -> list[list[torch.Tensor]]:
        """The matrices after each of 60 steps; halfway, all goes on from a saved state."""
        params = [torch.nn.Parameter(p.clone()) for p in start]
        muon, after = Muon([{"params": params, "every": every}], lr=1e-3, weight_decay=0.1), []
        for step in range(60):
            if step == 29:
                state = copy.deepcopy(muon.state_dict())
                muon = Muon([{"params": params, "every": every}], lr=1e-3, weight_decay=0.1)
                muon.load_state_dict(state)
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            muon.step()
            after.append([p.detach().clone() for p in params])
        return after

    each, third = train(1), train(3)
    for step in range(59):
        changed = [not torch.equal(a, b) for a, b in zip(third[step], third[step + 1], strict=True)]
        assert changed == [(i + step + 1) % 3 == 0 for i in range(5)]
    for p, q, p0 in zip(each[-1], third[-1], start, strict=True):
        assert (p - q).norm() < 0.02 * (p - p0).norm()


def test_experts_take_turns(tiny):
    """Each step computes as many of an expert's matrices as a token sees."""
    model = tiny(num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
    muon = build_optimizers(model, "muon")[0]
    every = {id(p): group["every"] for group in muon.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if id(p) in every:
            assert every[id(p)] == (2 if ".experts." in name else 1), name
    assert {g["every"] for g in build_optimizers(tiny(), "muon")[0].param_groups} == {1}


def test_matrices_wait_where_a_step_has_few_tokens(tiny):
    """By the smaller side: 64 x 96, 64 x 64 and 32 x 64."""
    model = tiny(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
    for tokens, waits in ((None, {1}), (512, {1}), (128, {2, 4}), (64, {4, 8})):
        groups = build_optimizers(model, "muon", tokens=tokens)[0].param_groups
        assert {group["every"] for group in groups} == waits
        for group in groups:
            for p in group["params"]:
                assert group["every"] == (max(1, 8 * min(p.shape) // tokens) if tokens else 1)
    few, many = (build_optimizers(model, "muon", tokens=tokens)[0] for tokens in (64, 4096))
    many.load_state_dict(few.state_dict())  # a run goes on with another batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_muon_multiplies_in_the_precision_of_the_run(dtype):
    """Whatever the hardware would like: fp32 is fp32 on every machine."""
    torch.manual_seed(0)
    model = MiniMindLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=96, vocab_size=320))
    seen: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                seen.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    muon = build_optimizers(model, "muon", dtype=dtype)[0]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with Watch():
        muon.step()
    assert set(seen) == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
def test_orthogonalize_keeps_the_directions_and_evens_out_their_sizes(shape, scale):
    """Singular values over two orders of magnitude, in fp32 against the singular value decomposition."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.logspace(0, -2, min(shape))
    matrix = scale * (u * sizes) @ vh
    along = u.T @ orthogonalize(matrix, torch.float32) @ vh.T  # diagonal, if the singular vectors are the same
    assert (along - along.diag().diag()).abs().max() < 1e-3
    assert along.diag().min() > 0.35 and along.diag().max() < 1.4
    assert along.diag().square().mean().sqrt() == pytest.approx(0.95, abs=0.1)
    rounded = u.T @ orthogonalize(matrix, torch.bfloat16).float() @ vh.T
    assert (rounded - along).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_computes_matrices_together_as_it_does_one_by_one(tiny, monkeypatch, dtype):
    alone, together = tiny(num_hidden_layers=3), tiny(num_hidden_layers=3)
    for model, stacked in ((alone, 1), (together, 1 << 20)):
        monkeypatch.setattr(optimizer_module, "STACKED", stacked)
        muon = build_optimizers(model, "muon", dtype=dtype, tokens=200)[0]  # so few that they take turns
        for step in range(4):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            muon.step()
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_bears_what_is_of_one_rank_or_nothing(dtype):
    assert not orthogonalize(torch.zeros(8, 12), dtype).any()
    one = torch.outer(torch.randn(96), torch.randn(40))
    assert 0.3 < torch.linalg.matrix_norm(orthogonalize(one, dtype).float(), 2) < 1.5


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_optimizers_learn_a_batch(name):
    torch.manual_seed(0)
    model = MiniMindLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=96, vocab_size=320))
    ids = torch.randint(16, 320, (2, 17))
    optimizers = build_optimizers(model, name, learning_rate=3e-3)
    losses = []
    for _ in range(25):
        loss = next_token_loss(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(320), abs=0.3)
    assert losses[-1] < 0.5 * losses[0]
