"""What OpenAI's clients expect back: whole answers and chunks of streams, for chats and for completions.

reply = ChatReply(request, job, tokenizer)
reply.opening(), reply.chunks(update), reply.usage_chunk()     # dicts, one for each server-sent event
reply.whole(updates)
"""

import time
import uuid

from dataset.tokenizer import ChatTokenizer
from server.deltas import ChatAnswer
from server.runner import Job, Logprob, Update
from server.schemas import ChatRequest, CompletionRequest


class Reply:
    """What both kinds share: the envelope and the usage."""

    prefix: str
    objects: tuple[str, str]  # of the whole answer, and of a chunk

    def __init__(self, request: ChatRequest | CompletionRequest, job: Job, tokenizer: ChatTokenizer):
        self.request, self.job, self.tokenizer = request, job, tokenizer
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex[:24]}", int(time.time())
        self.with_usage = bool(request.stream_options and request.stream_options.include_usage)

    def envelope(self, kind: str, choices: list[dict]) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model, "choices": choices}

    def chunk(self, choices: list[dict]) -> dict:
        chunk = self.envelope(self.objects[1], choices)
        return chunk | {"usage": None} if self.with_usage else chunk

    def usage_chunk(self) -> dict:
        return self.envelope(self.objects[1], []) | {"usage": self.usage()}

    def usage(self) -> dict:
        # A prompt is counted once, however many choices continue it.
        prompts = {id(choice.prompt): len(choice.prompt) for choice in self.job.choices}
        prompt, answer = sum(prompts.values()), sum(choice.tokens for choice in self.job.choices)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def token_text(self, token: int) -> str:
        """A control token, which is no text, by its name."""
        return self.token_bytes(token).decode("utf-8", "replace") or self.tokenizer.id_to_token(token) or ""

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)


class ChatReply(Reply):
    prefix, objects = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def opening(self) -> list[dict]:
        """The role comes first, for each choice."""
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.job.choices))]

    def chunks(self, update: Update) -> list[dict]:
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
                for key, value in delta.items():
                    choice["message"][key] = (choice["message"].get(key) or type(value)()) + value
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
        answers = [choice.answer for choice in self.job.choices if isinstance(choice.answer, ChatAnswer)]
        reasoning = sum(answer.reasoning_tokens for answer in answers)
        return super().usage() | {"completion_tokens_details": {"reasoning_tokens": reasoning}}

    def _logprob(self, logprob: Logprob) -> dict:
        top = [self._token(token, value) for token, value in logprob.top]
        return self._token(logprob.token, logprob.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict:
        return {"token": self.token_text(token), "logprob": logprob, "bytes": list(self.token_bytes(token))}


class CompletionReply(Reply):
    prefix, objects = "cmpl", ("text_completion", "text_completion")

    def __init__(self, *args):
        super().__init__(*args)
        self.offsets = [0] * len(self.job.choices)  # characters of each text so far

    def opening(self) -> list[dict]:
        """The prompts, if they are to be echoed."""
        if not self.request.echo:
            return []
        return [self._chunk(i, self._prompt(i)) for i in range(len(self.job.choices))]

    def _prompt(self, choice: int) -> str:
        if not self.request.echo:
            return ""
        prompt = self.request.prompts[choice // (self.request.n or 1)]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def chunks(self, update: Update) -> list[dict]:
        text, logprobs = self._text(update), self._logprobs([update])
        if not text and not logprobs and not update.finish_reason:
            return []
        return [self._chunk(update.choice, text, logprobs, update.finish_reason)]

    def _chunk(self, choice: int, text: str, logprobs: dict | None = None, reason: str | None = None) -> dict:
        return self.chunk([{"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}])

    def _text(self, update: Update) -> str:
        return "".join(delta["text"] for delta in update.deltas)

    def _logprobs(self, updates: list[Update]) -> dict | None:
        """Of one choice, in the form that this older interface has."""
        have = [(update, update.logprob) for update in updates if update.logprob]
        if not have:
            return None
        offsets = []
        for update, logprob in have:
            offsets.append(self.offsets[update.choice])
            self.offsets[update.choice] += len(self.token_text(logprob.token))
        return {
            "tokens": [self.token_text(logprob.token) for _, logprob in have],
            "token_logprobs": [logprob.logprob for _, logprob in have],
            "top_logprobs": [{self.token_text(token): p for token, p in logprob.top} for _, logprob in have],
            "text_offset": offsets,
        }

    def whole(self, updates: list[Update]) -> dict:
        choices = []
        for i in range(len(self.job.choices)):
            own = [update for update in updates if update.choice == i]
            text = self._prompt(i) + "".join(map(self._text, own))
            reason = next(update.finish_reason for update in own if update.finish_reason)
            choices.append({"index": i, "text": text, "logprobs": self._logprobs(own), "finish_reason": reason})
        return self.envelope(self.objects[0], choices) | {"usage": self.usage()}
