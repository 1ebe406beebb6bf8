"""The scoreboard: held-out questions (dataset/questions.py), the answers of a model, how many are right by skill.
eval_model.py --score uses it.
"""

from collections.abc import Callable
from pathlib import Path

from dataset.jsonl import DataError
from dataset.questions import Question, declines, read_heldout
from model.inference.answers import AssistantMessage
from model.inference.chatbot import Chatbot

__all__ = ["Question", "answer_questions", "count_right", "declines", "print_scoreboard", "read_heldout"]


def answer_questions(
    bot: Chatbot, questions: list[Question], file: str | Path, show: Callable[[int], None] = lambda done: None
) -> list[AssistantMessage]:
    """The greedy answers to all questions, which `file` holds; show(done) is called after each. DataError for a
    question that leaves no room for an answer."""
    for question in questions:
        if bot.overflow(question.messages):
            text = f"the question leaves no room for an answer in a context of {bot.max_len}"
            raise DataError(f"{file}, line {question.line}: {text}; raise --max_seq_len")
    answers = [AssistantMessage()] * len(questions)
    for done, (i, message) in enumerate(bot.answer_all([question.messages for question in questions]), 1):
        answers[i] = message
        show(done)
    return answers


def count_right(questions: list[Question], answers: list[AssistantMessage]) -> dict:
    """{"n", "correct", "percent"} over all questions, the same by skill under "skills", and how often it declined
    what it could know: "false_declines" of "knowable"."""

    def count(right: list[bool]) -> dict:
        return {"n": len(right), "correct": sum(right), "percent": round(100 * sum(right) / len(right), 2)}

    right = [question.is_right(answer) for question, answer in zip(questions, answers, strict=True)]
    by_skill: dict[str, list[bool]] = {}
    for question, ok in zip(questions, right, strict=True):
        by_skill.setdefault(question.skill, []).append(ok)
    known = [declines(answer.content) for question, answer in zip(questions, answers, strict=True) if question.knowable]
    skills = {skill: count(oks) for skill, oks in by_skill.items()}
    return count(right) | {"skills": skills, "false_declines": sum(known), "knowable": len(known)}


def print_scoreboard(questions: list[Question], answers: list[AssistantMessage], show_wrong: int = 0) -> None:
    """The table by skill, and the first wrong answers."""
    totals = count_right(questions, answers)
    print(f"{'skill':<20}{'n':>6}{'correct':>9}{'percent':>9}")
    for skill, c in [*totals["skills"].items(), ("overall", totals)]:
        print(f"{skill:<20}{c['n']:>6}{c['correct']:>9}{c['percent']:>9.1f}")
    if totals["knowable"] < totals["n"]:
        print(f"declined, though it could know: {totals['false_declines']} of {totals['knowable']}")
    wrong = [i for i, question in enumerate(questions) if not question.is_right(answers[i])]
    for i in wrong[:show_wrong]:
        print(f"\nline {questions[i].line}, {questions[i].skill}: {questions[i].messages[-1]['content']}")
        print(f"  expected: {questions[i].expected}\n  answered: {answers[i].text}")
