"""What becomes of the fields that other servers know: the table of decisions, and the notes in the log.

settled = settle(body, known=ChatRequest.model_fields)   # renamed, without nulls and what is ignored; ApiError 400

Three kinds. What the request classes of schemas.py declare is honoured. What would change the answer and cannot be is
in NEUTRAL and refused by its name, but for the values that mean "off". Everything else is ignored; the log has one line
for each name.
"""

import sys
from collections.abc import Container
from typing import Any

from server.errors import ApiError

ALIASES = {  # another server's name: ours
    "repeat_penalty": "repetition_penalty",  # llama.cpp, Ollama
    "n_predict": "max_tokens",  # llama.cpp
    "max_new_tokens": "max_tokens",  # SGLang, TGI
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",  # Anthropic, TGI
}

NEUTRAL: dict[str, tuple] = {  # refused by name, unless the value is one of these
    # Samplers of llama.cpp and its descendants.
    "typical_p": (1,), "typical": (1,), "tfs_z": (1,), "top_a": (0,), "top_n_sigma": (-1, 0), "mirostat": (0,),
    "mirostat_mode": (0,), "dynatemp_range": (0,), "dry_multiplier": (0,), "xtc_probability": (0,), "min_keep": (0,),
    "smoothing_factor": (0,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "samplers": ([],), "penalty_alpha": (0,),
    "repeat_last_n": (-1,), "penalty_last_n": (-1,), "no_repeat_ngram_size": (0,), "n_probs": (0,),
    "grammar_lazy": (False,), "options": ({},),
    # vLLM's, SGLang's, TGI's.
    "use_beam_search": (False,), "num_beams": (1,), "length_penalty": (1, 0), "early_stopping": (False,),
    "bad_words": ([],), "bad_words_ids": ([],), "allowed_token_ids": (), "prompt_logprobs": (False,),
    "truncate_prompt_tokens": (-1,), "truncate": (),
    "logits_processors": ([],), "custom_logit_processor": (), "no_stop_trim": (False,), "stop_regex": ([],),
    "thinking_token_budget": (-1,), "documents": ([],), "chat_template": (), "mm_processor_kwargs": ({},),
    "lora": ([],), "lora_path": (), "lora_request": (), "adapter": (), "adapters": ([],), "adapter_id": (),
    # OpenAI's, of which we have another form or none.
    "functions": ([],), "function_call": ("auto", "none"), "suffix": ("",), "audio": (), "web_search_options": (),
    "best_of": (1,), "echo": (False,),  # of chats
    "modalities": (["text"],),
}  # fmt: skip

REMEDY = {  # what to send instead
    "functions": "send tools", "function_call": "send tool_choice", "options": "send its entries by themselves",
    "prompt_logprobs": "send echo and logprobs to /v1/completions", "n_probs": "send logprobs",
    "lora": "an adapter is a model named MODEL:ADAPTER", "adapter": "an adapter is a model named MODEL:ADAPTER",
}  # fmt: skip

# OpenAI's own, without a meaning for one model on one machine: not worth a line.
QUIET = frozenset(
    "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction verbosity "
    "reasoning_effort".split()
)

MAX_NOTES = 1000  # different lines: a client that invents names cannot fill the disk
_noted: set[tuple[str, str]] = set()


def note(kind: str, name: str, text: str) -> None:
    """One line in the log for each name of a kind."""
    if (kind, name) not in _noted and len(_noted) < MAX_NOTES:
        _noted.add((kind, name))
        print(f"note: {text}", file=sys.stderr, flush=True)


def quoted(name: str) -> str:
    """A client's word, on one line and in ASCII."""
    return ascii(name[:80])


def settle(body: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    """The fields that the request class knows, under our names. ApiError 400 for one that would change the answer."""
    settled = {}
    for field, value in body.items():
        name = field if field in known else ALIASES.get(field, field)
        if value is None:
            continue
        if name in known:
            if field == name or body.get(name) is None:
                settled[name] = value
        elif name in NEUTRAL and not _is_neutral(name, value):
            remedy = f": {REMEDY[name]}" if name in REMEDY else ""
            raise ApiError(400, f"{name} is not supported{remedy}", param=field, code="unsupported_parameter")
        elif name not in QUIET and name not in NEUTRAL:
            note("field", field, f"ignored: the request's field {quoted(field)}, which is not known here")
    return settled


def _is_neutral(name: str, value: Any) -> bool:
    # True is not 1 here: `"typical_p": true` is a fault, not an answer without the sampler.
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in NEUTRAL[name])
