"""From a checked request to the sequences that the engine generates: models, prompts, limits, sampling.

service = Service(bot, adapters, settings)
request, job = service.prepare_chat(body)       # in any thread; raises ApiError
"""

import time
from dataclasses import dataclass

from dataset.chat import render_chat
from model.inference.chatbot import Chatbot, no_calls
from model.inference.engine import SamplingParams
from server.deltas import ChatAnswer, TextAnswer
from server.errors import ApiError
from server.grammars import GrammarConstraint, Grammars
from server.messages import conversation
from server.reading import check_request, read_body
from server.runner import Choice, Job
from server.schemas import ChatRequest, CommonRequest, CompletionRequest

ROOM = 8  # a prompt may fill the context but for one part in ROOM, or for max_tokens if that is less


@dataclass
class Settings:
    """What a request gets that does not say otherwise, and what none may exceed."""

    model_name: str
    temperature: float
    top_p: float
    max_new_tokens: int | None  # None: as many as the context has room for
    max_prompt_tokens: int | None
    thinking: bool | None  # None: as the model likes


class Service:
    def __init__(self, bot: Chatbot, adapters: list[str], settings: Settings):
        self.bot, self.settings = bot, settings
        self.tokenizer = bot.tokenizer
        self.vocab_size = bot.model.config.vocab_size
        self.grammars = Grammars(bot.tokenizer, self.vocab_size)
        name = settings.model_name
        self.models: dict[str, str | None] = {name: None} | {f"{name}:{a}": a for a in adapters}  # id -> adapter
        self.created = int(time.time())
        self.longest_token = max(len(bot.tokenizer.token_bytes(i)) for i in range(bot.tokenizer.vocab_size))

    def model_cards(self) -> list[dict]:
        return [self.model_card(name) for name in self.models]

    def model_card(self, name: str) -> dict:
        self.adapter(name)
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "minimind"}
        return card | {"max_model_len": self.bot.max_len}

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model's name stands for; none without a name. ApiError 404 for an unknown one."""
        if model is None:
            return None
        if model not in self.models:
            text = f"there is no model {model[:80]!r}; this server has {', '.join(self.models)}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return self.models[model]

    # ------------------------------------------------------------------------------------------------ chats

    def prepare_chat(self, body: bytes) -> tuple[ChatRequest, Job]:
        return self.prepare_conversation(read_body(body, ChatRequest))

    def prepare_conversation(self, request: ChatRequest) -> tuple[ChatRequest, Job]:
        adapter = self.adapter(request.model)
        thinking = self.settings.thinking if request.thinks is None else request.thinks
        prompt = self.chat_prompt(request, thinking)
        thinking = self.tokenizer.opens_thinking(prompt)
        tools = request.tool_schemas()
        constraint = self._constraint(request, tools, thinking)
        limit = self._token_limit(prompt, request, "messages")
        params = self._params(request, limit, top_logprobs=(request.top_logprobs or 0) if request.logprobs else None)
        if not tools and request.skip_special_tokens is not False:  # who asks for markers reads calls by himself
            params["logit_bias"] = no_calls(self.tokenizer) | params["logit_bias"]
        forced = request.choice_of_tool.mode == "required"
        why = "tools" if forced else constraint and request.answer_format.param
        choices = []
        for i in range(request.n or 1):
            answer = self._chat_answer(request, thinking, bool(tools))
            choices.append(Choice(prompt, self._sampling(params, i, constraint), answer, why))
        return request, Job(choices, adapter)

    def _chat_answer(self, request: ChatRequest, thinking: bool, tools: bool) -> ChatAnswer | TextAnswer:
        stop, keep = request.stop or (), bool(request.include_stop_str_in_output)
        if request.skip_special_tokens is False and not tools:
            return TextAnswer(self.tokenizer, stop, key="content", spelled=True, keep=keep)
        names = [tool.function.name for tool in request.callable_tools]
        forced = request.choice_of_tool.mode == "required"
        return ChatAnswer(
            self.tokenizer, stop, thinking=thinking, tools=tools, forced=forced, eager=bool(request.stream),
            only=names[0] if forced and len(names) == 1 else None,
            parallel=request.parallel_tool_calls is not False, keep=keep,
        )  # fmt: skip

    def chat_prompt(self, request: ChatRequest, thinking: bool | None) -> list[int]:
        """The conversation's tokens, as far as the answer. Raises ApiError."""
        tools, messages = request.tool_schemas(), conversation(request.messages)
        self._check_size(sum(len(m["content"]) for m in messages), "messages")
        try:
            if request.continues:
                return self._continued(messages, tools, thinking)
            opened = request.add_generation_prompt is not False
            return render_chat(self.tokenizer, messages, tools, add_generation_prompt=opened, enable_thinking=thinking)[
                0
            ]
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None
        except ValueError as error:  # the model's own chat template refuses it
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def _continued(self, messages: list[dict], tools: list[dict], thinking: bool | None) -> list[int]:
        """The last message's turn without its end."""
        last = messages[-1]
        if last.get("reasoning_content") and not last["content"]:  # a thought that goes on
            options = dict(add_generation_prompt=True, enable_thinking=True)
            ids, _ = render_chat(self.tokenizer, messages[:-1], tools, **options)
            return ids + self.tokenizer.encode(last["reasoning_content"], add_special_tokens=False).ids
        if not last["content"]:
            options = dict(add_generation_prompt=True, enable_thinking=thinking)
            return render_chat(self.tokenizer, messages[:-1], tools, **options)[0]
        ids, _ = render_chat(self.tokenizer, messages, tools, thinking_off=thinking is not None)
        return ids[: len(ids) - 1 - ids[::-1].index(self.tokenizer.turn_end_id)]

    def _constraint(self, request: ChatRequest, tools: list[dict], thinking: bool) -> GrammarConstraint | None:
        if request.choice_of_tool.mode == "required":
            called = [tool.model_dump(exclude_none=True) for tool in request.callable_tools]
            return self.grammars.call(called, thinking=thinking)
        wanted = request.answer_format
        return self.grammars.answer(wanted, thinking=thinking, tools=tools) if wanted else None

    # ------------------------------------------------------------------------------------------------ completions

    def prepare_completion(self, body: bytes) -> tuple[CompletionRequest, Job]:
        request = read_body(body, CompletionRequest)
        adapter = self.adapter(request.model)
        wanted = request.answer_format
        constraint = self.grammars.answer(wanted, thinking=False) if wanted else None
        scored = request.logprobs if request.echo else None
        choices = []
        for text in request.prompts:
            prompt = self.text_prompt(text)
            # best_of needs to know how likely its answers are.
            top = 0 if request.logprobs is None and request.sequences > (request.n or 1) else request.logprobs
            params = self._params(request, self._token_limit(prompt, request, "prompt"), top_logprobs=top)
            for i in range(request.sequences):
                keep, spelled = bool(request.include_stop_str_in_output), request.skip_special_tokens is False
                answer = TextAnswer(self.tokenizer, request.stop or (), spelled=spelled, keep=keep)
                sampling = self._sampling(params, i, constraint)
                choices.append(Choice(prompt, sampling, answer, wanted and wanted.param, score=scored))
        return request, Job(choices, adapter)

    def text_prompt(self, text: str | list[int]) -> list[int]:
        """Of a text, or of tokens as they are. Raises ApiError."""
        self._check_size(len(text), "prompt", longest=self.longest_token if isinstance(text, str) else 1)
        return self._checked(self.bot.encode(text) if isinstance(text, str) else text)

    def _checked(self, ids: list[int]) -> list[int]:
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            text = f"prompt: there is no token {unknown[0]}; the vocabulary has {self.vocab_size}"
            raise ApiError(400, text, param="prompt")
        return ids or [self.tokenizer.document_id]

    # ------------------------------------------------------------------------------------------------ both

    def _check_size(self, size: int, param: str, longest: int | None = None) -> None:
        """Before anything is tokenised: a text that cannot fit whatever its tokens are."""
        longest = longest or self.longest_token
        if size > self.bot.max_len * longest:
            self._too_long(size // longest, "at least ", param)

    def _token_limit(self, prompt: list[int], request: CommonRequest, param: str) -> int:
        """How many tokens the answer may have. ApiError for a prompt that leaves no room."""
        wanted = request.token_limit
        if wanted is None:
            wanted = self.settings.max_new_tokens or self.bot.max_len
        elif wanted < 0:
            wanted = self.bot.max_len
        room = min(wanted, max(1, self.bot.max_len // ROOM))
        most = self.settings.max_prompt_tokens or self.bot.max_len
        if len(prompt) > min(most, self.bot.max_len - room):
            self._too_long(len(prompt), "", param, left=self.bot.max_len - len(prompt) if len(prompt) <= most else 0)
        return min(wanted, self.bot.max_len - len(prompt))

    def _too_long(self, tokens: int, at_least: str, param: str, left: int = 0) -> None:
        """`left`: tokens of the context that the prompt leaves to a shorter answer."""
        room = self.bot.max_len // ROOM
        most = min(self.settings.max_prompt_tokens or self.bot.max_len, self.bot.max_len - room)
        # The beginning is what clients look for who shorten their prompts by themselves.
        text = f"This model's maximum context length is {self.bot.max_len} tokens. However, the prompt has {at_least}"
        text += f"{tokens} tokens; it may take about {most}, so that an answer fits"
        text += f"; or ask for at most {left}, with max_tokens" if left > 0 else ""
        raise ApiError(400, text, param=param, code="context_length_exceeded")

    def _params(self, request: CommonRequest, limit: int, **more) -> dict:
        """Of SamplingParams, what the request and the settings say."""
        bias, stops = dict(request.logit_bias or {}), request.stop_token_ids or []
        for field, ids in (("logit_bias", bias), ("stop_token_ids", stops)):
            if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
                text = f"{field}: there is no token {unknown[0]}; the vocabulary has {self.vocab_size}"
                raise ApiError(400, text, param=field)
        least = request.min_tokens or 0
        if limit and least > limit:
            text = f"min_tokens {least} is more than the answer may have, {limit}"
            raise ApiError(400, text, param="min_tokens")
        default = self.settings
        params = {
            "temperature": default.temperature if request.temperature is None else request.temperature,
            "top_p": max(1e-6, default.top_p if request.top_p is None else request.top_p),  # 0: the likeliest alone
            "top_k": max(0, request.top_k or 0),
            "min_p": request.min_p or 0.0,
            "repetition_penalty": request.repetition_penalty or 1.0,
            "presence_penalty": request.presence_penalty or 0.0,
            "frequency_penalty": request.frequency_penalty or 0.0,
            "logit_bias": bias,
            "seed": None if request.seed == -1 else request.seed,
            "max_new_tokens": limit,
            "min_new_tokens": least,
            "stop_token_ids": (*(() if request.ignore_eos else self.bot.stop_ids), *stops),
        }
        return params | more

    def _sampling(self, params: dict, choice: int, constraint: GrammarConstraint | None) -> SamplingParams | None:
        """Each choice has a seed of its own, or all would be the same. None: no token is asked for."""
        if params["max_new_tokens"] == 0:
            return None
        own = params | {"seed": None if params["seed"] is None else params["seed"] + choice}
        if constraint:
            stops = [i for i in params["stop_token_ids"] if i not in self.bot.stop_ids]
            own |= {"constraint": constraint.copy(), "stop_token_ids": (self.tokenizer.eos_id, *stops)}
        return SamplingParams(**own)

    # ------------------------------------------------------------------------------------------------ tokens

    def tokenize(self, body: dict) -> dict:
        """vLLM's and llama.cpp's ways to ask: a text or a conversation -> its tokens. Raises ApiError."""
        if "messages" in body:
            request = check_request(body, ChatRequest)
            ids = self.chat_prompt(request, self.settings.thinking if request.thinks is None else request.thinks)
        else:
            text = next((body[name] for name in ("prompt", "content", "text") if body.get(name) is not None), None)
            if not isinstance(text, str):
                raise ApiError(400, "prompt: must be a string", param="prompt")
            special = body.get("add_special_tokens") is True or body.get("add_special") is True
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids = [*self.tokenizer.text_prefix, *ids] if special else ids
        answer = {"count": len(ids), "max_model_len": self.bot.max_len, "tokens": ids}
        if body.get("with_pieces"):
            answer["tokens"] = [{"id": i, "piece": self.tokenizer.decode([i])} for i in ids]
        if body.get("return_token_strs"):
            answer["token_strs"] = [self.tokenizer.id_to_token(i) for i in ids]
        return answer

    def detokenize(self, body: dict) -> dict:
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ApiError(400, "tokens: must be a list of token ids", param="tokens")
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            text = f"tokens: there is no token {unknown[0]}; the vocabulary has {self.vocab_size}"
            raise ApiError(400, text, param="tokens")
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return {"prompt": text, "content": text}
