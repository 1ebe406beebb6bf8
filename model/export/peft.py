"""LoRA adapters as folders of peft, written and read.

save_peft("FOLDER", model, "medical"); load_peft("FOLDER", model, "medical")     # adapter_model.safetensors
"""

from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from model.adapters import adapter_matrices, fingerprint
from model.checkpoint import read_json, read_safetensors, to_json, write_bytes
from model.formats import CheckpointError
from model.model import LoRAConfig, MiniMindLM, add_lora, lora_targets

_PREFIX = "base_model.model."  # of peft's names
# What a peft configuration may add to plain LoRA; none of it is read here.
_EXTRAS = """use_dora use_rslora use_qalora lora_bias fan_in_fan_out rank_pattern alpha_pattern modules_to_save
target_parameters trainable_token_indices layer_replication""".split()


def save_peft(folder: str | Path, model: MiniMindLM, name: str, base_name: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained on the exported base.

    `base_name`: the folder or hub name of the base. CheckpointError if writing fails."""
    folder = Path(folder)
    lora, tensors = adapter_matrices(model, name)
    # Only of use in training, and peft refuses it on experts, which it has in one tensor.
    dropout = 0.0 if any(".experts." in key for key in tensors) else lora.dropout
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name}
    config |= {"inference_mode": True, "bias": "none", "fan_in_fan_out": False}
    config |= {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": dropout, "target_modules": list(lora.targets)}
    tensors = {f"{_PREFIX}{key}.weight": w for key, w in tensors.items()}
    write_bytes(
        folder / "adapter_model.safetensors",
        safetensors.torch.save(tensors, {"format": "pt", "base": fingerprint(model)}),
    )
    write_bytes(folder / "adapter_config.json", to_json(config))


def load_peft(folder: str | Path, model: MiniMindLM, name: str) -> None:
    """Add the adapter of a peft folder to the model and make it the active one.

    CheckpointError if the folder is missing or damaged, holds more than plain LoRA on linear layers of this model, or
    says (as those of save_peft do) that it was trained on other weights; the model is then as it was."""
    folder = Path(folder)
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} is a {config.get('peft_type')} adapter; only LORA can be loaded")
    extras = [f"{key} {config[key]!r}" for key in _EXTRAS if config.get(key)]
    extras += [f"bias {config['bias']!r}"] * (config.get("bias", "none") != "none")
    if extras:
        raise CheckpointError(f"{folder}: adapter_config.json has {', '.join(extras)}; only plain LoRA can be loaded")
    tensors = {k.removeprefix(_PREFIX).removesuffix(".weight"): w for k, w in read_safetensors(path).items()}
    with safetensors.safe_open(path, "pt") as file:
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
