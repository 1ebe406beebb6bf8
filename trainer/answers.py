"""Questions that are asked while a model trains (--eval_tasks): bits per byte of the right answer, which move long
before an accuracy does, and what the model says.

probe = AnswerProbe("questions.jsonl", tokenizer, chat=True); figures = probe.ask(model, dtype, reporter)
"""

import math
from pathlib import Path

import torch

from dataset.chat import render_chat
from dataset.choices import ChoiceQuestion, read_choices
from dataset.tokenizer import ChatTokenizer
from model.inference.engine import SamplingParams, generate
from model.inference.likelihood import Item, score_items
from model.model import MiniMindLM
from trainer.report import Reporter
from trainer.speed import install, uninstall

ASKED = 3  # questions whose answers are shown
SHOWN = 24  # tokens of each


class AnswerProbe:
    """Each question as scripts/evaluate.py puts it in the cloze form: in a chat, or as a text that is continued."""

    def __init__(self, path: str | Path, tokenizer: ChatTokenizer, chat: bool):
        self.questions, self.tokenizer, self.chat = read_choices(path), tokenizer, chat
        self.items = [Item(self.prompt(question), self.answers(question)) for question in self.questions]

    def prompt(self, question: ChoiceQuestion) -> list[int]:
        if self.chat:
            messages = [{"role": "user", "content": question.as_text}]
            return render_chat(self.tokenizer, messages, add_generation_prompt=True)[0]
        return [*self.tokenizer.text_prefix, *self.tokenizer.encode(question.as_text).ids]

    def answers(self, question: ChoiceQuestion) -> list[list[int]]:
        blank = "" if self.chat else " "
        return [self.tokenizer.encode(blank + choice, add_special_tokens=False).ids for choice in question.choices]

    @torch.no_grad()
    def ask(self, model: MiniMindLM, dtype: torch.dtype, reporter: Reporter) -> dict[str, float]:
        """What measure() finds in a model that is being trained; where there is one process, samples are shown. All
        processes must call it."""
        device = model.inv_freq.device
        uninstall(model)
        model.eval()
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        with torch.compiler.set_stance("force_eager"):  # it would take longer to compile than it saves
            with autocast:
                figures = self.measure(model)
            if reporter.processes.count == 1:
                reporter.say("\n".join(self.samples(model)))
        model.train()
        install(model, dtype, device)
        return figures

    def measure(self, model: MiniMindLM) -> dict[str, float]:
        """val_answer_bpb: bits per byte of the right answers. val_answer_accuracy: how often the right one is the
        likeliest per byte."""
        bits = n_bytes = right = 0.0
        for question, scores in zip(self.questions, score_items(model, self.items), strict=True):
            sizes = [len(choice.encode()) for choice in question.choices]
            rates = [score.logprob / size for score, size in zip(scores, sizes, strict=True)]
            bits -= scores[question.answer].logprob / math.log(2)
            n_bytes += sizes[question.answer]
            right += rates[question.answer] == max(rates)
        return {"val_answer_bpb": bits / n_bytes, "val_answer_accuracy": right / len(self.questions)}

    def samples(self, model: MiniMindLM) -> list[str]:
        """A line for each of some questions: what the model says to it, greedy."""
        step = max(1, len(self.questions) // ASKED)
        questions = self.questions[::step][:ASKED]
        params = SamplingParams(
            temperature=0, max_new_tokens=SHOWN, stop_token_ids=tuple(self.tokenizer.stop_ids), seed=0
        )
        prompts = [self.prompt(question) for question in questions]
        answers = generate(model, prompts, params, self.tokenizer, compiled=False)
        return [
            f"  {question.question.strip()} -> {' '.join(answer.text.split()) or '(nothing)'}"
            for question, answer in zip(questions, answers, strict=True)
        ]
