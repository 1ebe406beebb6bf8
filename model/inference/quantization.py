"""Weight-only quantisation: matrices of 16, 8 or 4 bits, which every forward widens, and cpu_step in registers.

quantize(model, "int8")   # in place; for inference only

bf16: rounded. int8: symmetric, one scale a row. int4: symmetric, one scale for 32 weights, which is the one of a few
that gives the smallest squared error; the embedding, which is the output layer too, is int8 then, as it costs the most
quality. Norms and the routers of MoE stay as they are.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model.model import MiniMindLM, MoEFeedForward

GROUP = 32  # weights of one int4 scale
CLIPS = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75]  # scales tried: shares of what the largest weight of a group needs


class BF16(nn.Module):
    def forward(self, data: Tensor) -> Tensor:
        return data.float()

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (weight.bfloat16(),)  # a tuple: one tensor may not change its dtype


class Int8(nn.Module):
    def forward(self, data: Tensor, scale: Tensor) -> Tensor:
        return data.float() * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) -> (N, K) int8, (N, 1) fp32."""
        weight = weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (weight / scale).round().to(torch.int8), scale


class Int4(nn.Module):
    """Two weights in a byte: columns c and c + 8 of every 16, each plus 8."""

    def forward(self, data: Tensor, scale: Tensor) -> Tensor:
        pairs = data.unflatten(1, (-1, 8))  # (N, K / 16, 8)
        q = torch.cat([pairs & 15, pairs >> 4], dim=-1).flatten(1).float() - 8
        return (q.unflatten(1, (-1, GROUP)) * scale[..., None]).flatten(1)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) -> (N, K / 2) uint8, (N, K / 32) fp32."""
        groups = weight.float().unflatten(1, (-1, GROUP))  # (N, K / 32, 32)
        # The weight that is largest in size gets -8, so that all 16 values are in use (as llama.cpp's Q4_0 does).
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        tried = [largest / -8 * clip for clip in CLIPS]
        tried = [torch.where(scale == 0, 1.0, scale) for scale in tried]
        errors = torch.stack([((groups / s).round().clamp(-8, 7) * s - groups).square().sum(2) for s in tried])
        scale = torch.stack(tried).gather(0, errors.argmin(0)[None, ..., None])[0]  # (N, K / 32, 1)
        q = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1).unflatten(1, (-1, 2, 8))
        return (q[:, :, 0] | q[:, :, 1] << 4).flatten(1), scale[..., 0]


FORMATS = {"bf16": BF16, "int8": Int8, "int4": Int4}


def quantize(model: MiniMindLM, kind: str) -> MiniMindLM:
    """Pack the model's matrices, in place: kind "bf16", "int8" or "int4". The arithmetic is fp32 from then on, in
    cpu_step.py perhaps less.

    ValueError for another kind, or if the model is quantised already."""
    if kind not in FORMATS:
        raise ValueError(f"quantize {kind}: there are {', '.join(FORMATS)}")
    if any(parametrize.is_parametrized(layer) for layer in model.modules()):
        raise ValueError("the model is quantised already")
    model.float().requires_grad_(False).eval()
    routers = {layer.gate for layer in model.modules() if isinstance(layer, MoEFeedForward)}
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear | nn.Embedding) and layer not in routers:
            coarse = kind == "int4" and (isinstance(layer, nn.Embedding) or layer.weight.shape[1] % GROUP)
            format = Int8() if coarse else FORMATS[kind]()
            parametrize.register_parametrization(layer, "weight", format, unsafe=True)
    return model


def quantized_kind(model: MiniMindLM) -> str | None:
    """What quantize() made of the model, by its first attention matrix; None: nothing."""
    kind = packed(model.model.layers[0].self_attn.q_proj)[0]
    return None if kind == "plain" else kind


def packed(layer: nn.Module) -> tuple[str, Tensor, Tensor | None]:
    """A matrix as it lies in memory: "plain" or its format, the data, the scales if it has some."""
    if not parametrize.is_parametrized(layer):
        return "plain", layer.weight, None
    stored = layer.parametrizations.weight
    kind = next(kind for kind, format in FORMATS.items() if isinstance(stored[0], format))
    return kind, stored.original0, getattr(stored, "original1", None)


def weight_bytes(model: MiniMindLM) -> int:
    """What one token reads of the weights: all of them, once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
