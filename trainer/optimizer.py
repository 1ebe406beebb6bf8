"""Parameter groups, optimizers and the learning-rate schedule.

optimizers = build_optimizers(model, "muon", learning_rate=8e-3); for o in optimizers: o.step()
"""

import math

import torch
from torch import Tensor, nn

from model.model import MoEFeedForward
from trainer.parallel import DTensor, distribute_tensor

LEARNING_RATES = {"muon": 5e-3, "adamw": 2e-3}  # good ones at hidden_size 256
EMBEDDING_RATE = 4  # times Muon's: a row of the embedding learns from few of the tokens
# Of gradients, in Muon and beside it. The runs of a small machine have hundreds of steps and a high learning rate: what
# was right 20 steps ago, which 0.95 remembers, is no longer.
MOMENTUM = 0.8
MOMENTUM_STEPS = 150  # over which it rises to that: the first gradients change the fastest
ADAMW_BETAS = (0.6, 0.95)  # beside Muon
TOKENS_PER_ROW = 8  # of a matrix, in each step: with fewer, Muon's matrices take turns
STACKED, STACKED_ON_CARD = 1 << 20, 1 << 26  # numbers of Muon's matrices that a CPU, a card computes together


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made nearly orthogonal: all its singular values become about 1.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled by 0.2 * sqrt(larger side) to the root mean square of
    an AdamW update (Liu et al. 2025, arXiv:2502.16982), so that one learning rate fits both. `dtype` is the precision
    of its matrix products. The momentum rises from 0 over the first `rise` steps. `every` n steps a matrix of a group
    is changed, by n times as much; they take turns, so that each step computes an n-th of them.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = MOMENTUM,
        every: int = 1,
        rise: int = MOMENTUM_STEPS,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(
            params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, every=every, rise=rise, steps=0)
        )
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            every, steps = group["every"], group["steps"]
            momentum = group["momentum"] * min(1.0, (steps + 1) / (group["rise"] + 1))
            group["steps"] += 1
            buffers, grads = [], []
            due: dict[torch.Size, list[nn.Parameter]] = {}  # matrices of one shape are computed together
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(self.state[p]["momentum_buffer"])
                grads.append(p.grad)
                if (i + steps) % every == 0:
                    due.setdefault(p.shape, []).append(p)
            if grads:
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
            for matrices in due.values():
                together = at_once(matrices[0])
                for start in range(0, len(matrices), together):
                    self._move(matrices[start : start + together], momentum, group["lr"] * every, group["weight_decay"])

    def _move(self, params: list[nn.Parameter], momentum: float, step_size: float, weight_decay: float) -> None:
        """One update of matrices of one shape."""
        p = params[0]
        updates = [p.grad.lerp(self.state[p]["momentum_buffer"], momentum) for p in params]
        sharded = isinstance(p, DTensor)  # FSDP2: a piece of a matrix; each process computes on the whole one
        wholes = [update.full_tensor() for update in updates] if sharded else updates
        stack = torch.stack(wholes) if len(wholes) > 1 else wholes[0]
        updates = list(orthogonalize(stack, self.dtype).to(p.dtype).view(-1, *p.shape).unbind())
        if sharded:
            updates = [distribute_tensor(u, p.device_mesh, p.placements, src_data_rank=None) for u in updates]
        torch._foreach_mul_(params, 1 - step_size * weight_decay)
        torch._foreach_add_(params, updates, alpha=-step_size * 0.2 * math.sqrt(max(p.shape)))


def at_once(matrix: Tensor) -> int:
    """How many matrices of this shape are computed together: on a card, which small products keep waiting, as many as
    take little memory; on a CPU as many as stay in its cache."""
    return max(1, (STACKED if matrix.device.type == "cpu" else STACKED_ON_CARD) // matrix.numel())


# a x + b x^3 + c x^5: the first is the nearest to 1 that there is on [0.005, 1], each further one on the interval that
# those before it map that to (Amsel et al. 2025, arXiv:2505.16932). The intervals are 1 to 2 % wider at the upper end,
# for the rounding of bf16, and the last polynomial is times 0.9, for a root mean square of about 1.
QUINTICS = ((8.136, -23.0214, 16.385), (3.8803, -2.8391, 0.5329), (2.8439, -2.0938, 0.4291))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of a matrix (m, n) = U S V^T (singular value decomposition), or of each of a stack (N, m, n), by
    Newton-Schulz iteration in `dtype`.

    Singular values above 0.005 of their 4-norm end between 0.4 and 1.4, not at 1; smaller ones grow 90-fold.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    add_product = torch.addmm if matrices.ndim == 2 else torch.baddbmm  # on a CPU, a tenth faster than a stack of one
    wide = (matrices.mT if tall else matrices).to(dtype)
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram = wide @ wide.mT
    # The 4-norm squared: no singular value is larger, and it is nearer than norm().
    size = gram.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram, wide = gram / size, wide / size.sqrt()
    for i, (a, b, c) in enumerate(QUINTICS):
        if i:
            gram = wide @ wide.mT
        wide = add_product(wide, add_product(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide


def build_optimizers(
    model: nn.Module,
    name: str = "muon",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    dtype: torch.dtype = torch.float32,
    tokens: int | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for embeddings (at a learning rate of
    their own), norms and routers.

    Only the matrices of the blocks decay. dtype: the run's; Muon multiplies in bf16 where the run does, else in fp32.
    tokens: of a step, in all processes; with few of them Muon's matrices take turns.
    """
    matrices, router, embeddings, vectors = [], [], [], []
    for param_name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            vectors.append(p)
        elif "embed_tokens" in param_name:
            embeddings.append(p)
        elif param_name.endswith("mlp.gate.weight"):
            router.append(p)
        else:
            matrices.append(p)
    groups = [
        {"params": embeddings, "weight_decay": 0.0},
        {"params": router, "weight_decay": 0.0},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = matrices[0].device.type in ("cpu", "cuda")
    adamw = dict(lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    if name == "adamw":
        groups.insert(0, {"params": matrices, "weight_decay": weight_decay})
        optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], **adamw)]
    elif name == "muon":
        products = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        muon = Muon(_in_turns(model, matrices, tokens), lr=learning_rate, weight_decay=weight_decay, dtype=products)
        groups[0]["lr"] = EMBEDDING_RATE * learning_rate
        groups = [g for g in groups if g["params"]]
        adamw["betas"] = ADAMW_BETAS
        optimizers = [muon] + ([torch.optim.AdamW(groups, **adamw)] if groups else [])
    else:
        raise ValueError(f"optimizer {name!r}: choose one of {', '.join(LEARNING_RATES)}")

    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(owned) == len(set(map(id, owned))) == len(trainable), "each parameter belongs to exactly one group"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def _in_turns(model: nn.Module, matrices: list[nn.Parameter], tokens: int | None) -> list[dict]:
    """Muon's groups, and for how many steps a matrix of each waits: so that the optimizer takes a fifth of the time.

    orthogonalize() costs about 13 m^2 n for a matrix (m, n), m the smaller side; forward and backward 6 m n a token.
    With fewer than 8 m tokens a step, matrices wait. Experts wait for each other, so that a step computes as many of
    their matrices as work on one token: each learns from a share of the tokens."""
    layers = [m for m in model.modules() if isinstance(m, MoEFeedForward)]
    experts = [m for layer in layers for m in layer.experts.modules() if isinstance(m, nn.Linear)]
    routed = {id(expert.weight) for expert in experts}  # not their adapters: those are small
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}  # whatever the tokens: a run may resume with others
    for p in matrices:
        groups.setdefault((min(p.shape), id(p) in routed), []).append(p)
    waits = []
    for side, is_expert in groups:
        every = max(1, round(TOKENS_PER_ROW * side / tokens)) if tokens else 1
        waits.append(every * (layers[0].num_experts // layers[0].k if is_expert else 1))
    return [{"params": params, "every": every} for params, every in zip(groups.values(), waits, strict=True)]


def learning_rate_scale(progress: float, warmup: float = 0.02, final: float = 0.0, decay: float = 0.5) -> float:
    """Factor on the learning rate at `progress` in [0, 1] of the budget: linear up, flat, then down to `final`.

    Warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395): the last `decay` share of the budget follows a cosine down.
    """
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    if not decay or progress < 1 - decay:
        return 1.0
    through = min((progress - (1 - decay)) / decay, 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * through))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], scale: float) -> float:
    """Every group's learning rate = its own base times `scale`; returns the first one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
    return optimizers[0].param_groups[0]["lr"]
