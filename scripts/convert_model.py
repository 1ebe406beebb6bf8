"""Turn weights into another format, and prove that the result computes the same.

python scripts/convert_model.py out/full_sft_256.pth out/hf                       # Hugging Face folder, bf16
python scripts/convert_model.py out/hf out/back.pth                               # and back, fp32
python scripts/convert_model.py out/full_sft_256.pth out/model.gguf --dtype q8_0  # llama.cpp; a Modelfile for Ollama
python scripts/convert_model.py out/full_sft_256.pth out/merged --lora lora_medical             # adapter merged in
python scripts/convert_model.py out/full_sft_256.pth out/peft --lora lora_medical --to peft     # adapter for peft
python scripts/convert_model.py out/full_sft_256.pth out/lora/x_256.pth --lora out/peft --to lora   # and back

SOURCE: a .pth of ours, one that MiniMind published, or a Hugging Face folder of a Llama, Qwen3 or Qwen3-MoE.
The result is made beside DEST, compared with SOURCE in the library that it is for, and put in place only if they agree.
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from _path import ROOT
from torch import Tensor

import cli
from cli import ArgumentParser, UsageError
from dataset.chat import TOKENIZER_DIR, load_tokenizer, render_chat
from model import checkpoint
from model.adapters import load_adapter, load_peft, save_adapter, save_peft
from model.checkpoint import CheckpointError
from model.export.gguf import LlamaCpp, modelfile, read_gguf, save_gguf
from model.formats import hf_config, model_card
from model.inference.engine import SamplingParams, generate
from model.model import MiniMindLM, base_state_dict, merge_lora

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GGUF_DTYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "q8_0": "q8_0"}
TEXTS = [
    "The capital of France is",
    "小猫有一个",
    "7 + 15 =",
    "def add(a, b):\n    return",
    "One sunny day, 12,345 cats",
]
QUESTIONS = ["Who are you?", "你是谁？", "Sort these numbers: 7, 3, 9"]
NEW_TOKENS = 32
TOLERANCE = 1e-3  # of logits, both sides computing in fp32
# llama.cpp rounds the activations of each product to the precision of the weights too, which can send a token to
# another expert: then only the greedy tokens are judged, and the difference of log-probabilities is only shown.
LLAMA_CPP_TOLERANCE = {"f32": 1e-2, "f16": math.inf, "bf16": math.inf, "q8_0": math.inf}
LLAMA_CPP_AGREEMENT = {"f32": 1.0, "f16": 0.98, "bf16": 0.9, "q8_0": 0.9}


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("dest", metavar="DEST", type=Path, help="FILE.pth, FILE.gguf or a new folder")
    add("--to", choices=("hf", "pth", "gguf", "peft", "lora"), help="default: by DEST's ending, a folder is hf")
    add("--dtype", choices=list(GGUF_DTYPES), help="default: bf16 for hf and gguf, fp32 for pth; q8_0 is for gguf")
    add("--lora", metavar="ADAPTER", help="a file of train_lora.py, its name in out_dir/lora, or a peft folder")
    add("--tokenizer", metavar="FOLDER", type=Path, help="default: SOURCE if it has one, else model/tokenizer")
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
    if args.to in ("pth", "gguf", "lora") and args.dest.is_dir():
        raise UsageError(f"{args.dest} is a folder: name the file to write")
    return args


# ------------------------------------------------------------------------------------------------ parity


def prompts_for(vocab_size: int, tokenizer_folder: Path) -> list[list[int]]:
    """Texts and questions; or random tokens, if there is no tokenizer of ours that fits."""
    try:
        tokenizer = load_tokenizer(tokenizer_folder)
    except (FileNotFoundError, ValueError):
        tokenizer = None
    if tokenizer is None or tokenizer.get_vocab_size() > vocab_size:
        random = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (len(TEXTS), 12), generator=random).tolist()
    questions = [[{"role": "user", "content": question}] for question in QUESTIONS]
    chats = [render_chat(tokenizer, question, add_generation_prompt=True)[0] for question in questions]
    return [tokenizer.encode(text).ids for text in TEXTS] + [[i for i in ids if i < vocab_size] for ids in chats]


class Parity:
    """Collects the comparison of our model with another on the same tokens, position by position."""

    def __init__(self, what: str, unit: str = "logits"):
        self.what, self.unit = what, unit
        self.difference, self.same, self.total = 0.0, 0, 0

    def add(self, difference: float, same: int, total: int) -> None:
        # max() would drop a NaN
        self.difference = difference if difference != difference else max(self.difference, difference)
        self.same, self.total = self.same + same, self.total + total

    def __str__(self) -> str:
        return (
            f"{self.what}: max {self.unit} difference {self.difference:.2e}, "
            f"greedy agreement {self.same}/{self.total} tokens"
        )

    def require(self, tolerance: float = TOLERANCE, agreement: float = 1.0) -> None:
        """Print the figures; CheckpointError if they are worse than these."""
        print(self)
        if not self.difference <= tolerance or self.same < agreement * self.total:
            raise CheckpointError(
                f"parity does not hold: {self}; at most {tolerance:g} and at least {agreement:.0%} is allowed"
            )


@torch.no_grad()
def with_ours(what: str, ours: MiniMindLM, other: MiniMindLM, prompts: list[list[int]]) -> Parity:
    """Two models of ours; the first one's greedy tokens."""
    parity = Parity(what)
    for prompt, result in zip(prompts, generate(ours, prompts, greedy()), strict=True):
        ids, n = torch.tensor([prompt + result.token_ids]), len(result.token_ids)
        a, b = ours(ids).logits[0], other(ids).logits[0]
        parity.add((a - b).abs().max().item(), _same(b, ids[0], n), n)
    return parity


@torch.no_grad()
def with_transformers(what: str, ours: MiniMindLM, theirs, prompts: list[list[int]]) -> Parity:
    """The logits of transformers, and its greedy tokens (generate(), with its cache), against ours."""
    parity = Parity(what)
    for prompt in prompts:
        start = torch.tensor([prompt])
        ids = theirs.generate(
            input_ids=start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        a, b, n = ours(ids).logits[0], theirs(ids).logits[0], ids.shape[1] - len(prompt)
        parity.add((a - b).abs().max().item(), _same(a, ids[0], n), n)
    return parity


@torch.no_grad()
def with_llama_cpp(ours: MiniMindLM, engine: LlamaCpp, prompts: list[list[int]]) -> Parity:
    """llama.cpp's greedy tokens, and the log-probabilities of the likeliest 50 at each, against ours."""
    parity = Parity("llama.cpp", "log-probability")
    for prompt in prompts:
        tokens, probabilities = engine.greedy(prompt, NEW_TOKENS)
        logprobs = ours(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]  # (n, V)
        differences = [abs(row[i].item() - p) for row, top in zip(logprobs, probabilities, strict=True)
                       for i, p in top.items()]  # fmt: skip
        parity.add(max(differences, default=0.0), int((logprobs.argmax(-1) == torch.tensor(tokens)).sum()), len(tokens))
    return parity


def _same(logits: Tensor, ids: Tensor, n: int) -> int:
    """How many of the last n ids are the likeliest by the logits (T, V) before them."""
    return int((logits[-n - 1 : -1].argmax(-1) == ids[-n:]).sum())


def greedy() -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)


def with_weights(model: MiniMindLM, weights: dict[str, Tensor]) -> MiniMindLM:
    """A plain model of the same shape."""
    plain = MiniMindLM(model.config).eval()
    plain.load_state_dict(weights)
    return plain


def rounded(model: MiniMindLM, dtype: torch.dtype, prompts: list[list[int]]) -> MiniMindLM:
    """The weights in that precision, computing in fp32; prints what the rounding itself does."""
    copy = with_weights(model, {name: w.to(dtype).float() for name, w in base_state_dict(model).items()})
    if dtype != torch.float32:
        print(with_ours(f"rounding to {str(dtype)[6:]}, for information", model, copy, prompts))
    return copy


# ------------------------------------------------------------------------------------------------ conversions


def to_pth(args, staged: Path, model: MiniMindLM, meta: dict, prompts: list) -> None:
    checkpoint.save(staged, model, meta, DTYPES[args.dtype])
    reference, (back, _) = rounded(model, DTYPES[args.dtype], prompts), checkpoint.load(staged)
    if any(not torch.equal(w, back.state_dict()[name]) for name, w in reference.state_dict().items()):
        raise CheckpointError("parity does not hold: the weights read back are not those of the source")
    with_ours("read back, every bit the same", reference, back, prompts).require(0.0)


def to_hf(args, staged: Path, model: MiniMindLM, meta: dict, prompts: list) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint.save_hf(staged, model, args.tokenizer, DTYPES[args.dtype])
    checkpoint.write_bytes(staged / "README.md", model_card(args.dest.name, model, meta).encode())
    reference, (back, _) = rounded(model, DTYPES[args.dtype], prompts), checkpoint.load(staged)
    if any(not torch.equal(w, back.state_dict()[name]) for name, w in reference.state_dict().items()):
        raise CheckpointError("parity does not hold: the weights read back are not those of the source")
    theirs = AutoModelForCausalLM.from_pretrained(staged, dtype=torch.float32).eval()
    with_transformers(f"transformers ({type(theirs).__name__})", reference, theirs, prompts).require()
    ours, theirs = load_tokenizer(args.tokenizer), AutoTokenizer.from_pretrained(staged)
    if any(ours.encode(t).ids != theirs(t, add_special_tokens=False)["input_ids"] for t in TEXTS + QUESTIONS):
        raise CheckpointError("parity does not hold: AutoTokenizer splits text in another way")


def thinks(meta: dict) -> bool:
    """Whether the model was trained to think, or may have been."""
    return meta.get("stage", "reason") == "reason"


def to_gguf(args, staged: Path, model: MiniMindLM, meta: dict, prompts: list) -> None:
    kind = GGUF_DTYPES[args.dtype]
    save_gguf(staged, model, args.tokenizer, kind, args.dest.stem, thinks(meta))
    stored = with_weights(model, read_gguf(staged, model.config))
    print(with_ours(f"rounding to {kind}, for information", model, stored, prompts))
    for name, w in base_state_dict(model).items():
        limit = w.abs().max().item() * {"f32": 0.0, "f16": 2**-10, "bf16": 2**-8, "q8_0": 2**-7}[kind]
        if not (stored.state_dict()[name] - w).abs().max() <= limit:
            raise CheckpointError(f"parity does not hold: {name} read back differs by more than {limit:g}")
    try:
        engine = LlamaCpp(staged)
    except ImportError:
        print("note: llama.cpp was not asked, only the weights were read back: pip install xllamacpp", file=sys.stderr)
        return
    with engine:
        with_llama_cpp(stored, engine, prompts).require(LLAMA_CPP_TOLERANCE[kind], LLAMA_CPP_AGREEMENT[kind])
        tokenizer = load_tokenizer(args.tokenizer)
        if any(engine.tokenize(text) != tokenizer.encode(text).ids for text in TEXTS + QUESTIONS):
            raise CheckpointError("parity does not hold: llama.cpp splits text in another way")


def to_adapter(args, staged: Path, model: MiniMindLM, meta: dict, prompts: list) -> None:
    """The adapter as a peft folder or a file of ours; either way peft must compute the same with it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = with_weights(model, {k.replace(".base.", "."): w for k, w in base_state_dict(model).items()})
    if args.to == "peft":
        save_peft(staged, model, "adapter", args.source)
        load_peft(staged, base, "adapter")
    else:
        save_adapter(staged, model, "adapter", {"from": str(args.lora)})
        load_adapter(staged, base, "adapter")
    with_ours("read back", model, base, prompts).require(0.0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_hf(folder, model, args.tokenizer, torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peft_folder = staged if args.to == "peft" else args.lora
    theirs = PeftModel.from_pretrained(theirs, peft_folder).eval()
    with_transformers("peft", base, theirs, prompts).require()


def add_adapter(args, model: MiniMindLM) -> None:
    adapter = Path(args.lora)
    if not adapter.exists():
        kind = "_moe" if model.config.is_moe else ""
        adapter = Path(args.out_dir) / "lora" / f"{args.lora}_{model.config.hidden_size}{kind}.pth"
    if not adapter.exists():
        raise CheckpointError(f"--lora {args.lora}: there is neither such a file or folder nor {adapter}")
    if adapter.is_dir():
        load_peft(adapter, model, "adapter")
    else:
        load_adapter(adapter, model, "adapter", base=args.source)
    if args.to == "lora" and not adapter.is_dir():
        raise UsageError(f"--to lora makes a file of a peft folder; {adapter} is one already")
    args.lora = adapter


def main() -> None:
    args = arguments()
    path = checkpoint.find_weights(args.out_dir, args.source)
    if args.dest.exists() and args.dest.samefile(path):
        raise UsageError("SOURCE and DEST are the same file")
    model, meta = checkpoint.load(path)
    if args.tokenizer is None:
        args.tokenizer = path if (path / "tokenizer.json").exists() else TOKENIZER_DIR
        if not meta and args.tokenizer == TOKENIZER_DIR and args.to in ("hf", "gguf"):
            print(f"note: {path} does not say which tokenizer it needs: taking model/tokenizer", file=sys.stderr)
    if args.to in ("hf", "gguf"):
        hf_config(model.config)  # refuses in a sentence what has no counterpart
        size = load_tokenizer(args.tokenizer).get_vocab_size()
        if size > model.config.vocab_size:
            raise CheckpointError(
                f"{path} has {model.config.vocab_size} tokens, {args.tokenizer} {size}: give its own with --tokenizer"
            )
    prompts = prompts_for(model.config.vocab_size, args.tokenizer)
    if args.lora:
        add_adapter(args, model)
        if args.to not in ("peft", "lora"):
            adapted, _ = checkpoint.load(path)
            merge_lora(model)
            meta = meta | {"merged": str(args.lora)}
            (load_peft if args.lora.is_dir() else load_adapter)(args.lora, adapted, "adapter")
            with_ours("merging", adapted, model, prompts).require()
            model = with_weights(model, base_state_dict(model))

    staged = args.dest.with_name(f".{args.dest.name}.{os.getpid()}.new")
    convert = {"pth": to_pth, "hf": to_hf, "gguf": to_gguf, "peft": to_adapter, "lora": to_adapter}[args.to]
    try:
        convert(args, staged, model, meta, prompts)
        if staged.is_dir() and args.dest.is_dir():
            args.dest.rmdir()  # empty
        os.replace(staged, args.dest)
    finally:
        shutil.rmtree(staged, ignore_errors=True) if staged.is_dir() else staged.unlink(missing_ok=True)
    if args.to == "gguf":
        text = modelfile(args.dest.name, model.config, thinks(meta))
        checkpoint.write_bytes(args.dest.with_suffix(".Modelfile"), text.encode())
    print(f"parity holds: wrote {args.dest} ({args.to}, {args.dtype})")


if __name__ == "__main__":
    cli.run(main)
