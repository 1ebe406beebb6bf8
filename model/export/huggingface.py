"""Writes a Hugging Face folder: a stock Llama, Qwen3 or Qwen3-MoE that transformers, vLLM and SGLang load.

save_hf("out/hf", model, tokenizer)     # read back by checkpoint.load("out/hf")
"""

import json
from pathlib import Path

import safetensors.torch
import torch

from dataset.tokenizer import ChatTokenizer
from model.files import to_json, write_bytes
from model.formats import hf_config, hf_state_dict
from model.model import MiniMindLM


def save_hf(
    folder: str | Path,
    model: MiniMindLM,
    tokenizer: ChatTokenizer,
    dtype: torch.dtype = torch.bfloat16,
    trained_len: int | None = None,
) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load without code of ours. trained_len: for how many
    tokens the model was trained, which tokenizer_config.json then says.

    CheckpointError if the model has no counterpart there (hf_config), or if writing fails."""
    folder, c = Path(folder), model.config
    config = hf_config(c) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    stops = sorted({c.eos_token_id, *tokenizer.stop_ids}) if not tokenizer.is_ours else c.eos_token_id
    tokens = {"bos_token_id": c.bos_token_id, "eos_token_id": stops, "pad_token_id": c.pad_token_id}
    weights = {name: w.to("cpu", dtype) for name, w in hf_state_dict(model).items()}
    files = dict(tokenizer.chat_files)
    if trained_len:
        settings = json.loads(files.get("tokenizer_config.json", "{}")) | {"model_max_length": trained_len}
        files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    for name, text in files.items():
        write_bytes(folder / name, text.encode())
    write_bytes(folder / "generation_config.json", to_json(tokens))
    write_bytes(folder / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    write_bytes(folder / "config.json", to_json(config))
