"""Tokenizers of other people's kinds, small or from a package, and folders of models with them, for tests."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dataset.tokenizer import ChatTokenizer, load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "minimind_weights"
TEXTS = [
    "The capital of France is Paris.",
    "你好！很高兴见到你。",
    "7 + 15 = 22",
    "def add(a, b):\n    return a + b",
] * 3

CHATML = """{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- '# Tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'tool' %}{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
# As of MiniMind of February 2025: the question's turn opens the answer's.
S_TEMPLATE = """{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% for message in messages %}
{%- if message.role == 'user' %}{{ '<s>user\n' + message.content + '</s>\n<s>assistant\n' }}
{%- elif message.role == 'assistant' %}{{ message.content + '</s>\n' }}{% endif %}{% endfor %}"""
# Of its third generation: an open or an empty thinking block is part of every prompt.
V3_TEMPLATE = CHATML.replace(
    "{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}",
    "{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}",
).replace(
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "{{- '<think>\n' if open_thinking is defined and open_thinking else '<think>\n\n</think>\n\n' }}",
)
GENERATIONS = {  # special tokens, others that are added, template, and the parts of bos, eos, pad
    "v2a": (["<unk>", "<s>", "</s>"], [], S_TEMPLATE, ("<s>", "</s>", "<unk>")),
    "v2b": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [],
        CHATML,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ),
    "v3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|box_{i}|>" for i in range(18))],
        ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|buffer1|>"],
        V3_TEMPLATE,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ),
}


def minimind_tokenizer(generation: str, folder: Path, size: int = 600) -> ChatTokenizer:
    """A tokenizer as that generation's, but small, written to the folder."""
    special, added, template, (bos, eos, pad) = GENERATIONS[generation]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(text, normalized=False, special=True) for text in [*special, *added]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in special
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad}
    config |= {"chat_template": template, "clean_up_tokenization_spaces": False, "model_max_length": 32768}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def minimind_folder(generation: str, kind: str, folder: Path, weights: str = "pytorch_model.bin") -> Path:
    """A folder as MiniMind's own save_pretrained() writes it; kind: dense or moe."""
    import safetensors.torch

    fixture = FIXTURES / f"{generation}-{kind}"
    size = minimind_tokenizer(generation, folder).vocab_size
    tensors = _with_more_tokens(torch.load(fixture / "weights.pth", weights_only=True), size)
    config = json.loads((fixture / "config.json").read_text()) | {
        "vocab_size": size,
        "model_type": "minimind",
        "architectures": ["MiniMindLM" if generation == "v2a" else "MiniMindForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model_minimind.py").write_text("raise SystemExit('code of a folder was run')\n")
    if weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    else:
        safetensors.torch.save_file({name: w.clone() for name, w in tensors.items()}, folder / weights)
    return folder


def _with_more_tokens(tensors: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """The fixture has fewer tokens than there are bytes: more rows of the embedding, and of the output layer tied to
    it."""
    random = torch.Generator().manual_seed(0)
    tied = ("tok_embeddings.weight", "output.weight", "model.embed_tokens.weight", "lm_head.weight")
    table = next(tensors[name] for name in tied if name in tensors)
    new = torch.randn(size - len(table), table.shape[1], generator=random) * table.float().std()
    table = torch.cat([table, new.to(table.dtype)])
    return {name: table if name in tied else w for name, w in tensors.items()}


def sentencepiece_tokenizer(scheme: str, folder: Path) -> ChatTokenizer:
    """As Llama 2's and Mistral's: bytes for what is unknown, blanks as part of words; scheme: where a text gets one
    more before it, "first", "always" or (older files) "legacy"."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "legacy":
        blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(blanks)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(["Who are you? I am a kind model. And 2 + 2? 4."], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    template = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}), encoding="utf-8")
    return load_tokenizer(folder)
