"""From a checked request to the sequences that the engine generates: models, prompts, limits, sampling.

service = Service(bot, adapters, settings)
request, job = service.prepare_chat(body)       # in any thread; raises ApiError
"""

import time
from dataclasses import dataclass

from dataset.chat import render_chat
from model.inference.chatbot import Chatbot
from model.inference.engine import SamplingParams
from server.deltas import ChatAnswer, TextAnswer
from server.errors import ApiError
from server.grammars import GrammarConstraint, Grammars, call_grammar, json_grammar
from server.runner import Choice, Job
from server.schemas import ChatRequest, CommonRequest, CompletionRequest, read_body

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

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name stands for. ApiError 404 for an unknown name."""
        if model not in self.models:
            text = f"there is no model {model[:80]!r}; this server has {', '.join(self.models)}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return self.models[model]

    # ------------------------------------------------------------------------------------------------ chats

    def prepare_chat(self, body: bytes) -> tuple[ChatRequest, Job]:
        request = read_body(body, ChatRequest)
        adapter = self.adapter(request.model)
        thinking = self.settings.thinking if request.thinking is None else request.thinking
        tools, messages = request.tool_schemas(), request.conversation()
        self._check_size(sum(len(m["content"]) for m in messages), "messages")
        constraint = self._constraint(request, tools, bool(thinking))
        try:
            options = dict(add_generation_prompt=True, enable_thinking=thinking)
            prompt, _ = render_chat(self.tokenizer, messages, tools, **options)
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None
        opened = self.tokenizer.opens_thinking(prompt)
        limit = self._token_limit(prompt, request, "messages")
        params = self._params(request, limit, top_logprobs=(request.top_logprobs or 0) if request.logprobs else None)
        choices = []
        for i in range(request.n or 1):
            answer = ChatAnswer(self.tokenizer, request.stop or (), thinking=opened, tools=bool(tools))
            own = self._seeded(params, i)
            if constraint:
                own |= {"constraint": constraint.copy(), "stop_token_ids": (self.tokenizer.eos_id,)}
            why = "tools" if request.choice_of_tool not in ("none", "auto") else "response_format"
            choices.append(Choice(prompt, SamplingParams(**own), answer, why))
        return request, Job(choices, adapter)

    def _constraint(self, request: ChatRequest, tools: list[dict], thinking: bool) -> GrammarConstraint | None:
        choice = request.choice_of_tool
        if choice not in ("none", "auto"):
            if choice != "required":
                tools = [tool for tool in tools if f"function:{tool['function']['name']}" == choice]
            return self._compile(call_grammar, "tools", tools, thinking=thinking)
        if request.response_format is None or request.response_format.type == "text":
            return None
        schema = {"type": "object"}
        if request.response_format.type == "json_schema":
            schema = request.response_format.json_schema.schema_
        return self._compile(json_grammar, "response_format", schema, thinking=thinking, tools=tools)

    def _compile(self, grammar, param: str, *args, **options) -> GrammarConstraint:
        try:
            return self.grammars.compile(grammar(*args, **options), param)
        except RecursionError:
            raise ApiError(400, f"{param} is nested too deeply", param=param) from None

    # ------------------------------------------------------------------------------------------------ completions

    def prepare_completion(self, body: bytes) -> tuple[CompletionRequest, Job]:
        request = read_body(body, CompletionRequest)
        adapter = self.adapter(request.model)
        choices = []
        for text in request.prompts:
            self._check_size(len(text), "prompt", longest=self.longest_token if isinstance(text, str) else 1)
            prompt = self.bot.encode(text) if isinstance(text, str) else self._checked(text)
            params = self._params(request, self._token_limit(prompt, request, "prompt"), top_logprobs=request.logprobs)
            for i in range(request.n or 1):
                answer = TextAnswer(self.tokenizer, request.stop or ())
                choices.append(Choice(prompt, SamplingParams(**self._seeded(params, i)), answer))
        return request, Job(choices, adapter)

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
        wanted = request.token_limit or self.settings.max_new_tokens or self.bot.max_len
        room = min(wanted, max(1, self.bot.max_len // ROOM))
        most = self.settings.max_prompt_tokens or self.bot.max_len
        if len(prompt) > min(most, self.bot.max_len - room):
            self._too_long(len(prompt), "", param)
        return min(wanted, self.bot.max_len - len(prompt))

    def _too_long(self, tokens: int, at_least: str, param: str) -> None:
        room = self.bot.max_len // ROOM
        most = min(self.settings.max_prompt_tokens or self.bot.max_len, self.bot.max_len - room)
        text = f"the prompt has {at_least}{tokens} tokens; of a context of {self.bot.max_len} it may take about {most}"
        raise ApiError(400, f"{text}, so that an answer fits", param=param, code="context_length_exceeded")

    def _params(self, request: CommonRequest, limit: int, **more) -> dict:
        """Of SamplingParams, what the request and the settings say."""
        bias = dict(request.logit_bias or {})
        if unknown := [i for i in bias if i >= self.vocab_size]:
            text = f"logit_bias: there is no token {unknown[0]}; the vocabulary has {self.vocab_size}"
            raise ApiError(400, text, param="logit_bias")
        default = self.settings
        params = {
            "temperature": default.temperature if request.temperature is None else request.temperature,
            "top_p": max(1e-6, default.top_p if request.top_p is None else request.top_p),  # 0: the likeliest alone
            "top_k": request.top_k or 0,
            "min_p": request.min_p or 0.0,
            "repetition_penalty": request.repetition_penalty or 1.0,
            "presence_penalty": request.presence_penalty or 0.0,
            "frequency_penalty": request.frequency_penalty or 0.0,
            "logit_bias": bias,
            "seed": request.seed,
            "max_new_tokens": limit,
            "stop_token_ids": () if request.ignore_eos else tuple(self.bot.stop_ids),
        }
        return params | more

    def _seeded(self, params: dict, choice: int) -> dict:
        """Each choice has a seed of its own, or all would be the same."""
        seed = None if params["seed"] is None else params["seed"] + choice
        return params | {"seed": seed}
