"""GGUF files for llama.cpp and Ollama, written through the `gguf` package: weights, tokenizer and chat template.

    save_gguf("out/model.gguf", model, TOKENIZER_DIR, "q8_0")
    text = modelfile("model.gguf", model.config)            # for Ollama
    weights = read_gguf("out/model.gguf", model.config)     # dequantised, by our names

llama.cpp's `llama` rotates adjacent pairs of channels, its `qwen3` and `qwen3moe` the halves, as we do: only for the
first are the rows of q_proj and k_proj reordered.
"""

import json
import os
import re
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from dataset.chat import EOS, TOOLS_AFTER, TOOLS_BEFORE
from model.checkpoint import read_json
from model.formats import CheckpointError, half_rotation, hf_config, hf_state_dict, pair_rotation
from model.model import MiniMindConfig, MiniMindLM

# The regular expressions of tokenizer.json by the names llama.cpp has for them.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
        "qwen2",
}  # fmt: skip
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
    from gguf import GGUFReader, dequantize

    found = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in GGUFReader(path).tensors}
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
    path: str | Path, model: MiniMindLM, tokenizer_folder: str | Path, kind: str, name: str = "", thinks: bool = True
) -> None:
    """Write a GGUF file, the matrices as `kind` (f32, f16, bf16, q8_0), norms and routers in fp32.

    thinks: whether the model was trained to think; if not, the template leaves the switch out, as llama.cpp would
    otherwise open every answer with <think>.

    CheckpointError for what llama.cpp does not have, or if writing fails; a file that was there is then kept."""
    import gguf

    path, c, tokenizer_folder = Path(path), model.config, Path(tokenizer_folder)
    hf = hf_config(c)  # refuses what has no architecture there
    if c.is_moe and not c.norm_topk_prob:
        raise CheckpointError("llama.cpp always normalises the expert weights, this MoE does not (norm_topk_prob)")
    if (c.rope_scaling or {}).get("attention_factor") is not None:
        raise CheckpointError("GGUF has no place for YaRN's attention_factor: only its default can be written")
    if any(((c.rope_scaling or {}).get(name) or default) != default for name, default in _YARN_BETAS.items()):
        raise CheckpointError(
            "llama.cpp passes over YaRN's beta_fast and beta_slow: only their defaults, 32 and 1, can be exported"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(temporary, hf["model_type"].replace("_", ""))
        _write_shape(writer, c)
        writer.add_name(name or path.stem)
        writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"))
        _write_tokenizer(writer, tokenizer_folder, c, thinks)
        for key, w in _tensors(model).items():
            exact = w.ndim == 1 or "ffn_gate_inp" in key
            stored = "f32" if exact else "f16" if kind == "q8_0" and w.shape[-1] % 32 else kind  # q8_0: blocks of 32
            quant = gguf.GGMLQuantizationType[stored.upper()]
            writer.add_tensor(key, gguf.quantize(w.contiguous().numpy(), quant), raw_dtype=quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


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


def _write_tokenizer(writer, folder: Path, c: MiniMindConfig, thinks: bool) -> None:
    from gguf import TokenType

    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder} has no tokenizer.json: give a tokenizer folder")
    spec = read_json(folder / "tokenizer.json")
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [])
    pattern = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    if spec["model"]["type"] != "BPE" or pattern not in _SPLITS or spec.get("normalizer"):
        raise CheckpointError(
            f"{folder} splits text in a way that is not known here by one of llama.cpp's names: only tokenizers of "
            "train_tokenizer.py can be written to GGUF; llama.cpp's own convert_hf_to_gguf.py knows others"
        )
    tokens, kinds = [f"[PAD{i}]" for i in range(c.vocab_size)], [TokenType.UNUSED] * c.vocab_size
    for token, i in spec["model"]["vocab"].items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for added in spec["added_tokens"]:
        # A control token is hidden from what the engine prints; thinking and tool calls must be seen.
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_SPLITS[pattern])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.eos_token_id)
    writer.add_pad_token_id(c.pad_token_id)
    writer.add_add_bos_token(False)
    separate = folder / "chat_template.jinja"
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    template = separate.read_text(encoding="utf-8") if separate.exists() else template
    if template:
        writer.add_chat_template(template if thinks else "{%- set enable_thinking = none -%}\n" + template)


# ------------------------------------------------------------------------------------------------ llama.cpp


class LlamaCpp:
    """llama.cpp's own server in this process, on a free port of the loopback: `with LlamaCpp(path) as engine: ...`

    Of the wheel `xllamacpp` (ImportError where it is missing). CheckpointError if llama.cpp does not take the file.
    exact: keys, values and attention in fp32, which its default of fp16 would make the largest difference."""

    def __init__(self, path: str | Path, threads: int = 1, context: int = 1024, exact: bool = True):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity, params.warmup, params.ui = 0, False, False
        if exact:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise CheckpointError(f"llama.cpp does not take {path}: {error}") from None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *exception) -> None:
        del self.server  # which stops its threads

    def post(self, path: str, content: dict) -> dict:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text})["tokens"]

    def render(self, messages: list[dict], **options) -> str:
        return self.post("/apply-template", {"messages": messages} | options)["prompt"]

    def greedy(self, ids: list[int], max_new_tokens: int, top: int = 50) -> tuple[list[int], list[dict[int, float]]]:
        """The likeliest continuation, and for each of its tokens the log-probabilities of the `top` likeliest; none
        at all if the server left out some (it does for a token that ends within a character)."""
        answer = self.post("/completion", {
            "prompt": ids, "n_predict": max_new_tokens, "temperature": 0, "n_probs": top, "return_tokens": True,
            "cache_prompt": False,
        })  # fmt: skip
        tokens, given = answer["tokens"], answer["completion_probabilities"]
        probabilities = [{} for _ in tokens]
        if len(given) == len(tokens):
            probabilities = [{t["id"]: t["logprob"] for t in p["top_logprobs"]} for p in given]
        return tokens, probabilities


# ------------------------------------------------------------------------------------------------ Ollama

# Ollama renders prompts with Go templates, so this is chat_template.jinja once more. A trimmed newline ({{- or -}}) is
# written as {{ "\n" }} where the prompt needs it. <think>, </think> and the first <tool_call> are text and not strings:
# there Ollama looks for the marks by which it parses answers. That `if` must be the first with .ToolCalls, hence
# $message.ToolCalls before it.
_OLLAMA_TEMPLATE = """\
{{- if or .System .Tools }}{{ "<|im_start|>system\\n" }}{{ .System }}
{{- if .Tools }}{{ if .System }}{{ "\\n\\n" }}{{ end }}%s
{{- range $i, $tool := .Tools }}{{ if $i }}{{ "\\n" }}{{ end }}{{ $tool }}{{ end }}%s
{{- end }}{{ "<|im_end|>\\n" }}{{ end }}
{{- $before := "" }}
{{- range $i, $message := .Messages }}
{{- if and (eq $before "tool") (ne .Role "tool") }}{{ "<|im_end|>\\n" }}{{ end }}
{{- if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}
{{- else if eq .Role "assistant" }}{{ "<|im_start|>assistant\\n" }}%s{{ .Content }}
{{- if and .Content $message.ToolCalls }}{{ "\\n" }}{{ end }}
{{- if .ToolCalls }}<tool_call>
{{- range $j, $call := .ToolCalls }}{{ if $j }}{{ "\\n<tool_call>" }}{{ end }}
{{- "\\n" }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ "\\n</tool_call>" }}
{{- end }}{{ end }}{{ "<|im_end|>\\n" }}
{{- else if eq .Role "tool" }}{{ if ne $before "tool" }}{{ "<|im_start|>user" }}{{ end }}
{{- "\\n<tool_response>\\n" }}{{ .Content }}{{ "\\n</tool_response>" }}
{{- end }}{{ $before = .Role }}
{{- end }}{{ if eq $before "tool" }}{{ "<|im_end|>\\n" }}{{ end }}{{ "<|im_start|>assistant\\n" }}%s"""
_THOUGHT = """{{ if .Thinking }}<think>
{{ .Thinking }}
</think>

{{ end }}"""
_OPEN_THOUGHT = r"""
{{- if .IsThinkSet }}{{ if .Think }}{{ "<think>\n" }}{{ else }}{{ "<think>\n\n</think>\n\n" }}{{ end }}{{ end }}"""


def modelfile(gguf_name: str, config: MiniMindConfig, thinks: bool = True) -> str:
    """The text of an Ollama Modelfile for a GGUF file that lies beside it. thinks: as in save_gguf(); Ollama switches
    thinking on for each model whose template has it.

    Ollama itself was not run. The template was rendered by Go's text/template with what Ollama hands to it, and equals
    chat_template.jinja for system, several turns, thinking on and off, calls and results of tools, but for JSON: Ollama
    writes schemas and arguments without spaces. It also joins all system messages, and neighbours of one role."""
    before, after = (f"{{{{ {json.dumps(text)} }}}}" for text in (TOOLS_BEFORE, TOOLS_AFTER))
    thought, open_thought = (_THOUGHT, _OPEN_THOUGHT) if thinks else ("", "")
    context = min(config.max_position_embeddings, 2048)
    return (
        f"# ollama create minimind -f Modelfile && ollama run minimind\nFROM ./{gguf_name}\n"
        f'TEMPLATE """{_OLLAMA_TEMPLATE % (before, after, thought, open_thought)}"""\n'
        f"PARAMETER stop {EOS}\nPARAMETER num_ctx {context}\nPARAMETER temperature 0.7\nPARAMETER top_p 0.9\n"
    )
