"""How fast this machine trains and generates, and what quantisation costs; the last line is one JSON object.

python scripts/benchmark.py train --preset small --seq_len 512 --seconds 60
python scripts/benchmark.py decode --preset small --batch 8 --new_tokens 256 --quantize int8 --compare 1
python scripts/benchmark.py quality --model out/pretrain_512.pth --data_path texts.jsonl
python scripts/benchmark.py all --nano out/full_sft_256.pth --markdown docs/experiments/performance.md

--markdown FILE appends the figures to it as a table, with machine, commit and command.
train: whole steps (forward, backward, clipping, optimizer) on random tokens. `mfu` is 6 * active parameters * tokens/s
over the peak of a 2048^3 product in the same precision and process; `mfu_with_attention` counts the attention scores.
`memory_mb` is what the peak in CPU memory rose by after import.
decode: greedy answers by the engine, the fastest of --repeat. A step reads all weights and the caches once:
`gb_per_second`, and its share of what a sum over 256 MB reads in the same process.
quality: bits per byte of texts in fp32, bf16, int8 and int4.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import _path  # noqa: F401
import _performance
import torch
from _report import append_markdown, command

import cli
from cli import ArgumentParser, find_device
from dataset.checks import text_fault
from dataset.jsonl import DataError, read_jsonl
from dataset.tokenizer import ChatTokenizer, load_tokenizer
from model import checkpoint
from model.device import DTYPES, training_dtype
from model.export.gguf import save_gguf
from model.export.huggingface import save_hf
from model.export.llama_cpp import LlamaCpp
from model.export.optional import need
from model.inference.engine import Engine, SamplingParams, decoding_step
from model.inference.quantization import FORMATS, quantize, weight_bytes
from model.model import PRESETS, MiniMindLM
from trainer.optimizer import LEARNING_RATES, build_optimizers
from trainer.speed import compile_if_worth, cross_entropy, install, matmul_peak, synchronize


def peak_rss_mb() -> float:
    """The most that this process has held in memory so far; 0 on Windows, where Python does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)


def benchmark_train(args: argparse.Namespace) -> dict:
    device = find_device(args.device)
    dtype = training_dtype(device, args.dtype)
    peaks = [matmul_peak(device, dtype)]
    baseline = peak_rss_mb()
    torch.manual_seed(0)
    model = MiniMindLM(PRESETS[args.preset]).to(device).train()
    optimizers = build_optimizers(model, args.optimizer, dtype=dtype, tokens=args.batch_size * args.seq_len)
    model.activation_checkpointing = bool(args.activation_checkpointing)
    install(model, dtype, device)
    compile_if_worth(model, str(args.compile), device, 0, print)
    ids = torch.randint(16, model.config.vocab_size, (args.batch_size, args.seq_len + 1), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = model(ids[:, :-1])
            loss = cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten()) + out.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(device)

    first, times = step_times(step, args.seconds, tokens=ids[:, 1:].numel())
    rss = peak_rss_mb()
    peaks.append(matmul_peak(device, dtype))
    peak, tokens_per_second = max(peaks), ids[:, 1:].numel() / statistics.median(times)
    return {
        "preset": args.preset,
        "parameters": model.num_parameters(),
        "active": model.num_parameters(active=True),
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "optimizer": args.optimizer,
        "dtype": str(dtype)[6:],
        "device": device.type,
        "tokens_per_second": round(tokens_per_second, 1),
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "mfu": round(tokens_per_second * model.flops_per_token(args.seq_len, attention=False) / peak, 4),
        "mfu_with_attention": round(tokens_per_second * model.flops_per_token(args.seq_len) / peak, 4),
        "peak_rss_mb": round(rss),
        "memory_mb": round(rss - baseline),
        "activation_checkpointing": args.activation_checkpointing,
        "compile_seconds": round(first - statistics.median(times), 1) if args.compile else 0,
        "steps": len(times),
    } | environment()


def step_times(step: Callable[[], None], seconds: float, tokens: int) -> tuple[float, list[float]]:
    """Seconds of the first step, which compiles, and of each that follows the second for so long."""
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        print(f"\r{len(times)} steps, {tokens / times[-1]:,.0f} tokens/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return first, times


def environment() -> dict:
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over 256 MB reads, the best of five."""
    x, times = torch.ones(1 << 26, device=device), []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        x.sum()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 4 * x.numel() / min(times)


def load_model(args: argparse.Namespace) -> MiniMindLM:
    """The weights that a path names, or random ones of a preset with the fields of --config changed; fp32."""
    device = find_device(args.device)
    if args.model:
        return checkpoint.load(args.model, device)[0]
    changes = {}
    for field in args.config:
        name, _, value = field.partition("=")
        if not hasattr(PRESETS[args.preset], name) or not value.isdigit():
            raise cli.UsageError(
                f"--config {field}: give a field of MiniMindConfig and a whole number, as hidden_size=512"
            )
        changes[name] = int(value)
    torch.manual_seed(0)
    return MiniMindLM(replace(PRESETS[args.preset], head_dim=None, **changes)).eval().to(device)


def answer_times(engine: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Seconds from asking to the last prompt's first token, and from there to the last token of all."""
    params = SamplingParams(temperature=0, max_new_tokens=new_tokens, stop_token_ids=())
    start = first = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, params)
    begun: set[int] = set()
    while engine.busy:
        for event in engine.step():
            if event.index not in begun:
                begun.add(event.index)
                first = time.perf_counter()
    return first - start, time.perf_counter() - first


def transformers_speed(model: MiniMindLM, prompts: list[list[int]], args: argparse.Namespace) -> float:
    """Tokens per second of transformers' generate on the same weights in fp32, prefill included; the best of two."""
    transformers = need("transformers", "--compare 1")
    with tempfile.TemporaryDirectory() as folder:
        save_hf(folder, model, load_tokenizer(), torch.float32)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, times = torch.tensor(prompts), []
    for new in (8, args.new_tokens, args.new_tokens):
        start = time.perf_counter()
        theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        times.append(time.perf_counter() - start)
    return args.batch * args.new_tokens / min(times[1:])


def llama_cpp_speed(
    model: MiniMindLM, prompt: list[int], long: list[int], args: argparse.Namespace
) -> tuple[float, float] | None:
    """Tokens per second of llama.cpp on the same weights as F32, BF16, Q8_0 or Q4_0, by its own account: new ones, and
    those of a long prompt; the best of --repeat. None for more than one prompt at once, or if it is not installed."""
    kind = {None: "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}[args.quantize]
    if args.batch > 1 or importlib.util.find_spec("xllamacpp") is None:
        return None
    request = {"n_predict": args.new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    with tempfile.TemporaryDirectory() as folder:
        save_gguf(f"{folder}/model.gguf", model, load_tokenizer(), kind)
        with LlamaCpp(f"{folder}/model.gguf", threads=torch.get_num_threads(), exact=False) as engine:
            timings = [
                [engine.post("/completion", request | more)["timings"] for _ in range(args.repeat)]
                for more in ({"prompt": prompt}, {"prompt": long, "n_predict": 1})
            ]
    return max(t["predicted_per_second"] for t in timings[0]), max(t["prompt_per_second"] for t in timings[1])


def benchmark_decode(args: argparse.Namespace) -> dict:
    model = load_model(args)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(16, model.config.vocab_size, (args.batch, args.prompt_len), generator=generator).tolist()
    long = torch.randint(16, model.config.vocab_size, (512,), generator=generator).tolist()
    theirs = transformers_speed(model, prompts, args) if args.compare else None
    llama = llama_cpp_speed(model, prompts[0], long, args) if args.compare else None
    parameters = model.num_parameters()
    if args.quantize == "bf16" and model.inv_freq.is_cuda:
        model.bfloat16()
    elif args.quantize:
        quantize(model, args.quantize)
    start = time.perf_counter()
    step = decoding_step(model, bool(args.compile)) or False
    compiled = time.perf_counter() - start

    def times(prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        # A new engine each time: nothing may come from the cache.
        return answer_times(Engine(model, slots=args.batch, compiled=step), prompts, new_tokens)

    times(prompts, 8)
    firsts, seconds = zip(*(times(prompts, args.new_tokens) for _ in range(args.repeat)), strict=True)
    prefill = min(times([long], 1)[0] for _ in range(3))
    steps_per_second = (args.new_tokens - 1) / min(seconds)
    tokens_per_second = steps_per_second * args.batch
    read = weight_bytes(model) + cache_bytes(model, args, Engine(model, slots=1, compiled=step).cache.k.dtype)
    bandwidth, used = read_bandwidth(model.inv_freq.device), steps_per_second * read
    return {
        "model": args.model or " ".join([args.preset, *args.config]),
        "parameters": parameters,
        "batch": args.batch,
        "new_tokens": args.new_tokens,
        "weights": args.quantize or "fp32",
        "compiled": args.compile,
        "tokens_per_second": round(tokens_per_second, 1),
        "prefill_tokens_per_second": round(512 / prefill, 1),
        "time_to_first_token": round(min(firsts), 4),
        "mb_per_step": round(read / 1e6, 1),
        "gb_per_second": round(used / 1e9, 1),
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(used / bandwidth, 3),
        "compile_seconds": round(compiled, 2),
        "peak_rss_mb": round(peak_rss_mb()),
        "transformers_tokens_per_second": theirs and round(theirs, 1),
        "ratio": theirs and round(tokens_per_second / theirs, 2),
        "llama_cpp_tokens_per_second": llama and round(llama[0], 1),
        "llama_cpp_prefill_tokens_per_second": llama and round(llama[1], 1),
    } | environment()


def cache_bytes(model: MiniMindLM, args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Bytes of keys and values that a step reads, halfway through the answers."""
    c = model.config
    length = args.prompt_len + args.new_tokens / 2
    return 2 * dtype.itemsize * args.batch * length * c.num_hidden_layers * c.num_key_value_heads * c.head_dim


@torch.inference_mode()
def bits_per_byte(model: MiniMindLM, documents: list[list[int]], n_bytes: int, seq_len: int) -> float:
    """Of documents (their tokens after one that begins them), each in windows of at most seq_len tokens."""
    nats = 0.0
    for ids in documents:
        for start in range(0, len(ids) - 1, seq_len):
            window = torch.tensor(ids[start : start + seq_len + 1])
            logits = model(window[None, :-1]).logits[0].float()
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return nats / math.log(2) / n_bytes


def benchmark_quality(args: argparse.Namespace) -> dict:
    tokenizer = checkpoint.tokenizer_of(args.model, args.tokenizer)
    documents, n_bytes = read_documents(args.data_path, args.bytes, tokenizer)
    result: dict = {"model": args.model, "data": args.data_path, "bytes": n_bytes}
    for kind in (None, *FORMATS):
        model = load_model(args)
        if kind:
            quantize(model, kind)
        result[kind or "fp32"] = {
            "bits_per_byte": round(bits_per_byte(model, documents, n_bytes, args.seq_len), 4),
            "megabytes": round(weight_bytes(model) / 1e6, 1),
        }
        print(kind or "fp32", result[kind or "fp32"], file=sys.stderr)
    for kind in ("int8", "int4"):
        result[kind]["over_bf16"] = round(result[kind]["bits_per_byte"] / result["bf16"]["bits_per_byte"] - 1, 4)
    return result


def read_documents(path: str, most: int, tokenizer: ChatTokenizer) -> tuple[list[list[int]], int]:
    """(documents as tokens, their bytes) from the beginning of a JSONL file; DataError for a row without text."""
    documents, n_bytes = [], 0
    for number, row, fault in read_jsonl(path):
        if fault := fault or text_fault(row):
            raise DataError(f"{path}, line {number}: {fault.text}")
        if n_bytes >= most:
            break
        documents.append([tokenizer.document_id, *tokenizer.encode(row["text"]).ids])
        n_bytes += len(row["text"].encode())
    if not documents:
        raise DataError(f"{path}: the file is empty")
    return documents, n_bytes


def benchmark_all(args: argparse.Namespace) -> None:
    results = _performance.measure_all(args.rounds, args.nano)
    text = _performance.table(results, args.rounds, command())
    print(text)
    if args.markdown:
        _performance.append(args.markdown, text)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="training speed")
    add = train.add_argument
    add("--preset", choices=list(PRESETS), default="nano")
    add("--seq_len", type=int, default=512)
    add("--batch_size", type=int, default=8)
    add("--seconds", type=float, default=60)
    add("--optimizer", choices=list(LEARNING_RATES), default="muon")
    add("--compile", type=int, choices=(0, 1), default=1)
    add("--activation_checkpointing", type=int, choices=(0, 1), default=0)
    add("--device")
    add("--dtype", choices=list(DTYPES))
    train.set_defaults(function=benchmark_train)

    decode = commands.add_parser("decode", help="generation speed")
    add = decode.add_argument
    add("--preset", choices=list(PRESETS), default="nano")
    add("--config", nargs="*", default=[], metavar="FIELD=N", help="instead of the preset's, such as hidden_size=512")
    add("--model", metavar="PATH", help="this one instead of a random one")
    add("--device", default="cpu", help="cuda, mps or cpu (default: cpu)")
    add("--batch", type=int, default=1)
    add("--prompt_len", type=int, default=32)
    add("--new_tokens", type=int, default=256)
    add("--repeat", type=int, default=3)
    add("--quantize", choices=list(FORMATS), help="how the weights lie in memory (default: fp32)")
    add("--compile", type=int, choices=(0, 1), default=1, help="0 = torch's operations alone")
    add("--compare", type=int, choices=(0, 1), default=0, help="1 = transformers (in fp32) and llama.cpp too")
    decode.set_defaults(function=benchmark_decode)

    quality = commands.add_parser("quality", help="bits per byte of quantised weights")
    add = quality.add_argument
    add("--model", required=True, metavar="PATH")
    add("--tokenizer", metavar="FOLDER", help="of weights that do not say theirs")
    add("--device", default="cpu", help=argparse.SUPPRESS)
    add("--data_path", required=True, help='JSONL with "text"')
    add("--bytes", type=int, default=100_000, help="of the file's beginning")
    add("--seq_len", type=int, default=340)
    quality.set_defaults(function=benchmark_quality)

    everything = commands.add_parser("all", help="one table of training, decoding with its peers, and serving")
    everything.add_argument("--rounds", type=int, default=5, help="measurements of each, of which the median is taken")
    everything.add_argument("--nano", metavar="PATH", help="weights of that preset, to serve")
    for subparser in (train, decode, quality, everything):
        subparser.add_argument("--markdown", type=Path, metavar="FILE", help="append the figures to this file")
    args = parser.parse_args()
    if args.command == "all":
        return benchmark_all(args)
    figures = args.function(args)
    print(json.dumps(figures))
    if args.markdown:
        append_markdown(args.markdown, args.command, figures)


if __name__ == "__main__":
    cli.run(main)
