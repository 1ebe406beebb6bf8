"""The whole model in plain torch: configuration, RMSNorm, RoPE with YaRN, grouped-query attention, SwiGLU, MoE, LoRA.

    from model.model import MiniMindLM, PRESETS
    model = MiniMindLM(PRESETS["nano"])
    logits = model(input_ids).logits                       # (B, T, vocab): of the token that follows each position
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    ids = model.generate(input_ids, max_new_tokens=20)

Field and parameter names are Hugging Face's. A dense model is a `LlamaForCausalLM`, with QK-norm a `Qwen3ForCausalLM`;
a MoE with QK-norm and without shared experts is a `Qwen3MoeForCausalLM`.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass
class MiniMindConfig:
    """Shape of a model. Names as in Hugging Face's Llama, Qwen3 and Qwen3-MoE configurations."""

    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 512  # width of the SwiGLU; with MoE, of each expert
    head_dim: int | None = None  # hidden_size / num_attention_heads unless given
    vocab_size: int = 6400
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    # None, or YaRN: {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, ...}
    rope_scaling: dict[str, Any] | None = None
    qk_norm: bool = False
    num_experts: int = 0  # 0 = dense
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0  # see every token, added to the routed sum without a gate
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self):
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: change one, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be between 1 and num_experts {self.num_experts}"
            )
        if self.rope_scaling and self.rope_scaling.get("rope_type") != "yarn":
            raise ValueError(f"rope_scaling {self.rope_scaling}: only rope_type 'yarn' is known")
        if self.rope_scaling and not {"factor", "original_max_position_embeddings"} <= set(self.rope_scaling):
            raise ValueError(f"rope_scaling {self.rope_scaling}: needs factor and original_max_position_embeddings")

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MiniMindConfig":
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}")
        return cls(**values)


_V3 = dict(
    hidden_size=768, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, intermediate_size=2432,
    qk_norm=True,
)  # fmt: skip
PRESETS: dict[str, MiniMindConfig] = {
    "pico": MiniMindConfig(
        hidden_size=192, num_attention_heads=3, num_key_value_heads=1, intermediate_size=384, qk_norm=True
    ),
    "nano": MiniMindConfig(qk_norm=True),
    "micro": MiniMindConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, intermediate_size=1024,
        qk_norm=True,
    ),
    "small": MiniMindConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1408
    ),
    "base": MiniMindConfig(
        hidden_size=768, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2, intermediate_size=2048
    ),
    "moe": MiniMindConfig(
        hidden_size=640, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1728,
        num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
    ),
    "v3": MiniMindConfig(**_V3),
    "v3-moe": MiniMindConfig(**_V3, num_experts=4, num_experts_per_tok=1),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ positions


def rope_frequencies(config: MiniMindConfig) -> tuple[Tensor, float]:
    """Angular speed of each pair of channels, (head_dim / 2,) fp32, and the factor on cos and sin (1 without YaRN).

    RoPE: Su et al. 2021, arXiv:2104.09864. YaRN: Peng et al. 2023, arXiv:2309.00071: pairs that turn fast within the
    original context keep their speed, slow ones are slowed down by `factor`, with a linear ramp between the two.
    """
    dim, base = config.head_dim, config.rope_theta
    inv_freq = base ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq, 1.0

    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_that_turns(rotations: float) -> float:
        """The (fractional) pair that makes this many full turns over the original context."""
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow") or 1)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    inv_freq = inv_freq * (1 - ramp) + inv_freq / factor * ramp
    attention_factor = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return inv_freq, attention_factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim/2) of x (B, T, H, D) by the angles in cos, sin (B or 1, T, 1, D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ------------------------------------------------------------------------------------------------ layers


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D); H / KV heads share a key head.

    mask (B, 1, T, S) bool, True = may look; None: causal, position t sees 0 to t."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


class LayerCache(Protocol):
    """Keys and values that one layer has computed before."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (B, KV, T, D) of the new tokens; all that these may look at, (B, KV, S, D)."""


class Cache(Protocol):
    """What a forward of T new tokens needs to know of those before: see inference/kv_cache.py."""

    positions: Tensor  # (B, T) of the new tokens
    mask: Tensor | None  # (B, 1, T, S) bool, as attention() takes it

    def layer(self, index: int) -> LayerCache: ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245) and RoPE."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        if config.qk_norm:  # per head, before RoPE, as Qwen3 does
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.attend = attention  # a faster form of the same may take its place (trainer/speed.py)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin).transpose(1, 2), apply_rope(k, cos, sin).transpose(1, 2)  # (B, H, T, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, KV, S, D): everything seen so far
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The routed experts: SwiGLU feed-forwards of which each works on its own contiguous block of rows."""

    def __init__(self, experts: Iterable[FeedForward]):
        super().__init__(experts)
        self.compute = each_expert  # a faster form of the same may take its place (trainer/speed.py)

    @torch.compiler.disable  # each step has other numbers of rows, and each number would be compiled anew
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (N, hidden) sorted by expert; expert e owns rows ends[e-1]:ends[e], ends (E,) int32 -> (N, hidden)."""
        return self.compute(self, x, ends)


def each_expert(experts: Experts, x: Tensor, ends: Tensor) -> Tensor:
    """One expert after the other."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    # In training the idle ones too: their gradient is then zero, not None, and all processes of a run have gradients
    # of the same parameters to exchange.
    idle_too = torch.is_grad_enabled()
    rows_of = zip(experts, x.split(sizes), strict=True)
    return torch.cat([expert(rows) for expert, rows in rows_of if idle_too or len(rows)])


class Routing(NamedTuple):
    """What a MoE layer tells of its router."""

    aux_loss: Tensor  # () load-balancing loss; 1.0 = balanced
    load: Tensor  # (E,) share of the tokens' choices that each expert got


class MoEFeedForward(nn.Module):
    """Sparse feed-forward: each token goes through its k best experts, and through the shared ones if there are any.

    The load-balancing loss is that of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961).
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.k, self.num_experts = config.num_experts_per_tok, config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(FeedForward(config) for _ in range(config.num_experts))
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_shared_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(B, T, hidden) -> the same."""
        B, T, hidden = x.shape
        x = x.reshape(B * T, hidden)
        probs = self.gate(x).float().softmax(-1)  # (N, E)
        weights, chosen = probs.topk(self.k, dim=-1)  # (N, k)
        if self.norm_topk_prob:
            total = weights.sum(-1, keepdim=True)
            # With k = 1 the weight is w / w = 1 whatever the router says: constant, so no gradient would reach it.
            # Dividing by the detached value keeps the 1 and lets the gradient through.
            weights = weights / (total if self.k > 1 else total.detach())

        # Sort the N*k (token, expert) pairs by expert, so that each expert sees one contiguous block of rows.
        order = chosen.reshape(-1).argsort(stable=True)
        counts = F.one_hot(chosen.reshape(-1), self.num_experts).sum(0)  # (E,)
        ends = counts.cumsum(0).to(torch.int32)
        routed = self.experts(x.index_select(0, order // self.k), ends)  # (N*k, hidden)
        routed = routed[order.argsort()].view(B * T, self.k, hidden)
        y = (routed * weights.unsqueeze(-1).to(routed.dtype)).sum(1)
        for expert in self.shared_experts:
            y = y + expert(x)

        load = counts / counts.sum()
        aux_loss = self.num_experts * (load.detach() * probs.mean(0)).sum()
        return y.view(B, T, hidden), Routing(aux_loss, load)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoEFeedForward(config) if config.is_moe else FeedForward(config)
        self.is_moe = config.is_moe

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routing | None]:
        """(B, T, hidden) -> the same, and what the router did; None when dense."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        h = self.post_attention_layernorm(x)
        if self.is_moe:
            y, routing = self.mlp(h)
            return x + y, routing
        return x + self.mlp(h), None


def packed_causal_mask(segment_ids: Tensor) -> Tensor:
    """The causal mask of packed rows: a position sees itself and what came before it in its own segment.
    segment_ids (B, T) -> (B, 1, T, T) bool, True = may look."""
    T = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]  # (B, T, T)
    return (same & torch.ones(T, T, dtype=torch.bool, device=same.device).tril())[:, None]


class Decoder(nn.Module):
    """Embedding, blocks and final norm; the part Hugging Face calls `model`."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# ------------------------------------------------------------------------------------------------ the model


class ModelOutput(NamedTuple):
    """What a forward returns."""

    logits: Tensor  # (B, T, vocab), or (N, vocab) at the positions asked for
    aux_loss: Tensor | float = 0.0  # () router balance, already times its coefficient; 0 when dense
    expert_load: Tensor | None = None  # (layers, E) share of the tokens; None when dense

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What a training log should say of the router; {} when dense."""
        if self.expert_load is None:
            return {}
        return {"aux_loss": self.aux_loss.detach(), "expert_load": self.expert_load.mean(0)}


class MiniMindLM(nn.Module):
    """Decoder-only language model with tied input and output embeddings."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.packed_mask = packed_causal_mask  # another form of the same may take its place (trainer/speed.py)
        self.activation_checkpointing = False  # keep each block's input only, and compute the rest again in backward
        self.model = Decoder(config)
        self.set_rope()
        self.init_weights()

    def set_rope(self) -> None:
        """(Re)compute the rotary frequencies, also after `config.rope_scaling` was changed."""
        inv_freq, self.rope_factor = rope_frequencies(self.config)
        self.register_buffer("inv_freq", inv_freq.to(self.model.norm.weight.device), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """What .to() and .bfloat16() call. The frequencies stay fp32: in bf16, far angles are off by radians."""
        super()._apply(fn, recurse)
        self.set_rope()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices ~ N(0, 0.02^2); those that write into the residual stream are divided by sqrt(2 * layers), so that
        its variance does not grow with depth (Radford et al. 2019, GPT-2). Norm weights are 1."""
        std, depth = self.config.initializer_range, math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std / depth if into_residual else std)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        logits_at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Logits of the token that follows each position.

        input_ids: (B, T) int64. segment_ids: (B, T) int; a position attends only to earlier positions of its own
        segment (packed conversations). logits_at: (B, T) bool, where logits are wanted: all others are never computed.
        cache: what was computed before, which then says the positions.
        """
        x, routings = self.hidden_states(input_ids, segment_ids, logits_at, cache)
        logits = F.linear(x, self.model.embed_tokens.weight)
        if not self.config.is_moe:
            return ModelOutput(logits)
        aux_losses, loads = zip(*routings, strict=True)
        aux_loss = self.config.router_aux_loss_coef * torch.stack(aux_losses).mean()
        return ModelOutput(logits, aux_loss, torch.stack(loads))

    def hidden_states(
        self, input_ids: Tensor, segment_ids: Tensor | None, logits_at: Tensor | None, cache: Cache | None = None
    ) -> tuple[Tensor, list[Routing | None]]:
        """What the output layer reads, (B, T, hidden) or (N, hidden), and what the routers did."""
        B, T = input_ids.shape
        # Positions run on over the segments of a row: RoPE sees differences alone.
        positions = torch.arange(T, device=input_ids.device)[None]  # (1, T)
        mask = None  # plain causal
        if cache is not None:
            positions, mask = cache.positions, cache.mask
        elif segment_ids is not None:
            mask = self.packed_mask(segment_ids)
        angles = positions[..., None, None].float() * self.inv_freq  # (B or 1, T, 1, D/2)
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor

        x = self.model.embed_tokens(input_ids)  # (B, T, hidden)
        routings = []
        for i, block in enumerate(self.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x, routing = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x, routing = block(x, cos, sin, mask, None if cache is None else cache.layer(i))
            routings.append(routing)
        if logits_at is not None:
            x = x[logits_at]  # (N, hidden)
        return self.model.norm(x), routings

    @torch.inference_mode()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue input_ids (B, T): the likeliest token each time, or one drawn at `temperature`; (B, T + new), less
        if all rows end before. Each token computes everything again: inference/engine.py does the same with a cache."""
        for _ in range(max_new_tokens):
            logits = self(input_ids).logits[:, -1].float()  # (B, vocab)
            if temperature == 0:
                next_ids = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                next_ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            input_ids = torch.cat([input_ids, next_ids], dim=1)
            if (next_ids == self.config.eos_token_id).all():
                break
        return input_ids

    # -------------------------------------------------------------------------------------------- sizes

    def num_parameters(self, active: bool = False) -> int:
        """Parameters; with `active`, those that work on one token (k of the routed experts)."""
        total = sum(p.numel() for p in self.parameters())
        if not (active and self.config.is_moe):
            return total
        idle = 1 - self.config.num_experts_per_tok / self.config.num_experts
        routed = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters())
        return total - round(idle * routed)

    def flops_per_token(self, seq_len: int, attention: bool = True) -> int:
        """Training FLOPs (forward + backward) per token: 6 per active parameter (Kaplan et al. 2020, arXiv:2001.08361;
        the tied embedding works once, as the output layer) plus 12 * layers * heads * head_dim * seq_len / 2 for causal
        attention scores."""
        c = self.config
        scores = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len
        return 6 * self.num_parameters(active=True) + scores * attention


# ------------------------------------------------------------------------------------------------ LoRA


@dataclass(frozen=True)
class LoRAConfig:
    """Size of an adapter, and the linear layers that get one: those whose dotted name ends in one of `targets`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of the adapter's input, in training only
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")
        if not self.targets:
            raise ValueError("targets: name at least one layer, such as q_proj")

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class LoRALinear(nn.Linear):
    """A frozen linear layer with low-rank updates: y = W x + alpha / rank * B A dropout(x) (Hu et al. 2021,
    arXiv:2106.09685), A (rank, in), B (out, rank), both fp32.

    It takes the place of a linear layer and owns that layer's weight under the same name. It holds any number of
    adapters, as lora_A_<name> and lora_B_<name>, of which at most one is active."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.configs: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        self.register_buffer("unmerged", None, persistent=False)  # the untouched weight while an adapter is merged
        self.train(linear.training)

    @property
    def adapts(self) -> bool:
        """Whether the forward adds an update to what the weight gives."""
        return self.active is not None and self.unmerged is None

    def add(self, name: str, config: LoRAConfig, A: Tensor | None = None, B: Tensor | None = None) -> None:
        """A new adapter, which changes nothing until B is trained, or the one of these matrices."""
        device = self.weight.device
        if A is None:
            A = torch.empty(config.rank, self.in_features, device=device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if B is None:
            B = torch.zeros(self.out_features, config.rank, device=device)
        self.register_parameter(f"lora_A_{name}", nn.Parameter(A.to(device, torch.float32)))
        self.register_parameter(f"lora_B_{name}", nn.Parameter(B.to(device, torch.float32)))
        self.configs[name] = config

    def matrices(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return getattr(self, f"lora_A_{name}"), getattr(self, f"lora_B_{name}")

    def use(self, name: str | None) -> None:
        """Make this adapter the active and the only trainable one; without it, or with None, the base is alone."""
        self.unmerge()
        self.active = name if name in self.configs else None
        for key in self.configs:
            for p in self.matrices(key):
                p.requires_grad_(key == name)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.adapts:
            return y
        config, (A, B) = self.configs[self.active], self.matrices(self.active)
        low = F.linear(F.dropout(x.to(A.dtype), config.dropout, self.training), A)  # (..., rank)
        return (y + F.linear(low * config.scaling, B)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active adapter to the weight, which costs a copy of the weight to go back to."""
        if self.adapts:
            config, (A, B) = self.configs[self.active], self.matrices(self.active)
            self.unmerged = self.weight.detach().clone()
            self.weight.copy_(self.weight.float() + config.scaling * (B.float() @ A.float()))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if self.unmerged is not None:
            self.weight.copy_(self.unmerged)
            self.unmerged = None


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@contextmanager
def active_adapter(model: MiniMindLM, name: str | None) -> Iterator[None]:
    """This adapter works meanwhile; None: the one that does already, if any."""
    layers = list(lora_layers(model).values()) if name is not None else []
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = name if name in layer.configs else None
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def lora_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Linear]:
    """The layers that an adapter works on, by name. ValueError if one of its targets is the name of none."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    chosen = {target: [name for name in linears if f".{name}".endswith(f".{target}")] for target in config.targets}
    for target, names in chosen.items():
        if not names:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            raise ValueError(f"targets: no linear layer is called {target!r}; there are {known}")
    wanted = set().union(*chosen.values())
    return {name: layer for name, layer in linears.items() if name in wanted}


def add_lora(
    model: nn.Module, name: str, config: LoRAConfig | None = None, weights: dict[str, Tensor] | None = None
) -> None:
    """Give the model an adapter, a new one or that of `weights` ({layer}.lora_A and {layer}.lora_B for each layer).

    It becomes the active one, and all else is frozen. ValueError if name, targets or weights do not fit; the model is
    then as it was."""
    config = config or LoRAConfig()
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name {name!r}: use letters, digits, _ and -")
    if any(name in layer.configs for layer in lora_layers(model).values()):
        raise ValueError(f"name {name}: the model has that adapter already")
    targets = lora_targets(model, config)
    if weights is not None:
        shapes = {f"{key}.lora_A": [config.rank, layer.in_features] for key, layer in targets.items()}
        shapes |= {f"{key}.lora_B": [layer.out_features, config.rank] for key, layer in targets.items()}
        given = {key: list(w.shape) for key, w in weights.items()}
        for key in sorted(shapes.keys() | given.keys()):
            if given.get(key) != shapes.get(key):
                raise ValueError(f"{key} is {given.get(key, 'missing')}, it should be {shapes.get(key, 'absent')}")
    for key, layer in targets.items():
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            model.set_submodule(key, layer)
        A, B = (weights[f"{key}.lora_A"], weights[f"{key}.lora_B"]) if weights else (None, None)
        layer.add(name, config, A, B)
    set_adapter(model, name)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to another adapter, or with None to the base alone; what was merged is unmerged.

    Only the active adapter is trainable. ValueError if there is none of that name."""
    layers = lora_layers(model).values()
    known = sorted({key for layer in layers for key in layer.configs})
    if name is not None and name not in known:
        raise ValueError(f"there is no adapter {name}; the model has {', '.join(known) or 'none'}")
    model.requires_grad_(False)
    for layer in layers:
        layer.use(name)


def merge_lora(model: nn.Module) -> None:
    """Add the active adapter to the weights: nothing is left to compute for it. ValueError if none is active."""
    layers = lora_layers(model).values()
    if all(layer.active is None for layer in layers):
        raise ValueError("no adapter is active: there is nothing to merge")
    for layer in layers:
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Take the merged adapter out of the weights again, which are then as they were before, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights as they stand, without the adapters: a merged one is part of them."""
    return {k: w for k, w in model.state_dict().items() if ".lora_A_" not in k and ".lora_B_" not in k}
