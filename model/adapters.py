"""LoRA adapters on disk: our own file, which knows the weights it belongs to, and the folders of peft.

add_lora(model, "medical", LoRAConfig(rank=8)); ...; save_adapter("out/lora/medical_256.pth", model, "medical")
load_adapter("out/lora/medical_256.pth", model, "medical")
save_peft("FOLDER", model, "medical"); load_peft("FOLDER", model, "medical")     # adapter_model.safetensors
"""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import (
    check_plain,
    is_ours,
    read_file,
    read_json,
    read_safetensors,
    to_json,
    write_bytes,
    write_file,
)
from model.formats import CheckpointError
from model.model import LoRAConfig, MiniMindLM, add_lora, base_state_dict, lora_layers, lora_targets

_PREFIX = "base_model.model."  # of peft's names
# What a peft configuration may add to plain LoRA; none of it is read here.
_EXTRAS = (
    "use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication",
)  # fmt: skip


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


def _matrices(model: MiniMindLM, name: str) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """An adapter's configuration, and its {layer}.lora_A and {layer}.lora_B in fp32 on the CPU."""
    layers = {key: layer for key, layer in lora_layers(model).items() if name in layer.configs}
    if not layers:
        raise ValueError(f"the model has no adapter {name}")
    tensors = {}
    for key, layer in layers.items():
        tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"] = layer.matrices(name)
    config = next(iter(layers.values())).configs[name]
    return config, {key: p.detach().to("cpu", torch.float32).contiguous() for key, p in tensors.items()}


def save_adapter(path: str | Path, model: MiniMindLM, name: str, meta: dict | None = None) -> None:
    """Write the adapter alone: {"lora": rank, alpha, ..., "base": fingerprint, "config": shape of the base, "model",
    "meta"}.

    CheckpointError if it fails; what was there before is then untouched. ValueError if there is no such adapter."""
    meta = meta or {}
    check_plain(meta, "meta")
    config, tensors = _matrices(model, name)
    lora = asdict(config) | {"targets": list(config.targets)}
    content = {"config": model.config.to_dict(), "lora": lora, "base": fingerprint(model)}
    content |= {"model": tensors, "meta": meta}
    write_file(Path(path), lambda file: torch.save(content, file))


def load_adapter(path: str | Path, model: MiniMindLM, name: str, base: str | Path = "the model") -> dict:
    """Add the adapter of a file of save_adapter() to the model and make it the active one; returns its meta.

    `base` is what messages call the model. CheckpointError if the file is missing, damaged or something else, or was
    trained on other weights; the model is then as it was."""
    path = Path(path)
    content = read_file(path)
    if not is_ours(content) or not isinstance(content.get("lora"), dict):
        raise CheckpointError(f"{path} is not a LoRA adapter: give a file that train_lora.py wrote")
    meta = content.get("meta", {})
    if content.get("base") != fingerprint(model):
        has = model.config.to_dict()
        other = [f"{key} {value}" for key, value in content["config"].items() if has.get(key) != value]
        trained_on = meta.get("finished", {}).get("from_weight")
        raise CheckpointError(
            f"{path} was trained on other weights"
            + (f" ({trained_on})" if trained_on else "")
            + (f" with {', '.join(other)}" if other else "")
            + f" than {base}: give those, or train it again"
        )
    lora = content["lora"]
    try:
        config = LoRAConfig(**lora | {"targets": tuple(lora.get("targets", ()))})
        add_lora(model, name, config, content["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return meta


def save_peft(folder: str | Path, model: MiniMindLM, name: str, base_name: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained on the exported base.

    `base_name`: the folder or hub name of the base. CheckpointError if writing fails."""
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    lora, tensors = _matrices(model, name)
    # Only of use in training, and peft refuses it on experts, which it has in one tensor.
    dropout = 0.0 if any(".experts." in key for key in tensors) else lora.dropout
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": dropout, "target_modules": list(lora.targets),
        "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
    tensors = {f"{_PREFIX}{key}.weight": w for key, w in tensors.items()}
    write_bytes(folder / "adapter_model.safetensors", to_bytes(tensors, {"format": "pt", "base": fingerprint(model)}))
    write_bytes(folder / "adapter_config.json", to_json(config))


def load_peft(folder: str | Path, model: MiniMindLM, name: str) -> None:
    """Add the adapter of a peft folder to the model and make it the active one.

    CheckpointError if the folder is missing or damaged, holds more than plain LoRA on linear layers of this model, or
    says (as those of save_peft do) that it was trained on other weights; the model is then as it was."""
    from safetensors import safe_open

    folder = Path(folder)
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} is a {config.get('peft_type')} adapter; only LORA can be loaded")
    extras = [f"{key} {config[key]!r}" for key in _EXTRAS if config.get(key)]
    extras += [f"bias {config['bias']!r}"] * (config.get("bias", "none") != "none")
    if extras:
        raise CheckpointError(f"{folder}: adapter_config.json has {', '.join(extras)}; only plain LoRA can be loaded")
    tensors = {k.removeprefix(_PREFIX).removesuffix(".weight"): w for k, w in read_safetensors(path).items()}
    with safe_open(path, "pt") as file:
        base = (file.metadata() or {}).get("base")
    if base not in (None, fingerprint(model)):
        raise CheckpointError(f"{folder} was trained on other weights than the model: give those, or train it again")
    try:
        lora = LoRAConfig(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
        add_lora(model, name, _with_targets(lora, model, tensors), tensors)
    except KeyError as error:
        raise CheckpointError(f"{folder}: adapter_config.json has no {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _with_targets(lora: LoRAConfig, model: MiniMindLM, tensors: dict[str, Tensor]) -> LoRAConfig:
    """The layers that have matrices, by their last names if these name no others."""
    layers = {key.rpartition(".lora_")[0] for key in tensors}
    lasts = replace(lora, targets=tuple(sorted({key.rpartition(".")[2] for key in layers})))
    return lasts if set(lora_targets(model, lasts)) == layers else replace(lora, targets=tuple(sorted(layers)))
