"""LoRA adapters as folders of peft, written and read.

save_peft("FOLDER", model, "medical"); load_peft("FOLDER", model, "medical")     # adapter_model.safetensors
"""

from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from model.adapters import adapter_matrices, fingerprint
from model.files import read_file, read_json, read_safetensors, to_json, write_bytes
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
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} is a {config.get('peft_type')} adapter; only LORA can be loaded")
    extras = [f"{key} {config[key]!r}" for key in _EXTRAS if config.get(key)]
    if config.get("bias", "none") != "none":
        extras.append(f"bias {config['bias']!r}")
    if extras:
        raise CheckpointError(f"{folder}: adapter_config.json has {', '.join(extras)}; only plain LoRA can be loaded")
    tensors, base = _read_matrices(folder)
    if base not in (None, fingerprint(model)):
        raise CheckpointError(f"{folder} was trained on other weights than the model: give those, or train it again")
    try:
        lora = LoRAConfig(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
        add_lora(model, name, _with_targets(lora, model, tensors), tensors)
    except KeyError as error:
        raise CheckpointError(f"{folder}: adapter_config.json has no {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _read_matrices(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The matrices by our names, and the fingerprint of their base if the file has one. peft wrote .bin files first."""
    path, base = folder / "adapter_model.safetensors", None
    if path.exists():
        tensors = read_safetensors(path)
        with safetensors.safe_open(path, "pt") as file:
            base = (file.metadata() or {}).get("base")
    else:
        path = folder / "adapter_model.bin"
        if not path.exists():
            raise CheckpointError(f"{folder} has no adapter_model.safetensors: copy or download the folder again")
        tensors = read_file(path)
        if not isinstance(tensors, dict) or not all(isinstance(w, Tensor) for w in tensors.values()):
            raise CheckpointError(f"{path} is not the matrices of an adapter: copy or download the folder again")
    return {name.removeprefix(_PREFIX).removesuffix(".weight"): w for name, w in tensors.items()}, base


def _with_targets(lora: LoRAConfig, model: MiniMindLM, tensors: dict[str, Tensor]) -> LoRAConfig:
    """The layers that have matrices, by their last names if these name no others."""
    layers = {key.rpartition(".lora_")[0] for key in tensors}
    lasts = replace(lora, targets=tuple(sorted({key.rpartition(".")[2] for key in layers})))
    return lasts if set(lora_targets(model, lasts)) == layers else replace(lora, targets=tuple(sorted(layers)))
