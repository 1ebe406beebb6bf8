"""A model that is asked benchmark questions: prompts as it knows them, likelihoods of answers.

examinee = Examinee(bot, chat=True)
item = examinee.item(Prompt("7 + 15 = ?"), ["22", "23"]); scores = examinee.score([item])
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.checkpoint import load_meta, run_arguments
from model.device import DTYPES, compute_dtype
from model.inference.chatbot import Chatbot, TransformersChatbot
from model.inference.likelihood import Item, Score, score_items

SEPARATOR = "\n\n"  # between worked examples in a text


@dataclass
class Prompt:
    """What is asked: a description of the task, worked examples (question, answer) and the question."""

    question: str
    examples: list[tuple[str, str]] = field(default_factory=list)
    description: str = ""

    @property
    def text(self) -> str:
        """For a model that continues texts."""
        parts = [self.description] if self.description else []
        parts += [f"{question}{_blank(question)}{answer}" for question, answer in self.examples]
        return SEPARATOR.join([*parts, self.question])

    @property
    def messages(self) -> list[dict]:
        """For a model that answers: every example is a turn of its own."""
        messages = [{"role": "system", "content": self.description}] if self.description else []
        for question, answer in self.examples:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.question}]


def _blank(text: str) -> str:
    """Between a question and its answer in a text, as lm-evaluation-harness has it."""
    return " " if text and not text[-1].isspace() else ""


class Examinee:
    """A chatbot, and whether it is asked in a chat or continues texts.

    cut: how many prompts were longer than its context; moved: how many answers melt into one token with the end of
    their prompt when both are written as one text, so that they are read as tokens of their own."""

    def __init__(self, bot: Chatbot | TransformersChatbot, chat: bool):
        self.bot, self.chat, self.max_len = bot, chat, bot.max_len
        self.cut = self.moved = 0

    def context(self, prompt: Prompt) -> list[int]:
        if not self.chat:
            return self._text(prompt.text)
        messages = prompt.messages
        if isinstance(self.bot, TransformersChatbot):  # its template is text, in which a marker would be one
            markers = self.bot.tokenizer.get_added_vocab()
            messages = [m | {"content": without_markers(m["content"], markers)} for m in messages]
        return self.bot.encode(messages)

    def _text(self, text: str) -> list[int]:
        return self.bot.encode(text) or self.beginning

    @property
    def beginning(self) -> list[int]:
        """What stands before a text of which every token is scored."""
        if isinstance(self.bot, TransformersChatbot):
            known = (self.bot.tokenizer.bos_token_id, self.bot.tokenizer.eos_token_id, 0)
            return [next(i for i in known if i is not None)]
        return self.bot.tokenizer.text_prefix or [self.bot.tokenizer.document_id]

    def continuation(self, text: str) -> list[int]:
        """Ids of an answer, which begins after a marker or after other text."""
        if isinstance(self.bot, TransformersChatbot):
            return self.bot.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.bot.tokenizer.encode(text, add_special_tokens=False).ids

    def item(self, prompt: Prompt, answers: list[str]) -> Item:
        """The prompt and its answers in tokens; a prompt that is too long loses its beginning."""
        context = self.context(prompt)
        if self.chat:
            continuations = [self.continuation(answer) for answer in answers]
        else:
            blank = _blank(prompt.question)
            continuations = [self._after(context, prompt.text, blank + answer) for answer in answers]
        return self._fit(Item(context, continuations))

    def sentences(self, texts: list[str]) -> Item:
        """Whole texts, from their first token on."""
        return self._fit(Item(self.beginning, [self.continuation(text) for text in texts]))

    def _after(self, context: list[int], text: str, answer: str) -> list[int]:
        """What the answer adds to the tokens of the text when both are written as one."""
        whole = self._text(text + answer)
        if whole[: len(context)] == context and len(whole) > len(context):
            return whole[len(context) :]
        self.moved += 1
        return self.continuation(answer)

    def _fit(self, item: Item) -> Item:
        item.continuations = [ids[: self.max_len] for ids in item.continuations]
        if (over := item.longest - self.max_len) > 0:
            self.cut += 1
            item.context = item.context[min(over, len(item.context) - 1) :]
        return item

    def score(self, items: list[Item], show: Callable[[int], None] = lambda done: None) -> list[list[Score]]:
        """Of every continuation of every item."""
        if isinstance(self.bot, TransformersChatbot):
            return [_score_by_transformers(self.bot.model, item, show, n) for n, item in enumerate(items, 1)]
        return score_items(self.bot.model, items, show)


def is_chat_model(bot: Chatbot | TransformersChatbot, path: Path) -> bool:
    """Whether weights have learnt to answer: not those of pretraining, nor a folder without a chat template."""
    if isinstance(bot, TransformersChatbot):
        return bool(bot.tokenizer.chat_template)
    if path.is_dir():
        return bot.tokenizer.brings_template
    meta = load_meta(path)
    if "method" in meta:
        return meta["method"] not in ("pretrain", "unlikelihood")
    stage = str(meta.get("stage") or path.stem)  # of older files
    return not (stage.startswith("pretrain") or run_arguments(meta).get("from_weight") == "none")


def exact_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """fp32 on a CPU, where rounding could decide between two options; elsewhere bf16 where the hardware computes in it.
    `name` overrides."""
    if name:
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else compute_dtype(device)


def without_markers(text: str, markers) -> str:
    """The text with every marker broken up by a zero-width space: it then cannot end a turn or begin one."""
    longest_first = sorted((marker for marker in markers if len(marker) > 1), key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(pattern, lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text) if pattern else text


@torch.inference_mode()
def _score_by_transformers(model, item: Item, show: Callable[[int], None], number: int) -> list[Score]:
    """One row for each continuation of more than one token, one for all the others."""
    scores: list[Score | None] = [None] * len(item.continuations)
    single = [i for i, ids in enumerate(item.continuations) if len(ids) == 1]
    rows = [single] * bool(single) + [[i] for i, ids in enumerate(item.continuations) if len(ids) > 1]
    inputs = [item.context + item.continuations[row[0]][:-1] for row in rows]
    longest = max(map(len, inputs))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for n, row in enumerate(inputs):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    start = len(item.context) - 1
    for n, row in enumerate(rows):
        for i in row:
            tokens = torch.tensor(item.continuations[i], device=logits.device)
            logprobs = logits[n, start : start + len(tokens)].float().log_softmax(-1)
            values = logprobs.gather(1, tokens[:, None])
            scores[i] = Score(values.sum().item(), bool((logprobs.argmax(-1) == tokens).all()))
    show(number)
    return scores
