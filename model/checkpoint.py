"""The one place that reads and writes weights: our .pth, MiniMind's published ones, Hugging Face folders, resume state.

    model, meta = checkpoint.load("out/pretrain_256.pth")     # or any published MiniMind .pth, or a Hugging Face folder
    checkpoint.save("out/pretrain_256.pth", model, {"note": "plain python values"})

A file is complete or absent: it is written beside its destination, synced and renamed. Everything is read with
`weights_only=True`: a file that would have to run code is refused.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.tokenizer import ChatTokenizer, load_tokenizer
from model.files import check_plain, missing, read_file, read_json, read_safetensors, write_file
from model.formats import CheckpointError, from_hf, from_minimind
from model.model import MiniMindConfig, MiniMindLM, base_state_dict

UNKNOWN_CONTEXT = 2048  # tokens of a model that does not say for how many it was trained, or for more
UNKNOWN = "unknown"  # as meta["tokenizer"]: weights of which nobody knows the tokenizer

# ------------------------------------------------------------------------------------------------ paths


def checkpoint_path(out_dir: str | Path, stage: str, config: MiniMindConfig) -> Path:
    """out/<stage>_<hidden>[_moe].pth"""
    return Path(out_dir) / f"{stage}_{config.hidden_size}{'_moe' if config.is_moe else ''}.pth"


def find_weights(
    out_dir: str | Path, name: str | Sequence[str], hidden_size: int | None = None, use_moe: bool | None = None
) -> Path:
    """The weights meant by `name`: a path, which is returned as it is; or a stage or several, whose weights lie in
    out_dir. hidden_size and use_moe narrow the choice; of what is left the newest is taken, with a note on stderr.

    CheckpointError if there is none."""
    names = [name] if isinstance(name, str) else list(name)
    if len(names) == 1 and (os.sep in names[0] or "/" in names[0] or names[0].endswith(".pth")):
        if not Path(names[0]).exists():
            raise missing(Path(names[0]))
        return Path(names[0])
    kind = {None: "(_moe)?", False: "", True: "_moe"}[use_moe]
    stages = "|".join(map(re.escape, names))
    pattern = re.compile(rf"({stages})_{hidden_size or '[0-9]+'}{kind}\.pth")
    found = [path for path in Path(out_dir).glob("*.pth") if pattern.fullmatch(path.name)]
    if not found and len(names) == 1 and Path(names[0]).exists():
        return Path(names[0])
    if not found:
        kind = "_moe" if use_moe else "[_moe]" if use_moe is None else ""
        wanted = [Path(out_dir) / f"{name}_{hidden_size or 'SIZE'}{kind}.pth" for name in names]
        raise missing(*wanted)
    found.sort(key=lambda path: path.stat().st_mtime)
    if len(found) > 1 and os.environ.get("RANK", "0") == "0":
        listed = ", ".join(path.name for path in found)
        note = f"note: {listed} in {out_dir}: taking the newest, {found[-1].name}; --hidden_size or a path chooses"
        print(note, file=sys.stderr)
    return found[-1]


def find_folder(places: Iterable[Path]) -> Path:
    """The one folder of weights that lies in these places. CheckpointError, which lists them, if it is not one."""
    found = {
        path.resolve(): path
        for place in places
        for path in sorted(place.glob("*/"))
        if (path / "config.json").exists() and (*path.glob("model*.safetensors*"), *path.glob("pytorch_model*"))
    }
    if not found:
        where = " or ".join(str(place) for place in places)
        raise CheckpointError(f"no folder with a config.json and weights lies in {where}: give its path with --model")
    if len(found) > 1:
        listed = ", ".join(map(str, found.values()))
        raise CheckpointError(f"there are {len(found)} folders of weights: {listed}: give one of them with --model")
    (folder,) = found.values()
    print(f"note: taking {folder}", file=sys.stderr)
    return folder


# ------------------------------------------------------------------------------------------------ save and load


def save(
    path: str | Path,
    model: MiniMindLM,
    meta: dict | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: ChatTokenizer | None = None,
) -> None:
    """Write {"config", "model", "meta"}, in fp32 or in `dtype`, and with "tokenizer" the files of the one that the
    weights belong to. meta: plain Python values. LoRA adapters are not written (adapters.py does), but for one that is
    merged: it is part of the weights.

    CheckpointError if it fails; what was there before is then untouched."""
    meta = meta or {}
    check_plain(meta, "meta")
    content = {"config": model.config.to_dict(), "model": _weights(model, dtype or torch.float32), "meta": meta}
    if tokenizer:
        content["tokenizer"] = {"hash": tokenizer.hash, "files": tokenizer.files}
    write_file(Path(path), lambda file: torch.save(content, file))


def _weights(model: MiniMindLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """Names and weights on the CPU; the output layer is the embedding and has no entry of its own."""
    weights = base_state_dict(model)
    return {name.replace("_orig_mod.", ""): w.detach().to("cpu", dtype).contiguous() for name, w in weights.items()}


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[MiniMindLM, dict]:
    """(model, meta): fp32, eval mode. `path` is a file of save(), a bare state dict as MiniMind publishes them, or a
    Hugging Face folder of a Llama, Qwen3 or Qwen3-MoE with tied embeddings. meta is {} where there is none.

    CheckpointError if the path is missing, damaged, would run code, or holds another kind of model."""
    path = Path(path)
    meta = {}
    try:
        if path.is_dir():
            config, tensors = _read_folder(path)
        else:
            content = read_file(path)
            if is_ours(content):
                if "lora" in content:
                    raise CheckpointError("it is a LoRA adapter: give the weights that it was trained on")
                config, tensors = MiniMindConfig.from_dict(content["config"]), content["model"]
                meta = content.get("meta", {})
            else:
                beside = path.parent / "config.json"
                config, tensors = from_minimind(content, read_json(beside) if beside.exists() else {})
        model = _build(config, tensors)
    except (CheckpointError, ValueError, TypeError) as error:
        text, kind = str(error), type(error) if isinstance(error, CheckpointError) else CheckpointError
        raise kind(text if text.startswith(str(path)) else f"{path}: {text}") from None
    return model.eval().to(device), meta


def load_meta(path: str | Path) -> dict:
    """The meta of a file of save() or of an adapter, without reading its weights; {} for any other kind of weights."""
    path = Path(path)
    if path.is_dir():
        return {}
    content = read_file(path, mmap=True)
    return content.get("meta", {}) if is_ours(content) else {}


def tokenizer_of(path: str | Path, folder: str | Path | None = None) -> ChatTokenizer:
    """The tokenizer that belongs to weights: the one in the .pth or its folder, or beside a published .pth; `folder`
    names it where they say nothing, and must be the same where they do.

    CheckpointError if none is known, TokenizerError if `folder` has another one."""
    path, given = Path(path), load_tokenizer(folder) if folder else None
    if (path / "config.json").exists():
        own = given if given and not (path / "tokenizer.json").exists() else load_tokenizer(path)
    else:
        own = _tokenizer_in(path) or given
    if own is None:
        raise CheckpointError(f"{path} does not say which tokenizer it belongs to: give its folder with --tokenizer")
    if given:
        own.require_same(given, str(path), "--tokenizer")
    return own


def _tokenizer_in(path: Path) -> ChatTokenizer | None:
    """What a .pth carries, or what lies beside one that carries none."""
    content = read_file(path, mmap=True)
    if is_ours(content):
        files = (content.get("tokenizer") or {}).get("files")
        if files:
            return ChatTokenizer(files, str(path))
        meta, size = content.get("meta") or {}, content["config"].get("vocab_size")
        shipped = load_tokenizer()
        if meta.get("tokenizer") != UNKNOWN and shipped.vocab_size == size:  # from before such files carried it
            if not meta and os.environ.get("RANK", "0") == "0":
                print(f"note: {path} does not say which tokenizer it needs: taking model/tokenizer", file=sys.stderr)
            return shipped
    return load_tokenizer(path.parent) if (path.parent / "tokenizer.json").exists() else None


def require_fit(tokenizer: ChatTokenizer, config: MiniMindConfig, path: str | Path) -> None:
    """CheckpointError if the tokenizer has ids for which the weights have no row."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {config.vocab_size} tokens, the tokenizer {tokenizer.source} {tokenizer.vocab_size}: they do "
            "not belong together; give the folder of its own with --tokenizer"
        )


def run_arguments(meta: dict) -> dict:
    """The arguments of the run that made the weights, from their meta; {} where it does not say."""
    return meta.get("arguments") or meta.get("finished") or {}  # the second is the older name


def context_of(meta: dict, tokenizer: ChatTokenizer) -> int | None:
    """For how many tokens weights were trained, from their meta, or as their folder says; None where nothing does."""
    trained = meta.get("context") or run_arguments(meta).get("max_seq_len")  # the second is of older files
    return trained or tokenizer.max_length and min(tokenizer.max_length, UNKNOWN_CONTEXT)


def is_ours(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        return False
    weights = content.get("model")
    return isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values())


def _build(config: MiniMindConfig, tensors: dict[str, Tensor]) -> MiniMindLM:
    """The model with these weights, never initialised at random: loading is quick and draws no random numbers."""
    with torch.device("meta"):
        model = MiniMindLM(config)
    wanted = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    given = {name: tuple(w.shape) for name, w in tensors.items()}
    if wanted != given:
        faults = [f"{name} is missing" for name in wanted if name not in given]
        faults += [f"{name} is unknown" for name in given if name not in wanted]
        faults += [
            f"{name} is {list(given[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if given.get(name, shape) != shape
        ]
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"the weights do not fit the configuration: {'; '.join(faults[:3])}{more}")
    model.load_state_dict({name: w.to(torch.float32) for name, w in tensors.items()}, assign=True)
    model.set_rope()
    return model


# ------------------------------------------------------------------------------------------------ Hugging Face folders


def _read_folder(folder: Path) -> tuple[MiniMindConfig, dict[str, Tensor]]:
    if not (folder / "config.json").exists():
        weights = ", ".join(path.name for path in sorted(folder.glob("*.pth"))[:8])
        hint = f"give one of its files: {weights}" if weights else "give a .pth file or a Hugging Face folder"
        raise CheckpointError(f"{folder} is a folder without config.json; {hint}")
    config, tensors = read_json(folder / "config.json"), {}
    for name in _weight_files(folder):
        tensors |= read_safetensors(folder / name) if name.endswith(".safetensors") else read_file(folder / name)
    if "minimind" in f"{config.get('architectures')} {config.get('model_type')}".lower():
        return from_minimind(tensors, config)
    return from_hf(tensors, config)


def _weight_files(folder: Path) -> list[str]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [name]
        index = folder / f"{name}.index.json"
        if index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            absent = [name for name in names if not (folder / name).exists()]
            if absent:
                raise CheckpointError(f"{folder} lacks {', '.join(absent)}: copy or download the folder again")
            return names
    raise CheckpointError(f"{folder} has a config.json but no model.safetensors: copy or download the folder again")


# ------------------------------------------------------------------------------------------------ resume state


def save_resume(folder: str | Path, state: dict, step: int, keep: int = 1) -> None:
    """Write folder/state_<step>.pt, then remove all but the `keep` newest; those of later steps belong to a run that
    this one replaces, and go too. `state`: nested dicts and lists of tensors and plain Python values, kept as they are.

    CheckpointError if writing fails; what was there before is then untouched."""
    check_plain(state, "state")
    folder = Path(folder)
    for stale in folder.glob(".state_*.tmp"):  # of a run that was killed while it wrote
        stale.unlink(missing_ok=True)
    path = folder / f"state_{step:08d}.pt"
    write_file(path, lambda file: torch.save(state, file))
    others = [other for other in _states(folder) if other != path]  # newest first
    later = [other for other in others if other.name > path.name]
    earlier = [other for other in others if other.name < path.name]
    for other in later + earlier[keep - 1 :]:
        other.unlink(missing_ok=True)


def resume_step(folder: str | Path) -> int | None:
    """The step of the newest state; None if there is none."""
    return max((int(path.stem.removeprefix("state_")) for path in _states(Path(folder))), default=None)


def load_resume(folder: str | Path) -> dict | None:
    """The newest readable state; None if there is none. A damaged one is named on stderr and passed over."""
    paths = _states(Path(folder))
    for path in paths:
        try:
            return read_file(path)
        except CheckpointError as error:
            print(f"warning: {error}; looking for an earlier state", file=sys.stderr)
    if paths:
        raise CheckpointError(f"none of the {len(paths)} states in {folder} is readable: remove it to start anew")
    return None


def remove_resume(folder: str | Path) -> None:
    """Remove the states of a run that is complete, and the folder if nothing else is in it."""
    folder = Path(folder)
    for path in _states(folder) + list(folder.glob(".state_*.tmp")):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _states(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("state_*.pt") if re.fullmatch(r"state_\d{8,}\.pt", p.name)), reverse=True)
