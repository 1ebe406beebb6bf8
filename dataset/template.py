"""The chat templates of other models: Jinja -> token ids and loss mask, and nobody can forge a turn.

Used by chat.render_chat() for tokenizers that bring a template of their own.
"""

import json
import os
import re
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from dataset.tokenizer import ChatTokenizer

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def render_template(
    tokenizer: ChatTokenizer,
    messages: list[dict],
    tools: list[dict],
    add_generation_prompt: bool,
    enable_thinking: bool | None,
    turn_end_id: int | None,
) -> tuple[list[int], list[int]]:
    """As chat.render_chat(), by the tokenizer's own template; `messages` in OpenAI's form, their calls as objects.

    What the template itself writes is searched for markers, and the rest is not: in data, each marker is broken by a
    character that the data does not have, which is taken out again once the text is cut at the whole ones. What an
    assistant's turn adds to the prompt before it is trained on, up to and with the marker `turn_end_id`.
    """
    breaker = _unused_character([messages, tools])
    markers = _markers(tokenizer)

    def broken(value: Any) -> Any:
        if isinstance(value, str):
            return markers.sub(lambda found: f"{found[0][0]}{breaker}{found[0][1:]}", value)
        if isinstance(value, dict):
            return {broken(key): broken(item) for key, item in value.items()}
        return [broken(item) for item in value] if isinstance(value, list) else value

    safe, safe_tools = broken(messages), broken(tools)

    def text_of(messages: list[dict], prompt: bool, thinking: bool | None) -> str:
        return _jinja(tokenizer, messages, safe_tools, prompt, thinking)

    text = text_of(safe, add_generation_prompt, enable_thinking)
    without = [{name: value for name, value in message.items() if name != "tool_calls"} for message in safe]
    if not add_generation_prompt and without != safe and text == text_of(without, False, enable_thinking):
        raise ValueError(f"the chat template of {tokenizer.source} has no place for tool calls")
    strange = _unused_character([messages, tools, breaker])
    starts = [
        _start_of_answer(text, safe, n, strange, text_of)
        for n, message in enumerate(safe)
        if message["role"] == "assistant" and not add_generation_prompt
    ]
    return _to_ids(tokenizer, text, starts, markers, breaker, turn_end_id)


def _start_of_answer(text: str, messages: list[dict], n: int, strange: str, text_of) -> int:
    """Where in `text` message n begins, behind what a prompt for it ends with. strange: what no message has."""
    thinks = "reasoning_content" in messages[n]
    # Without thinking, a template may put an empty block into the prompt, and with it, the marker that opens one.
    for thinking in (None, True) if thinks else (False, None):
        prompt = text_of(messages[:n], True, thinking)
        if text.startswith(prompt):
            return len(prompt)
    # Every prompt may open a block of thinking that the answers, or those before the last, have lost. Then an answer
    # begins where the text changes with its first letter.
    other = {name: strange + messages[n][name] for name in ("content", "reasoning_content") if name in messages[n]}
    changed = text_of([*messages[:n], messages[n] | other, *messages[n + 1 :]], False, None)
    start = len(os.path.commonprefix([text, changed]))
    if prompt.startswith(text[:start]):
        return start
    raise ValueError("the chat template writes this conversation in another way than the prompts for its answers")


def _to_ids(
    tokenizer: ChatTokenizer, text: str, starts: list[int], markers: re.Pattern, breaker: str, turn_end_id: int | None
) -> tuple[list[int], list[int]]:
    """Ids and mask of rendered text; each answer begins at one of `starts`."""
    ids: list[int] = []
    mask: list[int] = []
    trained, waiting = 0, sorted(starts)

    def write(piece: str, after_marker: bool) -> None:
        text = piece.replace(breaker, "")
        new = tokenizer.encode_piece(text, not ids, after_marker) if text else []
        ids.extend(new)
        mask.extend([trained] * len(new))

    at, after_marker = 0, False
    for found in [*markers.finditer(text), None]:
        end = len(text) if found is None else found.start()
        while waiting and waiting[0] <= end:
            write(text[at : waiting[0]], after_marker)
            start = waiting.pop(0)
            at, trained, after_marker = start, 1, after_marker and at == start
        before, after = tokenizer.takes_blanks.get(found[0], (False, False)) if found else (False, False)
        write(text[at:end].rstrip() if before else text[at:end], after_marker)
        if found is None:
            return ids, mask
        ids.append(tokenizer.marker_ids[found[0]])
        mask.append(trained)
        at, after_marker = found.end(), True
        if after:
            at = len(text) - len(text[at:].lstrip())
        if ids[-1] == turn_end_id:
            trained = 0
    return ids, mask


def turn_end(tokenizer: ChatTokenizer) -> int | None:
    """The marker that ends an assistant's turn; None if there is none, or the template does not say."""
    talks = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": content}] for content in ("!", "~")]
    try:
        text, other = (_jinja(tokenizer, talk, [], False, None) for talk in talks)
    except ValueError:
        return None
    answer = len(os.path.commonprefix([text, other]))
    found = _markers(tokenizer).search(text, answer) if text != other else None
    token = tokenizer.marker_ids[found[0]] if found else None
    return token if token in tokenizer.hidden_ids else None


def _markers(tokenizer: ChatTokenizer) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokenizer.marker_ids, key=len, reverse=True))) or r"(?!)")


def _unused_character(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return next(char for char in map(chr, range(0xE000, 0xF900)) if char not in text)


# ------------------------------------------------------------------------------------------------ Jinja


def _jinja(
    tokenizer: ChatTokenizer, messages: list[dict], tools: list[dict], prompt: bool, thinking: bool | None
) -> str:
    """The text that the template writes, as transformers calls it. ValueError if it refuses."""
    special = {name: text for name in _SPECIAL if (text := tokenizer.special(name)) is not None}
    # Three names for one switch: of Qwen and most others, of MiniMind, of DeepSeek.
    options = {} if thinking is None else dict.fromkeys(("enable_thinking", "open_thinking", "thinking"), thinking)
    values = {"messages": messages, "tools": tools or None, "documents": None, "add_generation_prompt": prompt}
    try:
        return _compiled(tokenizer.template_text).render(**values, **special, **options)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {tokenizer.source} refuses this: {error}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(f"the chat template of {tokenizer.source} fails: {error}") from None


@lru_cache(8)
def _compiled(text: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(text)


def _to_json(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates mark what an assistant says."""

    tags = {"generation"}

    def parse(self, parser) -> list:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
