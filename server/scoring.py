"""How likely each token of a prompt is: for completions with echo and logprobs, which evaluation harnesses ask for."""

from typing import NamedTuple

import torch

from model.inference.engine import PREFILL_CHUNK, Engine
from model.inference.kv_cache import KVCache
from model.model import active_adapter


class Logprob(NamedTuple):
    """A token of a prompt or an answer; the first of a prompt follows nothing, and has neither value nor rivals."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]] | None


@torch.inference_mode()
def score_prompt(engine: Engine, ids: list[int], top: int, adapter: str | None) -> list[Logprob]:
    """By the model alone, and of the `top` likeliest tokens at each place; in a cache of its own, a chunk at a time."""
    model, weight = engine.model, engine.model.model.norm.weight
    own = KVCache(model.config, 1, len(ids), weight.device, weight.dtype)
    scored = [Logprob(ids[0], None, None)]
    with active_adapter(model, adapter):
        for at in range(0, len(ids) - 1, PREFILL_CHUNK):
            chunk = ids[at : min(at + PREFILL_CHUNK, len(ids) - 1)]
            inputs = torch.tensor([chunk], device=weight.device)  # (1, T)
            logits = model(inputs, cache=own.window(0, 1, len(chunk))).logits[0]
            own.lengths[0] += len(chunk)
            logprobs = logits.float().log_softmax(-1)  # (T, vocab)
            following = ids[at + 1 : at + 1 + len(chunk)]
            values, best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
            mine = logprobs.gather(1, torch.tensor(following, device=logprobs.device)[:, None])[:, 0].tolist()
            tops = [list(zip(*pair, strict=True)) for pair in zip(best.tolist(), values.tolist(), strict=True)]
            scored += map(Logprob, following, mine, tops)
    return scored
