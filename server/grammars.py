"""What an answer may say: JSON of a schema, one of some texts, calls of given functions; token by token, by llguidance.

grammars = Grammars(tokenizer, vocab_size)
constraint = grammars.answer(AnswerFormat("json", {"type": "object"}, "response_format"), thinking=False)
constraint = grammars.call(tools, thinking=False)            # for SamplingParams(constraint=...)
"""

import json
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from dataset.tokenizer import END_THINK, END_TOOL_CALL, TOOL_CALL, ChatTokenizer
from server.errors import ApiError
from server.fields import note
from server.json_schemas import TooLarge, prepare
from server.schemas import AnswerFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# The spaces that json.dumps writes, as in the training data; a model that likes blanks could otherwise go on for ever.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What the grammar cannot hold is left out: get_grammar_warnings() then says what.
LENIENT = {"lenient": True, "coerce_one_of": True}
NO_ARGUMENTS = {"type": "object", "properties": {}}


class Grammars:
    """Compiles grammars for one tokenizer. A constraint belongs to one sequence; its copy() makes more. ApiError 400,
    which names the parameter, for what cannot be enforced, or if the server lacks the package for it."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size

    def answer(self, wanted: AnswerFormat, *, thinking: bool, tools: list[dict] | None = None) -> "GrammarConstraint":
        """An answer of this format, after the rest of its thinking; or a call of one of the tools instead, if given."""
        options = ["@content"] + ["calls"] * bool(tools)
        return self._compile(options, tools or [], thinking, wanted.param, wanted)

    def call(self, tools: list[dict], *, thinking: bool) -> "GrammarConstraint":
        """One call of one of these tools (OpenAI schemas), after the rest of the model's thinking."""
        return self._compile(["calls"], tools, thinking, "tools")

    @cached_property
    def marked(self) -> "LLTokenizer":
        """The tokenizer with its markers, which no text can match."""
        from llguidance import LLTokenizer

        copy = Tokenizer.from_str(self.tokenizer.files["tokenizer.json"])
        copy.add_special_tokens([AddedToken(marker, special=True) for marker in self.tokenizer.marker_ids])
        return LLTokenizer(copy.to_str(), eos_token=self.tokenizer.eos_id)

    def _compile(
        self, options: list[str], tools: list[dict], thinking: bool, param: str, wanted: AnswerFormat | None = None
    ) -> "GrammarConstraint":
        try:
            from llguidance import LLMatcher
        except ImportError:
            text = f"{param}: this server cannot keep an answer to a schema; it needs pip install llguidance"
            raise ApiError(400, text, param=param) from None
        try:
            start = [{"lark_grammar": self._start(options, thinking, self._calls(tools))}]
            content = [{"name": "content"} | self._content(wanted)] if wanted else []
            matcher = LLMatcher(self.marked, json.dumps({"grammars": start + content}), log_level=0)
        except RecursionError:
            raise ApiError(400, f"{param} is nested too deeply", param=param) from None
        except (ValueError, TooLarge) as error:
            raise ApiError(400, f"{param}: {_one_line(str(error))}", param=param) from None
        if matcher.is_error():
            raise ApiError(400, f"{param}: {_one_line(matcher.get_error())}", param=param)
        for warning in matcher.get_grammar_warnings():
            self._leave_out(_one_line(warning))
        return GrammarConstraint(matcher, self.vocab_size)

    def _content(self, wanted: AnswerFormat) -> dict:
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import any_to_lark

        if wanted.kind == "json":
            return {"json_schema": self._schema(wanted.value)}
        if wanted.kind == "choice":
            return {"lark_grammar": "start: " + " | ".join(map(json.dumps, wanted.value))}
        if wanted.kind == "regex":
            inner = wanted.value.removeprefix("^")  # the whole answer has to match anyway
            ends = inner.endswith("$") and (len(inner) - len(inner[:-1].rstrip("\\"))) % 2 == 1
            (grammar,) = json.loads(LLMatcher.grammar_from_regex(inner[:-1] if ends else inner))["grammars"]
            return {"lark_grammar": grammar["lark_grammar"]}
        try:
            return {"lark_grammar": any_to_lark(wanted.value)}
        except Exception as error:  # GbnfToLarkError, or what it stumbles over
            raise ValueError(str(error)) from None

    def _calls(self, tools: list[dict]) -> list[str]:
        if not tools:
            return []
        ids = self.tokenizer.marker_ids
        if TOOL_CALL not in ids or END_TOOL_CALL not in ids:
            text = f"this model has no tokens for {TOOL_CALL} and {END_TOOL_CALL}: it can call no tools"
            raise ApiError(400, text, param="tools")
        rules = [rf'calls: <[{ids[TOOL_CALL]}]> "\n" (call_' + " | call_".join(map(str, range(len(tools)))) + ")"]
        rules[0] += rf' "\n" <[{ids[END_TOOL_CALL]}]>'
        for n, tool in enumerate(tools):
            function = tool["function"]
            parameters = {"type": "object"} | (function.get("parameters") or NO_ARGUMENTS)
            begin = f'{{"name": {json.dumps(function["name"])}, "arguments": '
            # json.dumps: everything beyond ASCII as escapes, so nothing in a schema can end the line or the rule.
            rules.append(f'call_{n}: {json.dumps(begin)} %json {json.dumps(self._schema(parameters))} "}}"')
        return rules

    def _start(self, options: list[str], thinking: bool, rules: list[str]) -> str:
        before = f"THOUGHT <[{self.tokenizer.marker_ids[END_THINK]}]> " + r'"\n\n" ' if thinking else ""
        start = f"start: {before}({' | '.join(options)})"
        return "\n".join(["%llguidance {}", start, *rules, *([r"THOUGHT: /(.|\n)*/"] if thinking else ())])

    def _schema(self, schema: dict) -> dict:
        schema, left_out = prepare(schema, self._can_match)
        for what in left_out:
            self._leave_out(what)
        return schema | {"x-guidance": SPACING | LENIENT}

    def _can_match(self, pattern: str) -> bool:
        from llguidance import LLMatcher

        schema = {"type": "string", "pattern": pattern}
        return not LLMatcher.validate_grammar(json.dumps({"grammars": [{"json_schema": schema}]}), self.marked)

    def _leave_out(self, what: str) -> None:
        note("schema", what, f"left out of a schema, because no grammar can hold it: {what}")


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


def _one_line(text: str) -> str:
    """What is wrong, without the excerpts; a faulty regex has its reason on a line of its own."""
    lines = text.strip().splitlines() or ["not a schema that can be enforced"]
    reason = next((line.removeprefix("error:") for line in lines if line.startswith("error: ")), "")
    return (lines[0] + reason)[:300]
