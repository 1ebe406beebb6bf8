"""Conversations in which the model calls the built-in tools, as a game for rollout.collect(): token in, token out.

play = ToolTurns(tokenizer, REWARDS["right"], args)

The next prompt is the one before, what was sampled, and the rendered results. Nothing that the model has said is
written anew: so what is trained is what was sampled, and the engine computes only what has come.
"""

import argparse
import json
import sys
from functools import cache, partial

from dataset.chat import parse_tools, render_chat
from dataset.jsonl import DataError
from dataset.questions import Question, Questions, read_heldout
from dataset.tokenizer import ChatTokenizer
from model.inference.tools import SCHEMAS, TOOLS, run_tool
from trainer.rollout import Generator, OneTurn, Rollout

MANY = 20  # calls, of which one should work
CALL_ROUNDS = 4  # calls, results, calls, ... for one question, at most: as in eval_model.py
OURS = {"calculate_math": "calculator", "unit_converter": "convert"}  # MiniMind's names of tools that we have


def result_ids(tokenizer: ChatTokenizer, results: list[str], thinking: bool | None = None) -> list[int]:
    """What the template writes behind an answer with calls: their results, and the beginning of the next answer.
    thinking: as render_chat's enable_thinking. DataError for a template that writes the calls in another way once
    results follow."""
    calls = {"role": "assistant", "content": "", "tool_calls": [{"name": "?", "arguments": {}}] * len(results)}
    for thought in ({}, {"reasoning_content": "?"}):  # some write an empty thought before the last answer alone
        talk = [{"role": "user", "content": "?"}, calls | thought]
        before = render_chat(tokenizer, talk)[0]
        end = max((i for i, token in enumerate(before) if token in tokenizer.stop_ids), default=-1) + 1
        talk += [{"role": "tool", "content": result} for result in results]
        after = render_chat(tokenizer, talk, add_generation_prompt=True, enable_thinking=thinking)[0]
        if end and after[:end] == before[:end]:
            return after[end:]
    raise DataError(f"{tokenizer.source}: its chat template has no turns of tools that can be appended")


def carry_out(rollout: Rollout, tokenizer: ChatTokenizer, thinking: bool | None = None) -> bool:
    """Carries out the calls of the last answer and appends their results; False if that was the end: there are none, or
    it was call after call, and then the rollout counts as cut off."""
    calls = rollout.messages[-1].get("tool_calls", [])
    rollout.calls += len(calls)
    if calls and rollout.turns > CALL_ROUNDS:
        rollout.truncated = True
    if not calls or rollout.truncated:
        return False
    results = [run_tool(**call) for call in calls]
    rollout.failed_calls += sum("error" in json.loads(result) for result in results)
    said = [{"role": "tool", "content": result} for result in results]
    rollout.append(result_ids(tokenizer, results, thinking), said)
    return True


class ToolTurns(OneTurn):
    """Answers with their calls and results, until one without a call. args: --failed_call_cost too."""

    def answer(self, generator: Generator, rollouts: list[Rollout], **options) -> None:
        """The reward is for the last answer alone, less --failed_call_cost for each call that got an error back."""
        next_turn = partial(carry_out, tokenizer=self.tokenizer, thinking=self.thinking)
        super().answer(generator, rollouts, next_turn=next_turn, **options)
        calls, failed = (sum(getattr(rollout, name) for rollout in rollouts) for name in ("calls", "failed_calls"))
        if failed == calls >= MANY:
            last = next(m["content"] for rollout in rollouts for m in rollout.messages if m["role"] == "tool")
            _say_once(f"note: all of {calls} calls got an error back, such as {last}: does the model know these tools?")
        for rollout in rollouts:
            rollout.reward -= self.args.failed_call_cost * rollout.failed_calls


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def with_our_tools(questions: Questions, path: str, quiet: bool) -> Questions:
    """Those that offer no other tools than the built-in ones, or MiniMind's names of them, which become ours, or none;
    the others are counted in one line. DataError if that leaves none."""
    kept = Questions(offered for question in questions if (offered := _offering(question)))
    kept.sha256 = questions.sha256
    others = len(questions) - len(kept)
    why = f"offer tools that are not built in (those are {', '.join(TOOLS)})"
    if not kept:
        raise DataError(f"{path}: all {others} questions {why}")
    if others and not quiet:
        print(f"{path}: {others} of {len(questions)} questions left out: they {why}", file=sys.stderr)
    return kept


def _offering(question: Question) -> Question | None:
    """The question with the tools that it offers under our names; None if there are others among them."""
    system = question.messages[0] if question.messages[0]["role"] == "system" else {}
    names = [(tool.get("function") or tool).get("name") for tool in parse_tools(system.get("tools"))]
    ours = [OURS.get(name, name) for name in names]
    if not set(ours) <= set(TOOLS):
        return None
    if ours != names:
        schemas = [schema for schema in SCHEMAS if schema["function"]["name"] in ours]
        question.messages[0] = system | {"tools": json.dumps(schemas)}
    return question


def agent_tiers(questions: Questions | None, args: argparse.Namespace) -> dict[str, list[Question]]:
    """--measure of the held-out questions of each kind, and beside the starter tasks the questions of the scoreboard,
    which must not be forgotten."""
    tiers: dict[str, list[Question]] = {}
    for question in questions or ():
        tiers.setdefault(question.skill, []).append(question)
    # What nobody has shown comes first.
    tiers = {name: tiers[name][: args.measure] for name in sorted(tiers, key=lambda name: name != "three_calls")}
    if args.data_path is None and args.measure:
        from dataset.starter.corpus import ensure_starter

        tiers["all skills"] = read_heldout(ensure_starter() / "heldout.jsonl")
    return tiers
