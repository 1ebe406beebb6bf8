"""A model one can talk to: finds and loads weights, turns conversations into prompts, and answers.

bot = load_chatbot(args, device, dtype)
for piece in bot.stream([{"role": "user", "content": "Who are you?"}], seed=None): print(piece, end="", flush=True)
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from cli import flag
from dataset.chat import (
    BOS_ID,
    END_THINK,
    EOS_ID,
    MARKER_IDS,
    PAD_ID,
    THINK,
    load_tokenizer,
    parse_tool_calls,
    parse_tools,
    render_chat,
)
from model import checkpoint
from model.adapters import load_adapter
from model.checkpoint import CheckpointError
from model.device import compute_dtype
from model.inference.cpu_step import CpuStep
from model.inference.engine import SamplingParams, decode, generate_each
from model.inference.quantization import quantize, quantized_kind
from model.model import lora_layers, merge_lora

STAGES = {  # --model_mode: what it is called, its files, how to get them
    0: ("pretrained", ("pretrain",), "run python train_pretrain.py first"),
    1: ("SFT", ("full_sft",), "run python train_full_sft.py first"),
    2: ("RLHF", ("rlhf", "dpo"), "run python train_dpo.py first"),
    3: ("reasoning", ("reason",), "run python train_reason.py first"),
}
STOP_IDS = (PAD_ID, BOS_ID, EOS_ID)  # end of document, beginning of another turn, end of turn
YARN_FACTOR = 4.0
SCORE_TOKENS, THINKING_SCORE_TOKENS = 128, 384  # longest answer when scoring


def score_tokens(thinking: bool | None) -> int:
    return THINKING_SCORE_TOKENS if thinking else SCORE_TOKENS


def model_arguments(parser: argparse.ArgumentParser, out_dir: Path) -> None:
    """The flags that say which model load_chatbot() loads."""
    add = parser.add_argument_group("which model").add_argument
    add("--load", type=int, choices=(0, 1), default=0, help="0 = raw .pth (default), 1 = Hugging Face folder")
    add("--model_mode", type=int, choices=tuple(STAGES), default=1,
        help="0 = pretrained, 1 = SFT (default), 2 = RLHF, 3 = reasoning")  # fmt: skip
    add("--out_dir", default=str(out_dir), help="where the weights are")
    add("--weight", metavar="FILE", help="this .pth instead of the one of the stage in --out_dir")
    add("--model_path", metavar="FOLDER", help="the Hugging Face folder of --load 1")
    add("--hidden_size", type=int, help="if weights of several sizes are in --out_dir (default: the newest)")
    add("--use_moe", type=flag, metavar="{0,1}", help="if both kinds are in --out_dir (default: the newest)")
    add("--quantize", choices=("int8", "int4"), help="weights of 8 or 4 bits")
    add("--compile", type=flag, metavar="{0,1}", default=False, help="1 = a decoding step in C++ for the CPU, several "
        "times as fast; compiled in seconds the first time (default: 0)")  # fmt: skip
    add("--inference_rope_scaling", type=flag, metavar="{0,1}", default=False, help="1 = 4 times the context that it "
        "was trained with, by YaRN (default: 0)")  # fmt: skip


def load_options(args: argparse.Namespace) -> dict:
    """How load_chatbot() is to load it."""
    return {"quantized": args.quantize, "compiled": args.compile, "extrapolate": args.inference_rope_scaling}


def check_model_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.load == 1) != bool(args.model_path):
        parser.error("--load 1 and --model_path FOLDER belong together")
    if args.max_seq_len is not None and args.max_seq_len < 16:
        parser.error(f"--max_seq_len {args.max_seq_len}: must be at least 16")


def find_weights(args: argparse.Namespace) -> Path:
    """The file of the stage in out_dir; the newest, if there are several."""
    if args.weight:
        return Path(args.weight)
    name, stages, remedy = STAGES[args.model_mode]
    kind = "(_moe)?" if args.use_moe is None else "_moe" * args.use_moe
    pattern = re.compile(rf"({'|'.join(stages)})_{args.hidden_size or '[0-9]+'}{kind}\.pth")
    found = [path for path in Path(args.out_dir).glob("*.pth") if pattern.fullmatch(path.name)]
    if not found:
        which = " of this size or kind" if args.hidden_size or args.use_moe is not None else ""
        files = " or ".join(f"{stage}_*.pth" for stage in stages)
        raise CheckpointError(
            f"no {name} weights{which} ({files}) in {args.out_dir}: {remedy}, or give --out_dir or --weight"
        )
    found.sort(key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        print(f"note: {names}: taking the newest, {found[-1].name}; --hidden_size or --weight choose", file=sys.stderr)
    return found[-1]


def load_chatbot(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    quantized: str | None = None,
    compiled: bool = False,
    extrapolate: bool = False,
):
    """A Chatbot, or for a Hugging Face folder with another tokenizer a TransformersChatbot. dtype None: the best one.

    quantized: "int8" or "int4". compiled: decode by the compiled step, if this machine can. extrapolate: YaRN, for
    YARN_FACTOR times the context that the model was trained with.
    Of args it needs load, model_path, weight, out_dir, model_mode, hidden_size, use_moe and lora_name (which model),
    max_seq_len, max_new_tokens, temperature, top_p and thinking (how it answers); eval_model.py --help explains them.
    Raises CheckpointError.
    """
    dtype = dtype or compute_dtype(device)
    tokenizer = load_tokenizer()
    if args.load == 1:
        path = Path(args.model_path)
        if path.is_dir() and (path / "config.json").exists():
            tokenizer = load_own_tokenizer(path)
        if tokenizer is None:
            ours = {"lora_name": args.lora_name, "quantize": quantized, "inference_rope_scaling": extrapolate}
            for flag in (flag for flag, given in ours.items() if given):
                raise CheckpointError(f"--{flag}: {path} has a tokenizer of another kind: that is for our own")
            print(f"note: {path} has a tokenizer of another kind: answering through transformers", file=sys.stderr)
            return TransformersChatbot(path, device, dtype, args)
    else:
        path = find_weights(args)
    model, meta = checkpoint.load(path, device)
    if args.lora_name:
        kind = "_moe" if model.config.is_moe else ""
        adapter = Path(args.out_dir) / "lora" / f"{args.lora_name}_{model.config.hidden_size}{kind}.pth"
        if not adapter.exists():
            raise CheckpointError(f"--lora_name {args.lora_name}: there is no {adapter}; check the name and --out_dir")
        load_adapter(adapter, model, "chosen", base=path)
        if compiled or quantized:
            merge_lora(model)
    if model.config.vocab_size < tokenizer.get_vocab_size():
        raise CheckpointError(
            f"{path} has {model.config.vocab_size} tokens, the tokenizer {tokenizer.get_vocab_size()}: "
            "they do not belong together; train again, or give a Hugging Face folder with its own tokenizer"
        )
    if not meta and args.load == 0:
        print(f"note: {path} does not say which tokenizer it needs: taking model/tokenizer", file=sys.stderr)
    trained_len = meta.get("finished", {}).get("max_seq_len", 2048)
    if extrapolate:
        model.config.rope_scaling = {
            "rope_type": "yarn", "factor": YARN_FACTOR, "original_max_position_embeddings": trained_len
        }  # fmt: skip
        model.set_rope()
        trained_len = int(YARN_FACTOR * trained_len)
    if compiled and device.type == "cpu" and dtype == torch.bfloat16:
        quantized = quantized or "bf16"  # the step computes in fp32 with weights that are bf16 in memory
    model = quantize(model, quantized) if quantized else model.to(dtype)
    return Chatbot(path, model, tokenizer, trained_len, args, compiled and can_compile(model))


def can_compile(model) -> bool:
    """Whether the compiled step works for this model and machine; says why not."""
    try:
        CpuStep(model)
    except (RuntimeError, ValueError) as error:
        print(f"note: {error}: answering without it", file=sys.stderr)
        return False
    return True


def load_adapters(bot: "Chatbot", folder: Path) -> list[str]:
    """Adds all adapters in the folder that belong to the bot's weights, none of them active; returns their names.

    What is there and cannot be used is told on stderr."""
    names = []
    for path in sorted(folder.glob("*.pth")):
        name = re.sub(r"_[0-9]+(_moe)?$", "", path.stem)
        try:
            if not re.fullmatch(r"[\w-]+", name) or name in names:
                raise CheckpointError(f"{path}: its name is that of another adapter, or has more than letters, - and _")
            load_adapter(path, bot.model, name, base=bot.name)
            names.append(name)
        except CheckpointError as error:
            print(f"note: adapter left out: {error}", file=sys.stderr)
    for layer in lora_layers(bot.model).values():
        layer.active = None
    return names


def load_own_tokenizer(folder: Path):
    """The tokenizer of a Hugging Face folder if it is one of ours, with the same markers; else None."""
    try:
        tokenizer = load_tokenizer(folder)
    except (FileNotFoundError, ValueError):
        return None
    return tokenizer if all(tokenizer.token_to_id(m) == i for m, i in MARKER_IDS.items()) else None


class Chatbot:
    """Prompts are texts, which are continued, or lists of messages, which are answered."""

    def __init__(
        self, path: Path, model, tokenizer, trained_len: int, args: argparse.Namespace, compiled: bool = False
    ):
        self.compiled = compiled
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.max_len = min(args.max_seq_len or trained_len, model.config.max_position_embeddings)
        self.opening = f"{THINK}\n" if args.thinking else ""  # of each answer; the prompt ends with it
        self.tokens = 0  # generated so far
        weight = model.model.norm.weight
        precision = quantized_kind(model) or str(weight.dtype).removeprefix("torch.")
        size = f"{model.num_parameters() / 1e6:.1f} M parameters"
        self.title = f"{path.name}: {size}, {precision} on {weight.device}, context {self.max_len} tokens"
        self.name = str(path)

    def encode(self, prompt: str | list[dict]) -> list[int]:
        if isinstance(prompt, str):
            return [PAD_ID, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        thinking = self.args.thinking  # None: as the model likes
        return render_chat(self.tokenizer, prompt, add_generation_prompt=True, enable_thinking=thinking)[0]

    def overflow(self, prompt: str | list[dict]) -> int:
        """By how many tokens the prompt is too long to leave room for an answer; 0 if it fits."""
        reserved = min(self.args.max_new_tokens or score_tokens(self.args.thinking), self.max_len // 2)
        return max(0, len(self.encode(prompt)) + reserved - self.max_len)

    def params(self, default_tokens: int, **changes) -> SamplingParams:
        new = self.args.max_new_tokens or default_tokens
        return SamplingParams(max_new_tokens=new, stop_token_ids=STOP_IDS, **changes)

    def stream(self, prompt: str | list[dict], seed: int | None) -> Iterator[str]:
        """The answer, piece by piece."""
        sampling = self.params(512, temperature=self.args.temperature, top_p=self.args.top_p, seed=seed)
        yield self.opening
        options = {"max_len": self.max_len, "compiled": self.compiled}
        for (event,) in decode(self.model, [self.encode(prompt)], sampling, self.tokenizer, **options):
            self.tokens += 1
            yield event.text

    def answer_all(self, prompts: list[list[dict]]) -> Iterator[tuple[int, str]]:
        """(number, answer) of all prompts, greedy, as they are done."""
        sampling = self.params(score_tokens(self.args.thinking), temperature=0)
        return ((i, text) for i, text, _ in self._answers(prompts, [sampling] * len(prompts), 64))

    def answer_each(
        self, prompts: list[list[dict]], seeds: list[int | None], batch_size: int
    ) -> Iterator[tuple[int, str, str]]:
        """(number, answer, finish reason "stop" or "length") of all prompts, sampled, as they are done."""
        temperature, top_p = self.args.temperature, self.args.top_p
        sampling = [self.params(512, temperature=temperature, top_p=top_p, seed=seed) for seed in seeds]
        return self._answers(prompts, sampling, batch_size)

    def _answers(self, prompts: list[list[dict]], sampling: list[SamplingParams], batch_size: int) -> Iterator:
        ids = [self.encode(prompt) for prompt in prompts]
        options = {"batch_size": batch_size, "max_len": self.max_len, "compiled": self.compiled}
        for i, result in generate_each(self.model, ids, sampling, self.tokenizer, **options):
            self.tokens += len(result.token_ids)
            yield i, self.opening + result.text, result.finish_reason


class TransformersChatbot:
    """Any other model and tokenizer, by transformers: the same methods, slower, the answer in one piece."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype, args: argparse.Namespace):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise CheckpointError(f"{path} needs transformers: pip install transformers") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
        except Exception as error:  # transformers raises nearly anything for a folder that it cannot load
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise CheckpointError(f"{path}: transformers cannot load it: {reason}") from None
        self.args, self.tokens, self.name = args, 0, str(path)
        self.max_len = args.max_seq_len or min(2048, getattr(self.model.config, "max_position_embeddings", 2048))
        self.title = f"{path.name}: {self.model.num_parameters() / 1e6:.1f} M parameters, through transformers"

    def encode(self, prompt: str | list[dict]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if not self.tokenizer.chat_template:
            raise CheckpointError(f"{self.name} has no chat template: use --model_mode 0 to continue texts")
        # Other templates take the tools apart from the messages, and calls in OpenAI's form.
        tools = parse_tools(prompt[0].get("tools")) if prompt[0]["role"] == "system" else []
        options = {} if self.args.thinking is None else {"enable_thinking": self.args.thinking}
        messages = [
            {**message, "tool_calls": [{"type": "function", "function": call} for call in calls]}
            if (calls := parse_tool_calls(message.get("tool_calls")))
            else message
            for message in prompt
        ]
        return self.tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, return_dict=True, **options
        )["input_ids"]

    overflow = Chatbot.overflow

    def stream(self, prompt: str | list[dict], seed: int | None, greedy: bool = False) -> Iterator[str]:
        prompt_ids = self.encode(prompt)
        if self.tokenizer.decode(prompt_ids[-8:]).rstrip().endswith(THINK):  # what the template opened is the answer's
            yield f"{THINK}\n"
        ids = torch.tensor([prompt_ids], device=self.model.device)
        if seed is not None:
            torch.manual_seed(seed)
        sampling = {"do_sample": False}
        if self.args.temperature > 0 and not greedy:
            sampling = {"do_sample": True, "temperature": self.args.temperature, "top_p": self.args.top_p, "top_k": 0}
        new = min(
            self.args.max_new_tokens or (score_tokens(self.args.thinking) if greedy else 512),
            self.max_len - ids.shape[1],
        )
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **sampling)
        out = out[0, ids.shape[1] :]
        self.tokens += len(out)
        eos = self.model.generation_config.eos_token_id
        self.finish_reason = "stop" if out[-1] in (eos if isinstance(eos, list) else [eos]) else "length"
        yield self.tokenizer.decode(out, skip_special_tokens=True)

    def answer_all(self, prompts: list[list[dict]]) -> Iterator[tuple[int, str]]:
        for i, prompt in enumerate(prompts):
            yield i, "".join(self.stream(prompt, None, greedy=True))

    def answer_each(
        self, prompts: list[list[dict]], seeds: list[int | None], batch_size: int
    ) -> Iterator[tuple[int, str, str]]:
        """As Chatbot's, but one after the other, whatever the batch_size."""
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            text = "".join(self.stream(prompt, seed))
            yield i, text, self.finish_reason


def final_answer(text: str) -> str:
    """Without the thinking before it."""
    return (text.partition(END_THINK)[2] if text.startswith(THINK) else text).strip()
