"""llama.cpp itself, to compare with: it runs in this process, from the wheel `xllamacpp`."""

import json
import urllib.request
from pathlib import Path

from model.export.optional import need
from model.formats import CheckpointError


class LlamaCpp:
    """llama.cpp's own server in this process, on a free port of the loopback: `with LlamaCpp(path) as engine: ...`

    MissingPackage without xllamacpp. CheckpointError if llama.cpp does not take the file.
    exact: keys, values and attention in fp32, which its default of fp16 would make the largest difference."""

    def __init__(self, path: str | Path, threads: int = 1, context: int = 1024, exact: bool = True):
        xllamacpp = need("xllamacpp", "a comparison with llama.cpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity, params.warmup, params.ui = 0, False, False
        if exact:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise CheckpointError(f"llama.cpp does not take {path}: {error}") from None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *exception) -> None:
        del self.server  # which stops its threads

    def post(self, path: str, content: dict) -> dict:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text})["tokens"]

    def render(self, messages: list[dict], **options) -> str:
        return self.post("/apply-template", {"messages": messages} | options)["prompt"]

    def greedy(self, ids: list[int], max_new_tokens: int, top: int = 50) -> tuple[list[int], list[dict[int, float]]]:
        """The likeliest continuation, and for each of its tokens the log-probabilities of the `top` likeliest; none
        at all if the server left out some (it does for a token that ends within a character)."""
        request = {"prompt": ids, "n_predict": max_new_tokens, "temperature": 0, "n_probs": top}
        answer = self.post("/completion", request | {"return_tokens": True, "cache_prompt": False})
        tokens, given = answer["tokens"], answer["completion_probabilities"]
        probabilities = [{} for _ in tokens]
        if len(given) == len(tokens):
            probabilities = [{t["id"]: t["logprob"] for t in p["top_logprobs"]} for p in given]
        return tokens, probabilities
