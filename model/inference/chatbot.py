"""A model one can talk to: loads weights, turns conversations into prompts, and answers.

bot = load_chatbot("out/full_sft_192.pth", device, dtype, AnswerSettings(temperature=0.7))
pieces = bot.stream([{"role": "user", "content": "Who are you?"}], seed=None)     # of answers.py
message = to_message(pieces)                                                      # .content, .tool_calls, ...
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from dataset.chat import parse_tool_calls, parse_tools, render_chat
from dataset.tokenizer import THINK, TOOL_CALL, ChatTokenizer
from model import checkpoint
from model.adapters import load_adapter
from model.checkpoint import CheckpointError
from model.device import compute_dtype
from model.formats import OtherArchitecture
from model.inference.answers import (
    REASONING,
    SECTION_AFTER,
    AnswerParser,
    AssistantMessage,
    Piece,
    to_message,
)
from model.inference.cpu_step import CpuStep
from model.inference.cuda_step import CudaStep
from model.inference.engine import SamplingParams, decode, decoding_step, generate_each, step_works
from model.inference.quantization import quantize, quantized_kind
from model.inference.text_stream import TextStream
from model.model import lora_layers, merge_lora

YARN_FACTOR = 4.0
OPENED = [Piece(REASONING, "", THINK), Piece(REASONING, "\n")]  # what a prompt ends with that opens the thinking
SCORE_TOKENS, THINKING_SCORE_TOKENS = 128, 384  # longest answer when scoring


@dataclass
class AnswerSettings:
    """How a chatbot answers."""

    max_seq_len: int | None = None  # tokens of prompt and answer; None: as it was trained
    max_new_tokens: int | None = None  # None: 512, when scoring score_tokens()
    temperature: float = 0.7
    top_p: float = 0.9
    thinking: bool | None = None  # True: answers begin with thinking; False: without it; None: as the model likes


def score_tokens(thinking: bool | None) -> int:
    return THINKING_SCORE_TOKENS if thinking else SCORE_TOKENS


def load_chatbot(
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    settings: AnswerSettings,
    *,
    tokenizer: str | Path | None = None,
    adapter: Path | None = None,
    adapters: Path | None = None,
    quantized: str | None = None,
    compiled: bool | None = None,
    extrapolate: bool = False,
) -> "Chatbot | TransformersChatbot":
    """A Chatbot, or for a Hugging Face folder of another architecture than ours a TransformersChatbot.

    path: what checkpoint.load() takes. dtype None: the best one. tokenizer: the folder of one, for weights that do not
    say theirs. adapter: a .pth file, or FOLDER/NAME, which stands for FOLDER/NAME_<hidden>[_moe].pth; it is merged into
    the weights. adapters: a folder of them, of which all that fit are added (Chatbot.adapters), none active. quantized:
    "int8" or "int4". compiled: decode by the faster step; None: wherever it works.
    extrapolate: YaRN, for YARN_FACTOR times the context that the model was trained with. Raises CheckpointError.
    """
    path = Path(path)
    try:
        model, meta = checkpoint.load(path, device)
    except OtherArchitecture as error:
        ours = {"an adapter": adapter, "quantised weights": quantized, "YaRN": extrapolate, "--tokenizer": tokenizer}
        ours["--compile 1"] = compiled
        if refused := [what for what, given in ours.items() if given]:
            raise CheckpointError(f"{error}; so {refused[0]} cannot be used with it") from None
        print(f"note: {error}: answering through transformers", file=sys.stderr)
        return TransformersChatbot(path, device, dtype or compute_dtype(device), settings)
    own = checkpoint.tokenizer_of(path, tokenizer)
    checkpoint.require_fit(own, model.config, path)
    if path.is_dir() and not own.brings_template:
        print(
            f"note: {path} has no chat template: chats are written in ours, which it may never have seen",
            file=sys.stderr,
        )
    if adapter:
        load_adapter(adapter_file(adapter, model.config), model, "chosen", base=path, tokenizer=own)
        merge_lora(model)
    names = load_adapters(model, adapters, path, own) if adapters else []  # while the weights are those that they know
    trained_len = checkpoint.context_of(meta, own) or checkpoint.UNKNOWN_CONTEXT
    if extrapolate:
        if model.config.rope_scaling:
            raise CheckpointError(f"{path} has YaRN of its own: leave out --inference_rope_scaling")
        trained_len = extend_context(model, trained_len)
    compiled = set_precision(model, device, dtype, quantized, compiled)
    return Chatbot(path, model, own, trained_len, settings, compiled, names)


def adapter_file(adapter: Path, config) -> Path:
    file = adapter
    if adapter.suffix != ".pth":
        file = checkpoint.checkpoint_path(adapter.parent, adapter.name, config)
    if not file.exists():
        raise CheckpointError(f"there is no adapter {file}; check the name and the folder")
    return file


def extend_context(model, trained_len: int) -> int:
    """Sets the model's YaRN; returns for how many tokens."""
    yarn = {"rope_type": "yarn", "factor": YARN_FACTOR, "original_max_position_embeddings": trained_len}
    model.config.rope_scaling = yarn
    model.set_rope()
    return int(YARN_FACTOR * trained_len)


def set_precision(
    model, device: torch.device, dtype: torch.dtype | None, quantized: str | None, compiled: bool | None
) -> bool:
    """Converts an fp32 model in place; returns whether it decodes by a faster step.

    The compiled one of a CPU adds up in fp32. bf16, and no dtype, mean for it that the weights are rounded to bf16 in
    memory: half as much to read for each token, and nearer to fp32 than torch's bf16 arithmetic.
    Raises CheckpointError if the step was asked for and does not work."""
    bf16_is_fine = not quantized and dtype in (None, torch.bfloat16)
    if quantized:
        quantize(model, quantized)
    elif not bf16_is_fine:
        _convert(model, dtype)
    try:
        works = step_works(model, compiled)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"--compile 1: {error}; leave it out to go on without") from None
    if bf16_is_fine and works and device.type == "cpu":
        quantize(model, "bf16")
    elif bf16_is_fine:
        _convert(model, dtype or compute_dtype(device))
    return works


def _convert(model, dtype: torch.dtype) -> None:
    """All but the adapters, which stay in fp32."""
    exact = [(p, p.data) for p in adapter_parameters(model)]
    model.to(dtype)
    for p, data in exact:
        p.data = data


def adapter_parameters(model) -> list[nn.Parameter]:
    return [p for layer in lora_layers(model).values() for name in layer.configs for p in layer.matrices(name)]


def load_adapters(model, folder: Path, base: Path, tokenizer: ChatTokenizer) -> list[str]:
    """Adds all adapters in the folder that belong to these weights, none of them active; returns their names.

    What is there and cannot be used is told on stderr."""
    names = []
    for path in sorted(folder.glob("*.pth")):
        name = re.sub(r"_[0-9]+(_moe)?$", "", path.stem)
        try:
            if not re.fullmatch(r"[\w-]+", name) or name in names:
                raise CheckpointError(f"{path}: its name is that of another adapter, or has more than letters, - and _")
            load_adapter(path, model, name, base=base, tokenizer=tokenizer)
            names.append(name)
        except CheckpointError as error:
            print(f"note: adapter left out: {error}", file=sys.stderr)
    for layer in lora_layers(model).values():
        layer.active = None
    return names


def no_calls(tokenizer: ChatTokenizer) -> dict[int, float]:
    """SamplingParams' logit_bias for a conversation that offers no tools, in which a call would be read as text."""
    return {tokenizer.marker_ids[TOOL_CALL]: -100.0} if TOOL_CALL in tokenizer.marker_ids else {}


class Chatbot:
    """Prompts are texts, which are continued, or lists of messages, which are answered."""

    def __init__(
        self,
        path: Path,
        model,
        tokenizer: ChatTokenizer,
        trained_len: int,
        settings: AnswerSettings,
        compiled: bool | None = None,
        adapters: Sequence[str] = (),
    ):
        self.compiled, self.adapters = compiled, adapters
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.max_len = min(settings.max_seq_len or trained_len, model.config.max_position_embeddings)
        self.stop_ids = tokenizer.stop_ids | {model.config.eos_token_id}
        self.tokens = 0  # generated so far
        weight = model.model.norm.weight
        precision = quantized_kind(model) or str(weight.dtype).removeprefix("torch.")
        size = model.num_parameters() - sum(p.numel() for p in adapter_parameters(model))
        size = f"{size / 1e6:.1f} M parameters"
        self.title = f"{path.name}: {size}, {precision} on {weight.device}, context {self.max_len} tokens"
        self.name = str(path)

    @cached_property
    def step(self) -> CpuStep | CudaStep | bool:
        """Engine's `compiled`. Made once, as it may copy the weights; and when it is needed, with the adapters that the
        model has by then."""
        return decoding_step(self.model, self.compiled) or False

    def encode(self, prompt: str | list[dict]) -> list[int]:
        if isinstance(prompt, str):
            return [*self.tokenizer.text_prefix, *self.tokenizer.encode(prompt).ids]
        thinking = self.settings.thinking  # None: as the model likes
        return render_chat(self.tokenizer, prompt, add_generation_prompt=True, enable_thinking=thinking)[0]

    def overflow(self, prompt: str | list[dict]) -> int:
        """By how many tokens the prompt is too long to leave room for an answer; 0 if it fits."""
        reserved = min(self.settings.max_new_tokens or score_tokens(self.settings.thinking), self.max_len // 2)
        return max(0, len(self.encode(prompt)) + reserved - self.max_len)

    def params(self, default_tokens: int, **changes) -> SamplingParams:
        new = self.settings.max_new_tokens or default_tokens
        return SamplingParams(max_new_tokens=new, stop_token_ids=tuple(self.stop_ids), **changes)

    def stream(self, prompt: str | list[dict], seed: int | None) -> Iterator[Piece]:
        """The answer, piece by piece."""
        sampling = self.params(512, temperature=self.settings.temperature, top_p=self.settings.top_p, seed=seed)
        sampling = self._without_calls(prompt, sampling)
        ids = self.encode(prompt)
        if isinstance(prompt, str):
            parser, opening = AnswerParser(partial(TextStream, self.tokenizer), {}), []
        else:
            parser, opening = self._parser(ids)
        yield from opening
        options = {"max_len": self.max_len, "compiled": self.step}
        for (event,) in decode(self.model, [ids], sampling, **options):
            self.tokens += 1
            yield from parser.push(event.token_id)
            if event.finish_reason:
                yield from parser.close(cut=event.finish_reason == "length")

    def _without_calls(self, prompt: str | list[dict], sampling: SamplingParams) -> SamplingParams:
        """The same, for a conversation without tools such that none is called."""
        if isinstance(prompt, str) or prompt[0]["role"] == "system" and prompt[0].get("tools"):
            return sampling
        return replace(sampling, logit_bias=no_calls(self.tokenizer) | sampling.logit_bias)

    def _parser(self, prompt_ids: list[int]) -> tuple[AnswerParser, list[Piece]]:
        """For an answer, and the pieces of it that the prompt ends with."""
        thinking = self.tokenizer.opens_thinking(prompt_ids)
        parser = AnswerParser(partial(TextStream, self.tokenizer), self.tokenizer.answer_markers, thinking=thinking)
        return parser, OPENED if thinking else []

    def answer_all(self, prompts: list[list[dict]]) -> Iterator[tuple[int, AssistantMessage]]:
        """(number, answer) of all prompts, greedy, as they are done."""
        sampling = self.params(score_tokens(self.settings.thinking), temperature=0)
        return ((i, message) for i, message, _ in self._answers(prompts, [sampling] * len(prompts), 64))

    def answer_each(
        self, prompts: list[list[dict]], seeds: list[int | None], batch_size: int
    ) -> Iterator[tuple[int, AssistantMessage, str]]:
        """(number, answer, finish reason "stop" or "length") of all prompts, sampled, as they are done."""
        temperature, top_p = self.settings.temperature, self.settings.top_p
        sampling = [self.params(512, temperature=temperature, top_p=top_p, seed=seed) for seed in seeds]
        return self._answers(prompts, sampling, batch_size)

    def _answers(self, prompts: list[list[dict]], sampling: list[SamplingParams], batch_size: int) -> Iterator:
        ids = [self.encode(prompt) for prompt in prompts]
        sampling = [self._without_calls(*pair) for pair in zip(prompts, sampling, strict=True)]
        options = {"batch_size": batch_size, "max_len": self.max_len, "compiled": self.step}
        for i, result in generate_each(self.model, ids, sampling, **options):
            self.tokens += len(result.token_ids)
            parser, opening = self._parser(ids[i])
            pieces = [*opening, *parser.parse(result.token_ids, cut=result.finish_reason == "length")]
            yield i, to_message(pieces), result.finish_reason


class WholeText:
    """TextStream's place for the tokenizers of transformers: the text of a section comes when it is complete."""

    stopped = False

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.ids = tokenizer, []

    def push(self, token: int) -> str:
        self.ids.append(token)
        return ""

    def close(self, cut: bool = False) -> str:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return text.rstrip("\ufffd") if cut else text


class TransformersChatbot:
    """Any other model and tokenizer, by transformers: the same methods, slower, the answer in one piece."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype, settings: AnswerSettings):
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
        self.settings, self.tokens, self.name = settings, 0, str(path)
        vocabulary = self.tokenizer.get_vocab()  # other models may lack some of the markers: then they are text
        self.markers = {vocabulary[marker]: marker for marker in SECTION_AFTER if marker in vocabulary}
        self.max_len = settings.max_seq_len or min(2048, getattr(self.model.config, "max_position_embeddings", 2048))
        self.title = f"{path.name}: {self.model.num_parameters() / 1e6:.1f} M parameters, through transformers"

    def encode(self, prompt: str | list[dict]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if not self.tokenizer.chat_template:
            raise CheckpointError(f"{self.name} has no chat template: use --model_mode 0 to continue texts")
        # Other templates take the tools apart from the messages, and calls in OpenAI's form.
        tools = parse_tools(prompt[0].get("tools")) if prompt[0]["role"] == "system" else []
        options = {} if self.settings.thinking is None else {"enable_thinking": self.settings.thinking}
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

    def stream(self, prompt: str | list[dict], seed: int | None) -> Iterator[Piece]:
        yield from self._answer(prompt, seed, 512)[0]

    def answer_all(self, prompts: list[list[dict]]) -> Iterator[tuple[int, AssistantMessage]]:
        for i, prompt in enumerate(prompts):
            yield i, to_message(self._answer(prompt, None, score_tokens(self.settings.thinking), greedy=True)[0])

    def answer_each(
        self, prompts: list[list[dict]], seeds: list[int | None], batch_size: int
    ) -> Iterator[tuple[int, AssistantMessage, str]]:
        """As Chatbot's, but one after the other, whatever the batch_size."""
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            pieces, finish_reason = self._answer(prompt, seed, 512)
            yield i, to_message(pieces), finish_reason

    def _answer(
        self, prompt: str | list[dict], seed: int | None, default_tokens: int, greedy: bool = False
    ) -> tuple[list[Piece], str]:
        """The pieces of an answer, and its finish reason."""
        prompt_ids = self.encode(prompt)
        ids = torch.tensor([prompt_ids], device=self.model.device)
        if seed is not None:
            torch.manual_seed(seed)
        sampling = {"do_sample": False}
        if self.settings.temperature > 0 and not greedy:
            top_p, temperature = self.settings.top_p, self.settings.temperature
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        new = min(self.settings.max_new_tokens or default_tokens, self.max_len - len(prompt_ids))
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **sampling)
        answer = out[0, len(prompt_ids) :].tolist()
        self.tokens += len(answer)
        eos = self.model.generation_config.eos_token_id
        finish_reason = "stop" if answer[-1] in (eos if isinstance(eos, list) else [eos]) else "length"
        return self.parse(prompt, prompt_ids, answer, cut=finish_reason == "length"), finish_reason

    def parse(self, prompt: str | list[dict], prompt_ids: list[int], answer: list[int], cut: bool) -> list[Piece]:
        thinking = not isinstance(prompt, str) and self._opens_thinking(prompt_ids)
        markers = {} if isinstance(prompt, str) else self.markers
        parser = AnswerParser(partial(WholeText, self.tokenizer), markers, thinking=thinking)
        return [*(OPENED if thinking else []), *parser.parse(answer, cut)]

    def _opens_thinking(self, prompt_ids: list[int]) -> bool:
        """Whether the prompt ends with a marker of thinking: what the template opened is the answer's."""
        at = len(prompt_ids) - 1
        while at > 0 and not self.tokenizer.decode([prompt_ids[at]]).strip() and prompt_ids[at] not in self.markers:
            at -= 1
        return self.markers.get(prompt_ids[at]) == THINK
