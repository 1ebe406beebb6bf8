"""What OpenAI's clients expect back: whole answers and chunks of streams, for chats and for completions.

reply = ChatReply(request, job, tokenizer)
reply.opening(), reply.chunks(update), reply.closing()     # dicts, one for each server-sent event
reply.whole(updates)
"""

import time
import uuid

from dataset.tokenizer import ChatTokenizer
from server.deltas import CALL, ChatAnswer
from server.errors import ApiError
from server.runner import Job, Update
from server.schemas import ChatRequest, CompletionRequest
from server.scoring import Logprob
from server.web import sse

LAST = b"data: [DONE]\n\n"


class Reply:
    """What all kinds share: the envelope, the usage, and how an event is written."""

    end = LAST
    prefix: str
    objects: tuple[str, str]  # of the whole answer, and of a chunk

    def __init__(self, request: ChatRequest | CompletionRequest, job: Job, tokenizer: ChatTokenizer, model: str):
        self.request, self.job, self.tokenizer, self.model = request, job, tokenizer, model
        self.id, self.created = f"{self.prefix}{uuid.uuid4().hex[:24]}", int(time.time())
        self.with_usage = bool(request.stream_options and request.stream_options.include_usage)

    def envelope(self, kind: str, choices: list[dict]) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def chunk(self, choices: list[dict]) -> dict:
        chunk = self.envelope(self.objects[1], choices)
        return chunk | {"usage": None} if self.with_usage else chunk

    def closing(self) -> list[dict]:
        return [self.envelope(self.objects[1], []) | {"usage": self.usage()}] if self.with_usage else []

    def frame(self, chunk: dict) -> bytes:
        """One server-sent event."""
        return sse(chunk)

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that has failed."""
        return self.frame(error.body())

    def usage(self) -> dict:
        prompt, answer = self.job.prompt_tokens, self.job.generated_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    @property
    def reasoning_tokens(self) -> int:
        answers = [choice.answer for choice in self.job.choices if isinstance(choice.answer, ChatAnswer)]
        return sum(answer.reasoning_tokens for answer in answers)

    def token_text(self, token: int) -> str:
        """A control token, which is no text, by its name."""
        if self.request.return_tokens_as_token_ids:
            return f"token_id:{token}"
        return self.token_bytes(token).decode("utf-8", "replace") or self.tokenizer.id_to_token(token) or ""

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)


class ChatReply(Reply):
    prefix, objects = "chatcmpl-", ("chat.completion", "chat.completion.chunk")

    def __init__(self, *args):
        super().__init__(*args)
        self.unopened: set[int] = set()  # choices whose first chunk waits for what comes: a call has a null content

    def opening(self) -> list[dict]:
        """The role comes first, for each choice."""
        if self.request.choice_of_tool.mode != "none":
            self.unopened = set(range(len(self.job.choices)))
        return [self._first(i, "") for i in range(len(self.job.choices)) if i not in self.unopened]

    def _first(self, choice: int, content: str | None) -> dict:
        return self._chunk(choice, {"role": "assistant", "content": content})

    def chunks(self, update: Update) -> list[dict]:
        chunks = self._chunks(update)
        if chunks and update.choice in self.unopened:
            self.unopened.discard(update.choice)
            calls = self.request.choice_of_tool.mode == "required" or any(CALL in delta for delta in update.deltas)
            chunks.insert(0, self._first(update.choice, None if calls else ""))
        return chunks

    def _chunks(self, update: Update) -> list[dict]:
        deltas = update.deltas
        if self.request.logprobs and update.logprob and not deltas:
            deltas = [{"content": ""}]  # a token that shows nothing yet, such as a part of a character
        chunks = [self._chunk(update.choice, delta) for delta in deltas]
        if update.logprob and chunks:
            chunks[0]["choices"][0]["logprobs"] = {"content": [self._logprob(update.logprob)], "refusal": None}
        if update.finish_reason:
            chunks.append(self._chunk(update.choice, {}, self._finish_reason(update)))
        return chunks

    def _chunk(self, choice: int, delta: dict, reason: str | None = None) -> dict:
        return self.chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def _finish_reason(self, update: Update) -> str:
        called = self.job.choices[update.choice].answer.calls
        return "tool_calls" if called and update.finish_reason == "stop" else update.finish_reason

    def whole(self, updates: list[Update]) -> dict:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": None}, "logprobs": None, "finish_reason": None}
            for i in range(len(self.job.choices))
        ]
        for update in updates:
            choice = choices[update.choice]
            for delta in update.deltas:
                add_delta(choice["message"], delta)
            if update.logprob:
                choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"]["content"].append(self._logprob(update.logprob))
            if update.finish_reason:
                choice["finish_reason"] = self._finish_reason(update)
        for choice in choices:
            for call in choice["message"].get("tool_calls", ()):
                del call["index"]  # only chunks number them
            if "tool_calls" not in choice["message"]:
                choice["message"]["content"] = choice["message"]["content"] or ""
        return self.envelope(self.objects[0], choices) | {"usage": self.usage()}

    def usage(self) -> dict:
        return super().usage() | {"completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens}}

    def _logprob(self, logprob: Logprob) -> dict:
        top = [self._token(token, value) for token, value in logprob.top]
        return self._token(logprob.token, logprob.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict:
        return {"token": self.token_text(token), "logprob": logprob, "bytes": list(self.token_bytes(token))}


def add_delta(message: dict, delta: dict) -> None:
    """What a client does with it: texts grow, and so do the arguments of the call of the same index."""
    for key, value in delta.items():
        if key != CALL:
            message[key] = (message.get(key) or "") + value
            continue
        for part in value:
            calls = message.setdefault(CALL, [])
            if part["index"] == len(calls):
                calls.append(part | {"function": dict(part["function"])})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]


class CompletionReply(Reply):
    prefix, objects = "cmpl-", ("text_completion", "text_completion")

    def __init__(self, *args):
        super().__init__(*args)
        self.offsets = [0] * len(self.job.choices)  # characters of each text so far
        self.scores = self.request.echo and self.request.logprobs is not None

    def opening(self) -> list[dict]:
        """The prompts, if they are to be echoed, but for those whose tokens are scored: they come with their scores."""
        if not self.request.echo or self.scores:
            return []
        return [self._chunk(i, self._prompt(i)) for i in range(len(self.job.choices))]

    def _prompt(self, choice: int) -> str:
        if not self.request.echo:
            return ""
        prompt = self.request.prompts[choice // self.request.sequences]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def chunks(self, update: Update) -> list[dict]:
        text, logprobs = self._text(update), self._logprobs([update])
        if not text and not logprobs and not update.finish_reason:
            return []
        return [self._chunk(update.choice, text, logprobs, update.finish_reason)]

    def _chunk(self, choice: int, text: str, logprobs: dict | None = None, reason: str | None = None) -> dict:
        return self.chunk([{"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}])

    def _text(self, update: Update) -> str:
        prompt = self._prompt(update.choice) if self.scores and update.prompt else ""
        return prompt + "".join(delta["text"] for delta in update.deltas)

    def _logprobs(self, updates: list[Update]) -> dict | None:
        """Of one choice, in the form that this older interface has."""
        if self.request.logprobs is None:
            return None
        have = [logprob for update in updates for logprob in (*self._scored(update), update.logprob) if logprob]
        if not have:
            return None
        offsets, choice = [], updates[0].choice
        for logprob in have:
            offsets.append(self.offsets[choice])
            self.offsets[choice] += len(self.tokenizer.decode([logprob.token]))
        return {
            "tokens": [self.token_text(logprob.token) for logprob in have],
            "token_logprobs": [logprob.logprob for logprob in have],
            "top_logprobs": [self._top(logprob) for logprob in have],
            "text_offset": offsets,
        }

    def _scored(self, update: Update) -> list[Logprob]:
        """The prompt's tokens; of a text, without the one that we have put before it."""
        is_text = isinstance(self.request.prompts[update.choice // self.request.sequences], str)
        prefix = len(self.tokenizer.text_prefix) if is_text else 0
        if not update.prompt or not prefix or len(update.prompt) == prefix:
            return update.prompt or []
        first, *rest = update.prompt[prefix:]
        return [Logprob(first.token, None, None), *rest]

    def _top(self, logprob: Logprob) -> dict[str, float] | None:
        """The likeliest tokens by their texts, and the token itself. Of two with one text the likelier counts."""
        if logprob.top is None:
            return None
        top = {}
        for token, value in [*logprob.top, (logprob.token, logprob.logprob)]:
            top.setdefault(self.token_text(token), value)
        return top

    def whole(self, updates: list[Update]) -> dict:
        choices = []
        for i in range(len(self.job.choices)):
            own = [update for update in updates if update.choice == i]
            text = ("" if self.scores else self._prompt(i)) + "".join(map(self._text, own))
            reason = next(update.finish_reason for update in own if update.finish_reason)
            choices.append({"index": i, "text": text, "logprobs": self._logprobs(own), "finish_reason": reason})
        return self.envelope(self.objects[0], self._best(choices)) | {"usage": self.usage()}

    def _best(self, choices: list[dict]) -> list[dict]:
        """The n choices of each prompt that are likeliest for each of their tokens."""
        made, wanted = self.request.sequences, self.request.n or 1
        if made == wanted:
            return choices
        mean = [choice.logprob / max(1, choice.tokens) for choice in self.job.choices]
        groups = [choices[at : at + made] for at in range(0, len(choices), made)]
        best = [sorted(group, key=lambda choice: -mean[choice["index"]])[:wanted] for group in groups]
        return [choice | {"index": n} for n, choice in enumerate(choice for group in best for choice in group)]
