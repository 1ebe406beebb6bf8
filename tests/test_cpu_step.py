"""The compiled forward and quantised weights, against torch's operations on the same weights."""

import copy

import pytest
import torch

from model.inference import cpu_step
from model.inference.cpu_step import BLOCK, CpuStep, load_library
from model.inference.engine import PREFILL_CHUNK, Engine, generate
from model.inference.kv_cache import KVCache
from model.inference.quantization import FORMATS, GROUP, packed, quantize, quantized_kind, weight_bytes
from model.inference.sampling import SamplingParams
from model.model import Attention, LoRAConfig, MiniMindLM, MoEFeedForward, add_lora, attention, lora_layers, set_adapter
from server.scoring import score_prompt

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MOE = dict(num_experts=5, num_experts_per_tok=2, num_shared_experts=1, norm_topk_prob=False)
SWITCH = dict(num_experts=3, num_experts_per_tok=1, vocab_size=321)
try:
    cpu_step.build()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)


def vectors(left_out: tuple[str, ...] = ()) -> list[str]:
    return [flag for flag in cpu_step._vector_flags() if not any(part in flag for part in left_out)]


# What this CPU has, and what poorer ones have: no tiles, no bf16, vectors of 8. Those that are the same count once.
FORMS = list({tuple(form): form for form in map(vectors, ((), ("amx",), ("amx", "bf16"), ("amx", "512")))}.values())


@pytest.fixture(params=FORMS, ids=lambda flags: flags[-1].removeprefix("-m") if flags else "portable")
def form(request, monkeypatch):
    monkeypatch.setattr(cpu_step, "_vector_flags", lambda: request.param)
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def make_ids(rows: int, length: int) -> list[list[int]]:
    return torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()


def new_cache(step: CpuStep, slots: int, capacity: int = 16) -> KVCache:
    return KVCache(step.source.config, slots, capacity, "cpu", step.cache_dtype, step.lanes)


def advance(step: CpuStep, new: list[list[int]], first: int, cache: KVCache, adapter: str | None = None):
    logits = step(new, first, cache, adapter)
    for row, tokens in enumerate(new, first):
        cache.lengths[row] += len(tokens)
    return logits


def rounded(model: MiniMindLM, kind: str | None) -> MiniMindLM:
    """A copy whose matrices get their inputs rounded as the panels' products round them."""

    def narrow(x):
        if kind == "bf16":
            return x.bfloat16().float()
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (x / scale).round() * scale

    model = copy.deepcopy(model)
    if kind is None or CpuStep(model).lanes == 8:
        return model
    routers = {layer.gate for layer in model.modules() if isinstance(layer, MoEFeedForward)}
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer not in routers:
            layer.register_forward_pre_hook(lambda _, args: (narrow(args[0]),))
        elif isinstance(layer, Attention):  # keys and values, as the cache keeps them
            layer.attend = lambda q, k, v, mask: attention(q, k.bfloat16().float(), v.bfloat16().float(), mask)
    model.model.norm.register_forward_hook(lambda _, __, x: narrow(x))  # of the embedding as the output layer
    return model


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, *FORMATS])
@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_scaling=YARN, num_attention_heads=2),
        dict(qk_norm=True, num_key_value_heads=4, head_dim=80),
        MOE,
        SWITCH,
    ],
    ids=["yarn", "qwen3", "moe", "switch"],
)
def test_prompts_and_decoding_equal_the_plain_forward(form, tiny, kind, changes):
    """Prompts of several lengths at once, one of them in pieces and longer than a block, then tokens one by one."""
    model = tiny(**changes)
    if kind:
        quantize(model, kind)
    step, lengths = CpuStep(model), [1, 70, BLOCK + 30, 17]
    ids, cache = make_ids(4, BLOCK + 34), new_cache(step, 5)
    theirs, unrounded = (reference(torch.tensor(ids)).logits for reference in (rounded(model, kind), model))
    advance(step, [row[:n] for row, n in zip(ids, (1, 33, BLOCK + 7, 16), strict=True)], 1, cache)
    prompts = advance(step, [ids[1][33:70], ids[2][BLOCK + 7 : BLOCK + 30], ids[3][16:17]], 2, cache)
    ours = [(row, i, n - 1) for i, (row, n) in enumerate(zip(prompts, lengths[1:], strict=True), 1)]
    for i in range(3):
        logits = advance(step, [[row[n + i]] for row, n in zip(ids, lengths, strict=True)], 1, cache)
        ours += [(row, j, n + i) for j, (row, n) in enumerate(zip(logits, lengths, strict=True))]
    errors, of_rounding = (  # the smallest first
        sorted(relative(row, of[j, n]) for row, j, n in ours) for of in (theirs, unrounded)
    )
    assert errors[0] < 1e-6 and errors[-1] < (2e-5 if step.lanes == 8 or kind is None else 0.3), errors
    # An input that is rounded to the other side moves logits by a percent: up to half of the rows may have one.
    middle = len(ours) // 2
    assert errors[middle] < max(5e-6, 0.6 * of_rounding[middle]), (errors, of_rounding)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, *FORMATS])
@pytest.mark.parametrize("changes", [dict(qk_norm=True), MOE], ids=["dense", "moe"])
def test_a_tokens_bits_do_not_depend_on_what_is_computed_with_it(form, tiny, kind, changes):
    model = tiny(**changes)
    if kind:
        quantize(model, kind)
    step, lengths = CpuStep(model), [5, 30, 64, 2, 17, 9, 33, 1, 40, 3, 8, 21, 50, 6]
    ids, cache = make_ids(len(lengths), 65), new_cache(step, len(lengths))
    advance(step, [row[:n] for row, n in zip(ids, lengths, strict=True)], 0, cache)
    last = [[row[n]] for row, n in zip(ids, lengths, strict=True)]
    whole = step(last, 0, cache)
    for size in (1, 2, 3, 4, 5, 7):
        for first in range(len(lengths) - size + 1):
            assert torch.equal(step(last[first : first + size], first, cache), whole[first : first + size]), (
                first,
                size,
            )
    for row, n in enumerate(lengths):  # as the end of a prompt
        assert torch.equal(step([ids[row][: n + 1]], 0, new_cache(step, 1))[0], whole[row]), row
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(step(last, 0, cache), whole)
    finally:
        torch.set_num_threads(torch_threads)


@pytest.mark.parametrize("kind", [None, *FORMATS])
def test_engine_says_the_same_with_the_compiled_step(tiny, kind):
    """Prompts that share beginnings, more of them than slots, and caches that grow, move and are copied."""
    model = tiny()
    if kind:
        quantize(model, kind)
    prompts = [[*range(100, 140), 20 + i, *range(30, 30 + 7 * i)] for i in range(6)]
    params = [SamplingParams(1.0, seed=i, max_new_tokens=10 + 7 * i, stop_token_ids=()) for i in range(6)]
    together = generate(model, prompts, params, batch_size=4, prefill_chunk=25)
    alone = [generate(model, [p], s)[0] for p, s in zip(prompts, params, strict=True)]
    assert together == alone
    if kind is None or CpuStep(model).lanes == 8:
        assert together == generate(model, prompts, params, batch_size=4, compiled=False)


@torch.inference_mode()
@pytest.mark.parametrize("compiled", [True, False])
def test_a_quantised_models_prompts_are_scored(tiny, compiled):
    """In pieces; by the model, whatever the engine's cache keeps its keys and values in."""
    model, (ids,) = quantize(tiny(), "int8"), make_ids(1, PREFILL_CHUNK + 40)
    scored = score_prompt(Engine(model, slots=1, compiled=compiled), ids, 1, None)
    expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert [one.logprob for one in scored[1:]] == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "moe"])
def test_adapters_are_computed_beside_the_weights(tiny, kind, changes):
    model = tiny(**changes)
    add_lora(model, "a")
    add_lora(model, "b", LoRAConfig(rank=40, targets=("q_proj", "down_proj", *["gate"] * bool(changes))))
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        for name in layer.configs:
            torch.nn.init.normal_(layer.matrices(name)[1], std=0.3, generator=generator)
    if kind:
        quantize(model, kind)
    step, ids = CpuStep(model), make_ids(1, 60)
    said = {}
    for name in (None, "a", "b"):
        set_adapter(model, name)
        with torch.inference_mode():
            said[name] = step(ids, 0, new_cache(step, 1), name)[0]
            assert relative(said[name], model(torch.tensor(ids)).logits[0, -1]) < (1e-5 if kind is None else 0.2)
    assert relative(said["a"], said[None]) > 0.5 and relative(said["b"], said[None]) > 0.5
    set_adapter(model, None)
    params = SamplingParams(0, max_new_tokens=12, stop_token_ids=())
    engine, texts = Engine(model, slots=3, compiled=True), {i: [] for i in range(3)}
    for name in ("b", None, "a"):
        engine.add(ids[0], params, name)
    while engine.busy:
        for event in engine.step():
            texts[event.index].append(event.token_id)
    for i, name in enumerate(("b", None, "a")):
        set_adapter(model, name)
        assert generate(model, ids, params, compiled=True)[0].token_ids == texts[i]


@pytest.mark.parametrize("kind", [None, *FORMATS])
def test_what_is_not_finite_shows(form, tiny, kind):
    model = tiny()
    if kind:
        quantize(model, kind)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(model, make_ids(1, 20), SamplingParams(0, max_new_tokens=2), compiled=True)


@pytest.mark.skipif(not any("amx" in flag for flag in FORMS[0]), reason="this CPU has no AMX")
def test_tiles_are_used_where_the_cpu_has_them():
    assert load_library().tiles() == 1


def test_models_that_it_cannot_run_are_refused(tiny):
    with pytest.raises(ValueError, match="multiples of 32"):
        CpuStep(tiny(intermediate_size=72))
    with pytest.raises(ValueError, match="fp32"):
        CpuStep(tiny().bfloat16())


def test_a_machine_without_compiler_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_step.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"install g\+\+"):
        cpu_step.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="false cannot compile cpu_step.cpp"):
        cpu_step.build()
    assert not list((tmp_path / "minimind").glob("*"))


# ------------------------------------------------------------------------------------------------ quantisation


def test_quantised_weights_are_as_near_as_their_bits_allow(tiny):
    weights = {name: p.clone() for name, p in tiny().named_parameters()}
    for kind, bits in (("bf16", 16), ("int8", 8), ("int4", 4)):
        model = quantize(tiny(), kind)
        assert quantized_kind(model) == kind
        for name, layer in model.named_modules():
            if not isinstance(layer, torch.nn.Linear):
                continue
            w, error = weights[f"{name}.weight"], (layer.weight - weights[f"{name}.weight"]).abs()
            assert packed(layer)[0] == kind
            if kind == "bf16":
                assert torch.equal(layer.weight, w.bfloat16().float())
            elif kind == "int8":  # half a step of the row's largest weight
                assert (error <= w.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
            else:  # below what the plain scale, largest / 7, gives
                groups = w.unflatten(1, (-1, GROUP))
                step = groups.abs().amax(2, keepdim=True) / 7
                plain = ((groups / step).round() * step - groups).square().sum()
                assert error.square().sum() < plain
                assert layer.weight.unflatten(1, (-1, GROUP)).unique(dim=2).shape[2] <= GROUP
        norms = sum(p.numel() for name, p in weights.items() if "norm" in name)
        matrices = sum(p.numel() for p in weights.values()) - norms
        embedding = weights["model.embed_tokens.weight"].numel()
        stored = matrices * bits / 8 if kind != "int4" else (matrices - embedding) * (4 + 32 / GROUP) / 8 + embedding
        assert stored + 4 * norms <= weight_bytes(model) <= stored + 4 * norms + 4 * 2000  # and the scales of rows


def test_all_zero_rows_stay_zero(tiny):
    for kind in ("int8", "int4"):
        model = tiny()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[:8] = 0
        quantize(model, kind)
        assert (model.model.layers[0].mlp.up_proj.weight[:8] == 0).all()


def test_moe_and_adapters_can_be_quantised(tiny):
    model = tiny(num_experts=4)
    add_lora(model, "a")
    quantize(model, "int8")
    assert quantized_kind(model) == "int8" and not hasattr(model.model.layers[0].mlp.gate, "parametrizations")
    params = SamplingParams(0, max_new_tokens=4, stop_token_ids=())
    assert len(generate(model, [[5, 6]], params)[0].token_ids) == 4


def test_quantising_twice_or_to_something_else_is_refused(tiny):
    with pytest.raises(ValueError, match="int3: there are bf16, int8, int4"):
        quantize(tiny(), "int3")
    with pytest.raises(ValueError, match="already"):
        quantize(quantize(tiny(), "int8"), "int4")
