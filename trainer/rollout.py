"""Rollouts: what the current weights say to a question, token for token as it was sampled, and what that was worth.

with Generator(policy_of(run), run.tokenizer, run.dtype, max_len=256) as generator:
    rollouts = [begin(tokenizer, question, prompt=7, member=g) for g in range(8)]
    generator.complete(rollouts, max_new_tokens=128)        # or with next_turn, for conversations with tools

Sampling is at temperature 1 without any filter: the tokens come from the distribution whose log-probabilities are
trained. Nothing else can be asked for but the likeliest tokens, to measure.
"""

import contextlib
import copy
import hashlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from dataset.chat import render_chat
from dataset.questions import Question
from dataset.tokenizer import THINK, ChatTokenizer
from model.inference.answers import REASONING, AnswerParser, Piece, to_message
from model.inference.cpu_step import CpuStep
from model.inference.cuda_step import CudaStep
from model.inference.engine import Engine, SamplingParams, decoding_step, step_works
from model.inference.quantization import quantize
from model.inference.text_stream import TextStream
from trainer.speed import uninstall

SLOTS = 256  # rollouts that run at once


@dataclass
class Rollout:
    """One conversation, as token ids. What was sampled is what is trained on; it is never rendered again."""

    question: Question
    messages: list[dict]  # the question's, then what was answered
    ids: list[int]  # the prompt, the sampled tokens (their end token too), what was appended after them, ...
    trained: list[bool]  # of the ids: whether they were sampled
    prompt: int = 0  # number of the question among all that the run draws: the members of a group share it
    member: int = 0
    log_probs: list[float] = field(default_factory=list)  # of the sampled tokens, by the engine, fp32; nan: not asked
    turns: int = 0  # answers so far
    truncated: bool = False  # the last answer has no end
    reward: float = 0.0
    calls: int = 0  # of tools
    failed_calls: int = 0

    @property
    def sampled(self) -> int:
        """Tokens that were sampled."""
        return len(self.log_probs)

    def append(self, ids: list[int], messages: list[dict]) -> None:
        """What somebody else says next: its tokens are never trained on."""
        self.ids += ids
        self.trained += [False] * len(ids)
        self.messages += messages


def begin(tokenizer: ChatTokenizer, question: Question, prompt: int, member: int, thinking: bool | None) -> Rollout:
    """A rollout before its first token. thinking: as render_chat's enable_thinking."""
    ids, _ = render_chat(tokenizer, question.messages, add_generation_prompt=True, enable_thinking=thinking)
    return Rollout(question, list(question.messages), ids, [False] * len(ids), prompt, member)


def seed_of(*numbers: int) -> int:
    """One seed for these numbers, such as (seed of the run, prompt, member, turn)."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


class Generator:
    """The engine over a snapshot of the weights: make a new one whenever they have changed.

    dtype torch.float32: the weights themselves, so that the engine's log-probabilities are the trainer's; else rounded
    to bf16, as autocast rounds them. max_len: tokens of a whole rollout. seed: that of the run."""

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer, dtype: torch.dtype, max_len: int, seed: int = 0):
        self.source, self.tokenizer, self.max_len, self.seed = model, tokenizer, max_len, seed
        self.training = model.training
        self.model, self.step = snapshot(model, dtype)
        self.stop_ids = tuple(sorted(tokenizer.stop_ids | {model.config.eos_token_id}))

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *error) -> None:
        self.source.train(self.training)

    def complete(
        self,
        rollouts: list[Rollout],
        max_new_tokens: int,
        *,
        greedy: bool = False,
        log_probs: bool = True,
        next_turn: Callable[[Rollout], bool] | None = None,
        show: Callable[[int], None] | None = None,
    ) -> None:
        """Let all of them be answered, SLOTS at once. Members of a group share what is computed of their prompt.

        next_turn(rollout): called when an answer has ended, which is the last of rollout.messages; it may append() what
        comes next and return True for another answer. max_new_tokens: of each answer. A rollout that has no room left
        in max_len ends, truncated. greedy: the likeliest tokens. log_probs: of the first member of each group, nan
        stands for the others', and for all with False. show(done) is called after each step."""
        slots = max(1, min(SLOTS, len(rollouts)))
        engine = Engine(self.model, slots=slots, max_len=self.max_len, compiled=self.step or False)
        running: dict[int, tuple[Rollout, int]] = {}  # by the engine's number; and where the answer begins
        done = 0

        def ask(rollout: Rollout) -> bool:
            if len(rollout.ids) >= self.max_len:
                rollout.truncated = True
                # The end of what somebody else has said: the trainer's rows have no room for it.
                del rollout.ids[self.max_len :], rollout.trained[self.max_len :]
                return False
            params = SamplingParams(
                temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens, stop_token_ids=self.stop_ids,
                seed=seed_of(self.seed, rollout.prompt, rollout.member, rollout.turns),
                top_logprobs=0 if log_probs and rollout.member == 0 else None,
            )  # fmt: skip
            running[engine.add(rollout.ids, params)] = rollout, len(rollout.ids)
            return True

        with torch.compiler.set_stance("force_eager"):
            for rollout in leaders_first(rollouts):
                done += not ask(rollout)
            while engine.busy:
                for event in engine.step():
                    rollout, start = running[event.index]
                    rollout.ids.append(event.token_id)
                    rollout.trained.append(True)
                    rollout.log_probs.append(math.nan if event.logprob is None else event.logprob)
                    if event.finish_reason:
                        del running[event.index]
                        self.end_turn(rollout, start, event.finish_reason == "length")
                        going_on = not rollout.truncated and next_turn is not None and next_turn(rollout)
                        done += not (going_on and ask(rollout))
                if show:
                    show(done)

    def end_turn(self, rollout: Rollout, start: int, cut: bool) -> None:
        """Put the answer that begins at `start` into words."""
        rollout.turns, rollout.truncated = rollout.turns + 1, cut
        rollout.messages.append(as_message(self.tokenizer, rollout.ids[:start], rollout.ids[start:], cut))


def leaders_first(rollouts: list[Rollout]) -> list[Rollout]:
    """One member of each group, then the others: they find the prompt in the cache."""
    leaders = {rollout.prompt: i for i, rollout in reversed(list(enumerate(rollouts)))}
    first = set(leaders.values())
    return [rollouts[i] for i in sorted(range(len(rollouts)), key=lambda i: i not in first)]


def snapshot(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, CpuStep | CudaStep | None]:
    """What to generate with: a copy in the precision of the training; and the faster step where one works."""
    model = copy.deepcopy(model).requires_grad_(False)
    on_cpu = model.inv_freq.device.type == "cpu"
    if on_cpu:
        uninstall(model)
    if dtype != torch.float32:
        model = quantize(model, "bf16") if on_cpu and step_works(model, None) else model.to(dtype)
    return model, decoding_step(model)


def as_message(tokenizer: ChatTokenizer, prompt: list[int], answer: list[int], cut: bool) -> dict:
    """An assistant's message: content, and where there are some reasoning_content, tool_calls, and faults of calls."""
    thinking = tokenizer.opens_thinking(prompt)
    parser = AnswerParser(partial(TextStream, tokenizer), tokenizer.answer_markers, thinking=thinking)
    opened = [Piece(REASONING, "", THINK), Piece(REASONING, "\n")] if thinking else []
    message = to_message([*opened, *parser.parse(answer, cut)])
    more = {name: getattr(message, name) for name in ("reasoning_content", "tool_calls", "faults")}
    return {"role": "assistant", "content": message.content} | {name: value for name, value in more.items() if value}


# ------------------------------------------------------------------------------------------------ groups


@dataclass
class Collected:
    """The rollouts of one step of this process, and what the log should say of them (over all processes)."""

    groups: list[list[Rollout]]  # those that differ in reward
    figures: dict[str, float]
    samples: list[Rollout]  # some, to be read

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group]


def policy_of(run) -> nn.Module:
    """The plain model that answers, with the weights as they are now. All processes must call it."""
    model = run.whole_model()
    return getattr(model, "policy", model)  # beside a critic


def collect(run, draw: Callable[[], list[Question]], play: "OneTurn", compare: bool = True) -> Collected:
    """Groups of --group_size rollouts of the next questions. With `compare` those whose members all have one reward are
    dropped, for there is nothing to compare; if fewer than --enough of --batch_size are left, further questions are
    drawn, --refills times at most. All processes draw equally often."""
    args, start = run.args, time.perf_counter()
    kept, seen = [], []
    with Generator(policy_of(run), run.tokenizer, run.dtype, args.max_seq_len, args.seed) as generator:
        for _ in range(1 + args.refills):
            first = run.progress.samples + run.processes.rank * args.batch_size
            groups = [
                [play.begin(question, first + i, member) for member in range(args.group_size)]
                for i, question in enumerate(draw())
            ]
            play.answer(generator, [rollout for group in groups for rollout in group])
            seen += groups
            kept += [group for group in groups if not compare or len({rollout.reward for rollout in group}) > 1]
            if run.processes.total(len(kept)) >= args.enough * args.batch_size * run.processes.count:
                break
    figures = figures_of(run, seen, kept)
    figures["rollout_seconds"] = round(time.perf_counter() - start, 3)
    return Collected(kept, figures, [group[0] for group in seen[:4]])


def figures_of(run, seen: list[list[Rollout]], kept: list[list[Rollout]]) -> dict[str, float]:
    """Means over the rollouts of all processes."""
    rollouts = [rollout for group in seen for rollout in group]
    sums = {
        "reward": sum(rollout.reward for rollout in rollouts),
        "length": sum(rollout.sampled for rollout in rollouts),
        "truncated": sum(rollout.truncated for rollout in rollouts),
        "calls": sum(rollout.calls for rollout in rollouts),
        "failed_calls": sum(rollout.failed_calls for rollout in rollouts),
    }
    total = run.processes.total
    figures = {name: total(value) / max(total(len(rollouts)), 1) for name, value in sums.items()}
    figures["kept"] = total(len(kept))
    figures["no_variance"] = 1 - total(len(kept)) / max(total(len(seen)), 1)
    return figures


class OneTurn:
    """How questions are played that one answer ends. Another class with begin() and answer() plays other games, such as
    conversations with tools.

    reward(question, messages): of a finished conversation. args: --max_new_tokens and --thinking."""

    def __init__(self, tokenizer: ChatTokenizer, reward: Callable, args):
        self.tokenizer, self.reward, self.args = tokenizer, reward, args
        # Ours thinks when it is asked to; templates of others, such as Qwen3's, unless they are asked not to.
        self.thinking = True if args.thinking else False if tokenizer.has_own_template else None

    def begin(self, question: Question, prompt: int, member: int) -> Rollout:
        return begin(self.tokenizer, question, prompt, member, self.thinking)

    def answer(self, generator: Generator, rollouts: list[Rollout], **options) -> None:
        """Finishes and rewards them; options: of Generator.complete(). An answer that was cut off is worth 0, and so is
        one that the reward cannot judge."""
        generator.complete(rollouts, self.args.max_new_tokens, **options)
        for rollout in rollouts:
            rollout.reward = 0.0 if rollout.truncated else self.reward(rollout.question, rollout.messages) or 0.0


# ------------------------------------------------------------------------------------------------ measuring


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k answers is right, unbiased, from `correct` of n: 1 - C(n - c, k) / C(n, k) (Chen et al.
    2021, arXiv:2107.03374)."""
    fail = 1.0
    for i in range(k):
        fail *= max(n - correct - i, 0) / (n - i)
    return 1 - fail


def interval(share: float, n: int) -> float:
    """Half of the 95 % confidence interval of a share of n questions (normal approximation)."""
    return 1.96 * (share * (1 - share) / max(n, 1)) ** 0.5


def measure(
    generator: Generator, questions: list[Question], play: OneTurn, samples: int, show: Callable[[int], None]
) -> dict[str, float]:
    """{"greedy", "sampled", "pass_at_k", "n"}: shares of the questions that are answered right by the likeliest tokens,
    by one sample (mean of `samples`), by one of `samples`. show(done) is called meanwhile."""
    members = range(samples + 1)
    by_member = [[play.begin(question, i, member) for member in members] for i, question in enumerate(questions)]
    options = {"log_probs": False, "show": show}
    play.answer(generator, [members[0] for members in by_member], greedy=True, **options)
    play.answer(generator, [rollout for members in by_member for rollout in members[1:]], **options)
    n = max(len(questions), 1)
    right = [sum(rollout.reward == 1 for rollout in members[1:]) for members in by_member]
    return {
        "greedy": sum(members[0].reward == 1 for members in by_member) / n,
        "sampled": sum(right) / n / samples,
        "pass_at_k": sum(pass_at_k(samples, count, samples) for count in right) / n,
        "n": len(questions),
    }


@contextlib.contextmanager
def shown(what: str, total: int, quiet: bool):
    """A line on stderr that counts what is done: yields show(done)."""
    tty, last = sys.stderr.isatty(), [time.perf_counter()]

    def show(done: int) -> None:
        now = time.perf_counter()
        if not quiet and now - last[0] > (0.3 if tty else 10):
            last[0] = now
            end = {"end": "", "flush": True} if tty else {}
            print(f"{chr(13) if tty else ''}{what}: {done} of {total}", file=sys.stderr, **end)

    yield show
    if tty and not quiet:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
