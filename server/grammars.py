"""What an answer may say: JSON of a schema, or calls of given functions, token by token, through llguidance.

grammars = Grammars(tokenizer, vocab_size)
constraint = grammars.compile(json_grammar({"type": "object"}))   # for SamplingParams(constraint=...)
"""

import json
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from dataset.chat import END_THINK_ID, END_TOOL_CALL_ID, TOOL_CALL_ID
from dataset.tokenizer import ChatTokenizer
from server.errors import ApiError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# The spaces that json.dumps writes, as in the training data; a model that likes blanks could otherwise go on for ever.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Compiles grammars for one tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size

    @cached_property
    def marked(self) -> "LLTokenizer":
        """The tokenizer with its markers, which no text can match."""
        from llguidance import LLTokenizer

        copy = Tokenizer.from_str(self.tokenizer.files["tokenizer.json"])
        copy.add_special_tokens([AddedToken(marker, special=True) for marker in self.tokenizer.marker_ids])
        return LLTokenizer(copy.to_str(), eos_token=self.tokenizer.eos_id)

    def compile(self, lark: str, param: str) -> "GrammarConstraint":
        """The constraint of a grammar, which belongs to one sequence; its copy() makes more. ApiError 400, which names
        `param`, if a schema in it is not one that can be enforced, or the server lacks the package for it."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            text = f"{param}: this server cannot keep an answer to a schema; it needs pip install llguidance"
            raise ApiError(400, text, param=param) from None
        try:
            matcher = LLMatcher(self.marked, LLMatcher.grammar_from_lark(lark), log_level=0)
        except ValueError as error:
            raise ApiError(400, f"{param}: {_first_line(str(error))}", param=param) from None
        if matcher.is_error():
            raise ApiError(400, f"{param}: {_first_line(matcher.get_error())}", param=param)
        return GrammarConstraint(matcher, self.vocab_size)


class GrammarConstraint:
    """As model.inference.sampling.Constraint."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def copy(self) -> "GrammarConstraint":
        return GrammarConstraint(self.matcher.deep_copy(), self.vocab_size)

    @property
    def failed(self) -> bool:
        """The grammar became too complex to go on, so the answer ended early."""
        return self.matcher.is_error()

    def mask(self) -> Tensor:
        allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
        if not self.matcher.is_stopped():  # it is, too, after an error
            values = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
            if not self.matcher.is_error():
                allowed[: len(values)] = values.bool()
        return allowed

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)


def json_grammar(schema: dict, *, thinking: bool, tools: list[dict] | None = None) -> str:
    """An answer in JSON of this schema, after the rest of its thinking; or calls of the tools instead, if given."""
    options = ["json"] + ["calls"] * bool(tools)
    return _grammar(options, thinking, [f"json: {_json(schema)}", *(_calls(tools) if tools else ())])


def call_grammar(tools: list[dict], *, thinking: bool) -> str:
    """One call of one of these tools (OpenAI schemas), after the rest of the model's thinking."""
    return _grammar(["calls"], thinking, _calls(tools))


def _grammar(options: list[str], thinking: bool, rules: list[str]) -> str:
    before = f"THOUGHT <[{END_THINK_ID}]> " + r'"\n\n" ' if thinking else ""
    start = f"start: {before}({' | '.join(options)})"
    return "\n".join(["%llguidance {}", start, *rules, *([r"THOUGHT: /(.|\n)*/"] if thinking else ())])


def _calls(tools: list[dict]) -> list[str]:
    rules = [rf'calls: <[{TOOL_CALL_ID}]> "\n" (call_' + " | call_".join(map(str, range(len(tools)))) + ")"]
    rules[0] += rf' "\n" <[{END_TOOL_CALL_ID}]>'
    for n, tool in enumerate(tools):
        function = tool["function"]
        parameters = {"type": "object"} | (function.get("parameters") or {})
        begin = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        rules.append(f'call_{n}: {json.dumps(begin)} {_json(parameters)} "}}"')
    return rules


def _json(schema: dict) -> str:
    # Everything beyond ASCII as escapes: so nothing in a schema can end the line or the rule.
    return "%json " + json.dumps(schema | {"x-guidance": SPACING})


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["not a schema that can be enforced"])[0][:300]
