"""GGUF files for llama.cpp and Ollama, written through the `gguf` package: weights, tokenizer and chat template.

save_gguf("out/model.gguf", model, tokenizer, "q8_0")
weights = read_gguf("out/model.gguf", model.config)     # dequantised, by our names

llama.cpp's `llama` rotates adjacent pairs of channels, its `qwen3` and `qwen3moe` the halves, as we do: only for the
first are the rows of q_proj and k_proj reordered.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from dataset.tokenizer import ChatTokenizer
from model.export.optional import need
from model.files import write_file
from model.formats import CheckpointError, half_rotation, hf_config, hf_state_dict, pair_rotation
from model.model import MiniMindConfig, MiniMindLM

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The splits of tokenizer.json by the names that llama.cpp has for them.
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SPLITS = {_QWEN2: "qwen2", _LLAMA3: "llama-bpe", "ByteLevel": "gpt-2", "Digits": "smollm"}
_NO_CHANGE = (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []})  # llama.cpp normalises nothing
_NAMES = [  # ours -> llama.cpp's; the experts of a layer are one tensor there
    (r"^model\.embed_tokens", "token_embd"),
    (r"^model\.norm", "output_norm"),
    (r"^model\.layers\.", "blk."),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"self_attn\.([qk])_norm", r"attn_\1_norm"),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"mlp\.gate\.", "ffn_gate_inp."),
    (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
    (r"mlp\.experts\.(gate|up|down)_proj", r"ffn_\1_exps"),
]
_YARN_BETAS = {"beta_fast": 32, "beta_slow": 1}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(.*)")


def _their_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _tensors(model: MiniMindLM) -> dict[str, Tensor]:
    """The weights by llama.cpp's names, fp32; experts stacked to (E, out, in)."""
    config, stacks, tensors = model.config, {}, {}
    for name, w in hf_state_dict(model).items():
        w = w.to("cpu", torch.float32)
        expert = _EXPERT.fullmatch(name)
        if expert:
            stacks.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = w
            continue
        if not config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            w = pair_rotation(w, config.head_dim)
        tensors[_their_name(name)] = w
    for name, stack in stacks.items():
        tensors[_their_name(name)] = torch.stack([stack[i] for i in range(config.num_experts)])
    return tensors


def read_gguf(path: str | Path, config: MiniMindConfig) -> dict[str, Tensor]:
    """The weights of a file of save_gguf(), dequantised to fp32, by our names."""
    gguf = need("gguf", "a GGUF file")
    stored = gguf.GGUFReader(path).tensors
    found = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in stored}
    with torch.device("meta"):
        names = list(MiniMindLM(config).state_dict())
    weights = {}
    for name in names:
        expert = _EXPERT.fullmatch(name)
        w = found[_their_name(f"{expert[1]}.{expert[3]}" if expert else name)]
        w = w[int(expert[2])] if expert else w
        if not config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            w = half_rotation(w, config.head_dim)
        weights[name] = w
    return weights


def save_gguf(
    path: str | Path, model: MiniMindLM, tokenizer: ChatTokenizer, kind: str, name: str = "", thinks: bool = True
) -> None:
    """Write a GGUF file, the matrices as `kind` (f32, f16, bf16, q8_0), norms and routers in fp32.

    thinks: whether the model was trained to think; if not, the template leaves the switch out, as llama.cpp would
    otherwise open every answer with <think>.

    CheckpointError for what llama.cpp does not have, or if writing fails; a file that was there is then kept.
    MissingPackage without gguf."""
    need("gguf", "a GGUF file")
    _refuse_what_is_not_there(model.config)
    path = Path(path)

    def write(file) -> None:  # gguf opens the file once more, by its name
        _write_gguf(file.name, model, tokenizer, kind, name or path.stem, thinks)

    write_file(path, write)


def _refuse_what_is_not_there(c: MiniMindConfig) -> None:
    """CheckpointError for a model that llama.cpp would compute in another way."""
    hf_config(c)
    if c.is_moe and not c.norm_topk_prob:
        raise CheckpointError("llama.cpp always normalises the expert weights, this MoE does not (norm_topk_prob)")
    yarn = c.rope_scaling or {}
    if yarn.get("attention_factor") is not None:
        raise CheckpointError("GGUF has no place for YaRN's attention_factor: only its default can be written")
    if any((yarn.get(name) or default) != default for name, default in _YARN_BETAS.items()):
        raise CheckpointError(
            "llama.cpp passes over YaRN's beta_fast and beta_slow: only their defaults, 32 and 1, can be exported"
        )


def _write_gguf(path: str, model: MiniMindLM, tokenizer: ChatTokenizer, kind: str, name: str, thinks: bool) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, hf_config(model.config)["model_type"].replace("_", ""))
    _write_shape(writer, model.config)
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"))
    _write_tokenizer(writer, tokenizer, model.config, thinks)
    for key, w in _tensors(model).items():
        exact = w.ndim == 1 or "ffn_gate_inp" in key
        stored = "f32" if exact else "f16" if kind == "q8_0" and w.shape[-1] % 32 else kind  # q8_0: blocks of 32
        quant = gguf.GGMLQuantizationType[stored.upper()]
        writer.add_tensor(key, gguf.quantize(w.contiguous().numpy(), quant), raw_dtype=quant)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _write_shape(writer, c: MiniMindConfig) -> None:
    import gguf

    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    if c.is_moe:
        writer.add_expert_count(c.num_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_feed_forward_length(c.intermediate_size)
    if c.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(c.rope_scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(c.rope_scaling["original_max_position_embeddings"])


def _write_tokenizer(writer, tokenizer: ChatTokenizer, c: MiniMindConfig, thinks: bool) -> None:
    spec = json.loads(tokenizer.files["tokenizer.json"])
    tokens, kinds = _vocabulary(spec, c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_of_split(spec, tokenizer.source))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.eos_token_id)
    writer.add_pad_token_id(c.pad_token_id)
    writer.add_add_bos_token(False)
    if template := tokenizer.template_text:
        writer.add_chat_template(template if thinks else "{%- set enable_thinking = none -%}\n" + template)


def _name_of_split(spec: dict, source: str) -> str:
    """llama.cpp's name for the way in which a tokenizer.json splits text; CheckpointError if it has none."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    pattern = next((step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"), None)
    if kinds[-1:] == ["ByteLevel"] and steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] or kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            pattern = kinds[0]
    if spec["model"]["type"] != "BPE" or pattern not in _SPLITS or spec.get("normalizer") not in _NO_CHANGE:
        raise CheckpointError(
            f"{source} splits text in a way that is not known here by one of llama.cpp's names: convert the Hugging "
            "Face folder with llama.cpp's own convert_hf_to_gguf.py, which knows others"
        )
    return _SPLITS[pattern]


def _vocabulary(spec: dict, size: int) -> tuple[list[str], list[int]]:
    """The token of each id and its kind; ids that the tokenizer does not use are there too."""
    from gguf import TokenType

    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, i in spec["model"]["vocab"].items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for added in spec["added_tokens"]:
        # A control token is hidden from what the engine prints; thinking and tool calls must be seen.
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    return tokens, kinds
