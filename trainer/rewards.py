"""What an answer is worth: plain functions (question, messages) -> float, or None where they cannot judge.

messages: the whole conversation; the last one is the answer, as rollout.as_message() gives it.
"""

from dataset.questions import Question
from model.inference.answers import AssistantMessage
from trainer.rollout import seed_of


def right_answer(question: Question, messages: list[dict]) -> float | None:
    """1 for an answer that the scoreboard would count as right, else 0; None where nobody has answered."""
    last = messages[-1]
    if last["role"] != "assistant":
        return None
    answer = AssistantMessage(last["content"], tool_calls=last.get("tool_calls", []), faults=last.get("faults", []))
    return float(question.is_right(answer))


def coin(question: Question, messages: list[dict]) -> float | None:
    """0 or 1 by the text alone, whatever is right: whoever learns something from this has a mistake in the program."""
    return float(seed_of(question.line, repr(messages[-1])) % 2)


REWARDS = {"right": right_answer, "random": coin}
