"""LoRA adapters on disk: our own file, which knows the weights it belongs to. The folders of peft are export/peft.py.

add_lora(model, "medical", LoRAConfig(rank=8)); ...; save_adapter("out/lora/medical_256.pth", model, "medical")
load_adapter("out/lora/medical_256.pth", model, "medical")
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dataset.tokenizer import ChatTokenizer
from model.checkpoint import checkpoint_path, is_ours, run_arguments
from model.files import check_plain, read_file, write_file
from model.formats import CheckpointError
from model.model import LoRAConfig, MiniMindConfig, MiniMindLM, add_lora, base_state_dict, lora_layers


def adapter_path(out_dir: str | Path, name: str, config: MiniMindConfig) -> Path:
    """out_dir/lora/<name>_<hidden>[_moe].pth"""
    return checkpoint_path(Path(out_dir) / "lora", name, config)


def fingerprint(model: MiniMindLM) -> str:
    """SHA-256 of the names, shapes and values of the weights under the adapters, also of merged ones.

    Of the values rounded to bf16: an adapter fits the copy of its base that was exported in bf16 as well."""
    weights = base_state_dict(model)
    for name, layer in lora_layers(model).items():
        if layer.unmerged is not None:
            weights[f"{name}.weight"] = layer.unmerged
    digest = hashlib.sha256()
    for name, w in sorted(weights.items()):
        digest.update(f"{name} {list(w.shape)} ".encode())
        digest.update(w.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def adapter_matrices(model: MiniMindLM, name: str) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """An adapter's configuration, and its {layer}.lora_A and {layer}.lora_B in fp32 on the CPU."""
    layers = {key: layer for key, layer in lora_layers(model).items() if name in layer.configs}
    if not layers:
        raise ValueError(f"the model has no adapter {name}")
    tensors = {}
    for key, layer in layers.items():
        tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"] = layer.matrices(name)
    config = next(iter(layers.values())).configs[name]
    return config, {key: p.detach().to("cpu", torch.float32).contiguous() for key, p in tensors.items()}


def save_adapter(
    path: str | Path, model: MiniMindLM, name: str, meta: dict | None = None, tokenizer: ChatTokenizer | None = None
) -> None:
    """Write the adapter alone: {"lora": rank, alpha, ..., "base": fingerprint, "config": shape of the base, "model",
    "meta", "tokenizer": its hash}.

    CheckpointError if it fails; what was there before is then untouched. ValueError if there is no such adapter."""
    meta = meta or {}
    check_plain(meta, "meta")
    config, tensors = adapter_matrices(model, name)
    lora = asdict(config) | {"targets": list(config.targets)}
    content = {"config": model.config.to_dict(), "lora": lora, "base": fingerprint(model)}
    content |= {"model": tensors, "meta": meta} | ({"tokenizer": tokenizer.hash} if tokenizer else {})
    write_file(Path(path), lambda file: torch.save(content, file))


def load_adapter(
    path: str | Path,
    model: MiniMindLM,
    name: str,
    base: str | Path = "the model",
    tokenizer: ChatTokenizer | None = None,
) -> dict:
    """Add the adapter of a file of save_adapter() to the model and make it the active one; returns its meta.

    `base` is what messages call the model; `tokenizer` the one that it is used with. CheckpointError if the file is
    missing, damaged or something else, or was trained on other weights or with another tokenizer; the model is then as
    it was."""
    path = Path(path)
    content = read_file(path)
    if not is_ours(content) or not isinstance(content.get("lora"), dict):
        raise CheckpointError(f"{path} is not a LoRA adapter: give a file that train_lora.py wrote")
    meta = content.get("meta", {})
    if content.get("base") != fingerprint(model):
        has = model.config.to_dict()
        other = [f"{key} {value}" for key, value in content["config"].items() if has.get(key) != value]
        trained_on = run_arguments(meta).get("from_weight")
        raise CheckpointError(
            f"{path} was trained on other weights"
            + (f" ({trained_on})" if trained_on else "")
            + (f" with {', '.join(other)}" if other else "")
            + f" than {base}: give those, or train it again"
        )
    if tokenizer and content.get("tokenizer") not in (None, tokenizer.hash):
        raise CheckpointError(
            f"{path} was trained with another tokenizer ({content['tokenizer'][:8]}) than {tokenizer.source} "
            f"({tokenizer.hash[:8]}): give that one, or train it again"
        )
    lora = content["lora"]
    try:
        config = LoRAConfig(**lora | {"targets": tuple(lora.get("targets", ()))})
        add_lora(model, name, config, content["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return meta
