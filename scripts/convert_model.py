"""Turn weights into another format, and prove that the result computes the same.

python scripts/convert_model.py out/full_sft_192.pth out/hf                       # Hugging Face folder, bf16
python scripts/convert_model.py out/hf out/back.pth                               # and back, fp32
python scripts/convert_model.py out/full_sft_192.pth out/model.gguf --dtype q8_0  # llama.cpp; a Modelfile for Ollama
python scripts/convert_model.py out/full_sft_192.pth out/merged --lora lora_medical             # adapter merged in
python scripts/convert_model.py out/full_sft_192.pth out/peft --lora lora_medical --to peft     # adapter for peft
python scripts/convert_model.py out/full_sft_192.pth out/lora/x_192.pth --lora out/peft --to lora   # and back

SOURCE: a .pth of ours, one that MiniMind published, or a Hugging Face folder of a Llama, Qwen3 or Qwen3-MoE.
The result is made beside DEST, compared with SOURCE in the library that it is for, and put in place only if they agree.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import _parity as parity
import torch
from _path import ROOT

import cli
from cli import ArgumentParser, UsageError
from dataset.tokenizer import ChatTokenizer, TokenizerError
from model import checkpoint, files
from model.adapters import adapter_matrices, adapter_path, load_adapter, save_adapter
from model.checkpoint import CheckpointError
from model.device import DTYPES
from model.export.gguf import read_gguf, save_gguf
from model.export.huggingface import save_hf
from model.export.llama_cpp import LlamaCpp
from model.export.model_card import model_card
from model.export.ollama import modelfile
from model.export.optional import MissingPackage, need
from model.export.peft import load_peft, save_peft
from model.formats import hf_config
from model.model import MiniMindLM, base_state_dict, merge_lora

GGUF_DTYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "q8_0": "q8_0"}
GGUF_ROUNDING = {"f32": 0.0, "f16": 2**-10, "bf16": 2**-8, "q8_0": 2**-7}  # of a tensor's largest weight
ADAPTER = "adapter"  # what the adapter is called in the model


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("dest", metavar="DEST", type=Path, help="FILE.pth, FILE.gguf or a new folder")
    add("--to", choices=("hf", "pth", "gguf", "peft", "lora"), help="default: by DEST's ending, a folder is hf")
    add("--dtype", choices=list(GGUF_DTYPES), help="default: bf16 for hf and gguf, fp32 for pth; q8_0 is for gguf")
    add("--lora", metavar="ADAPTER", help="a file of train_lora.py, its name in out_dir/lora, or a peft folder")
    add("--tokenizer", metavar="FOLDER", help="of weights that do not say theirs (default: the one SOURCE carries)")
    add("--out_dir", default=str(ROOT / "out"), help="where names are looked up")
    args = parser.parse_args()
    args.to = args.to or {".pth": "pth", ".gguf": "gguf"}.get(args.dest.suffix, "hf")
    args.dtype = args.dtype or ("fp32" if args.to in ("pth", "peft", "lora") else "bf16")
    if args.dtype == "q8_0" and args.to != "gguf":
        raise UsageError("--dtype q8_0 is for GGUF files: name DEST something.gguf")
    if args.to in ("peft", "lora") and (not args.lora or args.dtype != "fp32"):
        raise UsageError(f"--to {args.to} needs --lora ADAPTER, which is written in fp32; SOURCE is the base")
    if args.to in ("hf", "peft") and args.dest.exists() and (not args.dest.is_dir() or any(args.dest.iterdir())):
        raise UsageError(f"{args.dest} is there already: remove it or choose another folder")
    if args.to in ("pth", "lora") and args.dest.is_file():  # it may be what a training has made
        raise UsageError(f"{args.dest} is there already: remove it or choose another name")
    if args.to in ("pth", "gguf", "lora") and args.dest.is_dir():
        raise UsageError(f"{args.dest} is a folder: name the file to write")
    return args


# ------------------------------------------------------------------------------------------------ conversions
# Each writes the result to `staged` and compares it with the model; MissingPackage if the library to compare with is
# not installed, which is known only once the result has been written and read back.


def to_pth(args: argparse.Namespace, staged: Path, model: MiniMindLM, meta: dict, prompts: list) -> None:
    meta = meta if args.tokenizer else meta | {"tokenizer": checkpoint.UNKNOWN}
    checkpoint.save(staged, model, meta, DTYPES[args.dtype], args.tokenizer)
    parity.with_ours("read back, every bit the same", *read_back(args, staged, model, prompts), prompts).require(0.0)


def to_hf(args: argparse.Namespace, staged: Path, model: MiniMindLM, meta: dict, prompts: list) -> None:
    save_hf(staged, model, args.tokenizer, DTYPES[args.dtype], checkpoint.context_of(meta, args.tokenizer))
    files.write_bytes(staged / "README.md", model_card(args.dest.name, model, meta).encode())
    reference, _ = read_back(args, staged, model, prompts)
    transformers = need("transformers", "a comparison with transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(staged, dtype=torch.float32).eval()
    parity.with_transformers(f"transformers ({type(theirs).__name__})", reference, theirs, prompts).require()
    ours, theirs = args.tokenizer, transformers.AutoTokenizer.from_pretrained(staged)
    if any(ours.encode(t).ids != theirs(t, add_special_tokens=False)["input_ids"] for t in parity.ALL_TEXTS):
        raise CheckpointError("parity does not hold: AutoTokenizer splits text in another way")


def read_back(
    args: argparse.Namespace, staged: Path, model: MiniMindLM, prompts: list
) -> tuple[MiniMindLM, MiniMindLM]:
    """The model in the precision of the result, and the one in `staged`; CheckpointError if a bit of them differs."""
    reference, (back, _) = parity.rounded(model, DTYPES[args.dtype], prompts), checkpoint.load(staged)
    if any(not torch.equal(w, back.state_dict()[name]) for name, w in reference.state_dict().items()):
        raise CheckpointError("parity does not hold: the weights read back are not those of the source")
    return reference, back


def to_gguf(args: argparse.Namespace, staged: Path, model: MiniMindLM, meta: dict, prompts: list) -> None:
    kind = GGUF_DTYPES[args.dtype]
    save_gguf(staged, model, args.tokenizer, kind, args.dest.stem, may_think(meta))
    stored = parity.with_weights(model, read_gguf(staged, model.config))
    print(parity.with_ours(f"rounding to {kind}, for information", model, stored, prompts))
    for name, w in base_state_dict(model).items():
        limit = w.abs().max().item() * GGUF_ROUNDING[kind]
        if not (stored.state_dict()[name] - w).abs().max() <= limit:
            raise CheckpointError(f"parity does not hold: {name} read back differs by more than {limit:g}")
    with LlamaCpp(staged) as engine:
        parity.with_llama_cpp(stored, engine, prompts).require(*parity.LLAMA_CPP_LIMITS[kind])
        if any(engine.tokenize(text) != args.tokenizer.encode(text).ids for text in parity.ALL_TEXTS):
            raise CheckpointError("parity does not hold: llama.cpp splits text in another way")


def may_think(meta: dict) -> bool:
    """Whether the model was trained to think, or may have been."""
    return (meta.get("method") or meta.get("stage", "reason")) in ("reason", "grpo", "ppo")


def to_adapter(args: argparse.Namespace, staged: Path, model: MiniMindLM, meta: dict, prompts: list) -> None:
    """The adapter as a peft folder or a file of ours; either way peft must compute the same with it."""
    base = parity.with_weights(model, base_state_dict(model))
    if args.to == "peft":
        save_peft(staged, model, ADAPTER, args.source)
        load_peft(staged, base, ADAPTER)
    else:
        save_adapter(staged, model, ADAPTER, {"from": str(args.lora)}, args.tokenizer)
        load_adapter(staged, base, ADAPTER)
    parity.with_ours("read back", model, base, prompts).require(0.0)
    peft, transformers = (need(name, "a comparison with peft") for name in ("peft", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        save_hf(folder, model, args.tokenizer, torch.float32)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(theirs, staged if args.to == "peft" else args.lora).eval()
    parity.with_transformers("peft", base, theirs, prompts).require()


CONVERSIONS = {"pth": to_pth, "hf": to_hf, "gguf": to_gguf, "peft": to_adapter, "lora": to_adapter}


# ------------------------------------------------------------------------------------------------ the source


def choose_tokenizer(args: argparse.Namespace, path: Path, model: MiniMindLM) -> ChatTokenizer | None:
    """The tokenizer that belongs to the weights; None if none is known and a .pth does without.

    CheckpointError or TokenizerError if there is none, or one that cannot be theirs."""
    try:
        tokenizer = checkpoint.tokenizer_of(path, args.tokenizer)
    except (CheckpointError, TokenizerError) as error:
        if args.tokenizer or args.to in ("hf", "gguf"):
            raise
        print(f"note: {error}; the result will not say it either", file=sys.stderr)
        return None
    if args.to in ("hf", "gguf"):
        hf_config(model.config)  # refuses in a sentence what has no counterpart
    checkpoint.require_fit(tokenizer, model.config, path)
    return tokenizer


def find_adapter(args: argparse.Namespace, model: MiniMindLM) -> Path:
    by_name = adapter_path(args.out_dir, args.lora, model.config)
    found = next((path for path in (Path(args.lora), by_name) if path.exists()), None)
    if found is None:
        raise CheckpointError(f"--lora {args.lora}: there is neither such a file or folder nor {by_name}")
    if args.to == "lora" and not found.is_dir():
        raise UsageError(f"--to lora makes a file of a peft folder; {found} is one already")
    return found


def add_adapter(args: argparse.Namespace, model: MiniMindLM) -> None:
    if args.lora.is_dir():
        load_peft(args.lora, model, ADAPTER)
    else:
        load_adapter(args.lora, model, ADAPTER, base=args.source, tokenizer=args.tokenizer)
    require_finite(args.lora, adapter_matrices(model, ADAPTER)[1])


def require_finite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """CheckpointError if a comparison of what they compute would mean nothing."""
    fault = files.not_finite(tensors)
    if fault:
        raise CheckpointError(f"{path}: {fault}: its training has diverged; take an earlier file, or train it again")


def merged(args: argparse.Namespace, path: Path, model: MiniMindLM, prompts: list) -> MiniMindLM:
    """A model whose weights hold the adapter, compared with the base that has it beside them."""
    adapted, _ = checkpoint.load(path)
    add_adapter(args, adapted)
    merge_lora(model)
    parity.with_ours("merging", adapted, model, prompts).require()
    return parity.with_weights(model, base_state_dict(model))


def main() -> None:
    args = arguments()
    path = checkpoint.find_weights(args.out_dir, args.source)
    if args.dest.exists() and args.dest.samefile(path):
        raise UsageError("SOURCE and DEST are the same file")
    model, meta = checkpoint.load(path)
    require_finite(path, base_state_dict(model))
    args.tokenizer = choose_tokenizer(args, path, model)
    prompts = parity.prompts_for(model.config.vocab_size, args.tokenizer)
    if args.lora:
        args.lora = find_adapter(args, model)
        add_adapter(args, model)
        if args.to not in ("peft", "lora"):
            model, meta = merged(args, path, model, prompts), meta | {"merged": str(args.lora)}

    staged, verdict = args.dest.with_name(f".{args.dest.name}.{os.getpid()}.new"), "parity holds"
    try:
        try:
            CONVERSIONS[args.to](args, staged, model, meta, prompts)
        except MissingPackage as missing:
            if not staged.exists():  # it is needed to write the format
                raise
            verdict = "read back the same"
            print(f"note: the result is not compared with other software: {missing}", file=sys.stderr)
        if staged.is_dir() and args.dest.is_dir():
            args.dest.rmdir()  # empty
        gc.collect()  # Windows renames no file that a forgotten model still maps
        os.replace(staged, args.dest)
    finally:
        shutil.rmtree(staged, ignore_errors=True) if staged.is_dir() else staged.unlink(missing_ok=True)
    if args.to == "gguf":
        text = modelfile(args.dest.name, model.config, args.tokenizer, may_think(meta))
        beside = args.dest.with_suffix(".Modelfile")
        if beside.exists() and beside.read_bytes() != text.encode():
            os.replace(beside, f"{beside}.1")
            print(f"note: {beside} was another one: kept as {beside}.1", file=sys.stderr)
        files.write_bytes(beside, text.encode())
    print(f"{verdict}: wrote {args.dest} ({args.to}, {args.dtype})")


if __name__ == "__main__":
    cli.run(main)
