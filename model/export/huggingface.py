"""Writes a Hugging Face folder: a stock Llama, Qwen3 or Qwen3-MoE that transformers, vLLM and SGLang load.

save_hf("out/hf", model, TOKENIZER_DIR)     # read back by checkpoint.load("out/hf")
"""

from pathlib import Path

import safetensors.torch
import torch

from model.checkpoint import to_json, write_bytes
from model.formats import CheckpointError, hf_config, hf_state_dict
from model.model import MiniMindLM

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def save_hf(
    folder: str | Path, model: MiniMindLM, tokenizer_folder: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load without code of ours.

    CheckpointError if the model has no counterpart there (hf_config), or if writing fails."""
    folder, tokenizer_folder, c = Path(folder), Path(tokenizer_folder), model.config
    config = hf_config(c) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    tokens = {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id}
    weights = {name: w.to("cpu", dtype) for name, w in hf_state_dict(model).items()}
    for name in _TOKENIZER_FILES:
        if (tokenizer_folder / name).exists():
            write_bytes(folder / name, (tokenizer_folder / name).read_bytes())
        elif name == "tokenizer.json":
            raise CheckpointError(f"{tokenizer_folder} has no tokenizer.json: give a tokenizer folder")
    write_bytes(folder / "generation_config.json", to_json(tokens))
    write_bytes(folder / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    write_bytes(folder / "config.json", to_json(config))
