"""Other people's names for the same model: MiniMind's three published generations, and Hugging Face's configurations.

Pure translation between dictionaries; reading and writing files is checkpoint.py's.
"""

import re
import sys
from typing import Any

import torch
from torch import Tensor

from model.model import MiniMindConfig, MiniMindLM, base_state_dict


class CheckpointError(Exception):
    """Weights that cannot be read or written; the text is one line that says why and what to do."""


class OtherArchitecture(CheckpointError):
    """A Hugging Face model that ours cannot compute."""


def _first(values: dict, names: tuple[str, ...], default: Any) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), default)


def _without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise OtherArchitecture(
            "its output layer differs from its embedding; only models that tie the two can be loaded"
        )
    return {name: w for name, w in tensors.items() if name != "lm_head.weight"}


# ------------------------------------------------------------------------------------------------ MiniMind's own

_V2A_NAMES = [  # February 2025; the later ones carry Hugging Face's names
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^layers\.", "model.layers."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.feed_forward\.", ".mlp."),
    (r"\.shared_experts\.w", ".shared_experts.0.w"),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
]
_BUFFERS = ("freqs_cos", "freqs_sin", "pos_cis", "inv_freq")  # tables of rotary angles: computed by the model
_FIRST = "model.layers.0."


def from_minimind(content: Any, beside: dict) -> tuple[MiniMindConfig, dict[str, Tensor]]:
    """Configuration and renamed weights of a bare state dict of any of MiniMind's published generations.

    What names and shapes do not tell comes from `beside` (its config.json, in that generation's own words; may be
    empty), else it is what the published models have: 8 heads, and per token 2 experts (v2) or 1 (v3, with QK-norm)."""
    tensors, pairs = _with_our_names(content)
    config = _config_of(tensors, beside)
    if pairs:
        for name, w in tensors.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensors[name] = half_rotation(w, config.head_dim)
    return config, tensors


def _with_our_names(content: Any) -> tuple[dict[str, Tensor], bool]:
    """(the weights by our names, whether RoPE rotates neighbouring pairs of channels, as in February 2025)."""
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"not a MiniMind checkpoint: it holds a {type(content).__name__}, not named weights")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"not a MiniMind checkpoint: it is a dict of {', '.join(map(str, list(content)[:5]))}")
    tensors = {re.sub(r"^(_orig_mod\.|module\.)+", "", str(name)): w for name, w in content.items()}
    is_v2a = "tok_embeddings.weight" in tensors
    for pattern, name in _V2A_NAMES if is_v2a else []:
        tensors = {re.sub(pattern, name, old): w for old, w in tensors.items()}
    tensors = _without_head({name: w for name, w in tensors.items() if not name.endswith(_BUFFERS)})
    needed = ("model.embed_tokens", f"{_FIRST}self_attn.q_proj", f"{_FIRST}self_attn.k_proj")
    if not all(f"{name}.weight" in tensors for name in needed):
        names = ", ".join(list(map(str, content))[:3])
        raise CheckpointError(f"not a MiniMind checkpoint: it holds {len(content)} tensors such as {names}")
    return tensors, is_v2a


def _config_of(tensors: dict[str, Tensor], beside: dict) -> MiniMindConfig:
    """What the shapes of the weights tell of the model, and its config.json where they do not."""
    hidden_size = tensors["model.embed_tokens.weight"].shape[1]
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if re.match(r"model\.layers\.\d+\.", name))
    found = (_first(beside, ("hidden_size", "dim"), None), _first(beside, ("num_hidden_layers", "n_layers"), None))
    if beside and found != (hidden_size, layers):
        print("note: the config.json beside the weights is about another model, so it is not used", file=sys.stderr)
        beside = {}
    qk_norm = f"{_FIRST}self_attn.q_norm.weight" in tensors
    return MiniMindConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        vocab_size=len(tensors["model.embed_tokens.weight"]),
        max_position_embeddings=_first(beside, ("max_position_embeddings", "max_seq_len"), 32768),
        rms_norm_eps=_first(beside, ("rms_norm_eps", "norm_eps"), 1e-6 if qk_norm else 1e-5),
        rope_theta=_first(beside, ("rope_theta",), 1e6),
        rope_scaling=_yarn(beside.get("rope_scaling"), beside) if beside.get("inference_rope_scaling") else None,
        qk_norm=qk_norm,
        **_heads(tensors, beside),
        **_experts(tensors, beside, 1 if qk_norm else 2),
    )


def _heads(tensors: dict[str, Tensor], beside: dict) -> dict[str, int]:
    """The heads, of which only a norm over their channels tells how large they are."""
    q, k = (tensors[f"{_FIRST}self_attn.{name}_proj.weight"] for name in "qk")
    q_norm = tensors.get(f"{_FIRST}self_attn.q_norm.weight")
    heads = _first(beside, ("num_attention_heads", "n_heads"), 8 if q_norm is None else len(q) // len(q_norm))
    head_dim = len(q) // heads if q_norm is None else len(q_norm)
    if head_dim == 0 or heads * head_dim != len(q) or len(k) % head_dim:
        raise CheckpointError(
            f"q_proj has {len(q)} rows and k_proj {len(k)}, which does not fit {heads} heads: "
            "put the config.json that names num_attention_heads beside it"
        )
    return {"num_attention_heads": heads, "num_key_value_heads": len(k) // head_dim, "head_dim": head_dim}


def _experts(tensors: dict[str, Tensor], beside: dict, per_token: int) -> dict[str, Any]:
    router = tensors.get(f"{_FIRST}mlp.gate.weight")
    gate = tensors.get(_FIRST + ("mlp.gate_proj.weight" if router is None else "mlp.experts.0.gate_proj.weight"))
    if gate is None:
        raise CheckpointError("not a MiniMind checkpoint: its first layer has no feed-forward weights")
    shared = [name for name in tensors if re.match(r"model\.layers\.0\.mlp\.shared_experts\.\d+\.gate_proj", name)]
    return {
        "intermediate_size": len(gate),
        "num_experts": 0 if router is None else len(router),
        "num_experts_per_tok": _first(beside, ("num_experts_per_tok",), per_token),
        "num_shared_experts": len(shared),
        "norm_topk_prob": _first(beside, ("norm_topk_prob",), True),
    }


def half_rotation(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's rows, so that rotating the pairs (i, i + D/2) does what rotating (2i, 2i + 1) did before."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)  # (H, 2, D/2, in)


def pair_rotation(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of half_rotation(): each head's rows as a model that rotates the pairs (2i, 2i + 1) has them."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)  # (H, D/2, 2, in)


# ------------------------------------------------------------------------------------------------ Hugging Face

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
_ONLY = {  # what a configuration may say, if it says anything
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def from_hf(tensors: dict[str, Tensor], hf: dict) -> tuple[MiniMindConfig, dict[str, Tensor]]:
    """Configuration and weights of a Hugging Face Llama, Qwen3 or Qwen3-MoE; `hf` is its config.json."""
    architecture = _architecture(hf)
    if not hf.get("tie_word_embeddings") and "lm_head.weight" not in tensors:
        raise CheckpointError("config.json does not tie output layer and embedding, and there is no lm_head.weight")
    is_moe, is_llama = architecture == "Qwen3MoeForCausalLM", architecture == "LlamaForCausalLM"
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    needed += ["moe_intermediate_size", "num_experts_per_tok"] if is_moe else []
    for name in needed:
        if not isinstance(hf.get(name), int):
            raise CheckpointError(f"config.json has no {name}")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5, and before
    eos = _first(hf, ("eos_token_id",), 2)
    eos = eos[0] if isinstance(eos, list) else eos
    experts = {
        "num_experts": _first(hf, ("num_experts", "num_local_experts"), 128),
        "num_experts_per_tok": hf.get("num_experts_per_tok"),
        "norm_topk_prob": _first(hf, ("norm_topk_prob",), False),
    }
    config = MiniMindConfig(
        hidden_size=hf["hidden_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=hf["num_attention_heads"],
        num_key_value_heads=_first(hf, ("num_key_value_heads", "num_attention_heads"), None),
        intermediate_size=hf["moe_intermediate_size" if is_moe else "intermediate_size"],
        head_dim=_first(hf, ("head_dim",), 128 if architecture == "Qwen3ForCausalLM" else None),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=_first(hf, ("max_position_embeddings",), 2048 if is_llama else 32768),
        rms_norm_eps=_first(hf, ("rms_norm_eps",), 1e-6),
        rope_theta=float(_first(rope | hf, ("rope_theta",), 10000.0)),
        rope_scaling=_yarn(rope, hf),
        qk_norm=not is_llama,
        router_aux_loss_coef=_first(hf, ("router_aux_loss_coef",), 0.001),
        initializer_range=_first(hf, ("initializer_range",), 0.02),
        bos_token_id=_first(hf, ("bos_token_id",), eos),
        eos_token_id=eos,
        pad_token_id=_first(hf, ("pad_token_id",), eos),
        **(experts if is_moe else {"num_experts_per_tok": 1}),
    )
    return config, _without_head({name: w for name, w in tensors.items() if not name.endswith(_BUFFERS)})


def _architecture(hf: dict) -> str:
    """The architecture that a config.json names; CheckpointError if it is none of ours, or says more than ours do."""
    kind = hf.get("model_type")
    architecture = (hf.get("architectures") or [_ARCHITECTURES.get(kind)])[0]
    if architecture not in _ARCHITECTURES.values():
        raise OtherArchitecture(
            f"it is a {architecture or kind}; only {', '.join(_ARCHITECTURES.values())} can be loaded"
        )
    for name, only in _ONLY.items():
        if hf.get(name) not in (None, only):
            raise OtherArchitecture(f"config.json has {name} = {hf[name]!r}; only {only!r} can be loaded")
    if any(layer != "full_attention" for layer in hf.get("layer_types") or []):
        raise OtherArchitecture("config.json has layer_types other than full_attention; only that can be loaded")
    return architecture


def _yarn(rope: dict | None, hf: dict) -> dict | None:
    """Our rope_scaling from theirs: None, or a dict of what YaRN needs."""
    rope = rope or {}
    kind = _first(rope, ("rope_type", "type"), "default")
    if kind == "default":
        return None
    if kind != "yarn" or rope.get("truncate") is False or rope.get("mscale") or not rope.get("factor"):
        raise OtherArchitecture(f"config.json scales RoPE by {rope}; only plain 'yarn' with a factor can be loaded")
    context = ("original_max_position_embeddings", "max_position_embeddings")
    scaling = {"rope_type": "yarn", "factor": float(rope["factor"]), context[0]: _first(hf | rope, context, 2048)}
    names = ("beta_fast", "beta_slow", "attention_factor")
    return scaling | {name: rope[name] for name in names if rope.get(name) is not None}


def hf_config(config: MiniMindConfig) -> dict:
    """The config.json of the same model for transformers, vLLM and llama.cpp.

    CheckpointError for a MoE with shared experts or without QK-norm, which no architecture there has."""
    c = config
    if c.is_moe and c.num_shared_experts:
        raise CheckpointError("a MoE with shared experts has no Hugging Face architecture: use the preset v3-moe")
    if c.is_moe and not c.qk_norm:
        raise CheckpointError("a MoE without QK-norm has no Hugging Face architecture: use the preset v3-moe")
    kind = "qwen3_moe" if c.is_moe else "qwen3" if c.qk_norm else "llama"
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    others = ("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "initializer_range")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    values = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind}
    values |= {name: getattr(c, name) for name in shape + others + tokens}
    values |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True}
    # The names from before transformers 5, which all of its versions and the other engines read.
    values |= {"rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling, "use_cache": True}
    if kind == "llama":
        values |= {"mlp_bias": False}
    if kind == "qwen3_moe":
        names = ("num_experts", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef")
        values |= {name: getattr(c, name) for name in names}
        values |= {"moe_intermediate_size": c.intermediate_size, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return values


def hf_state_dict(model: MiniMindLM) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, which are ours; the tied output layer has no entry."""
    hf_config(model.config)  # refuses what has no counterpart
    return {name.replace("_orig_mod.", ""): w.detach().contiguous() for name, w in base_state_dict(model).items()}
