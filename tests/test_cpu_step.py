"""The compiled decoding step and quantised weights, against torch's operations on the same weights."""

import pytest
import torch

from model.inference import cpu_step
from model.inference.cpu_step import CpuStep
from model.inference.engine import Engine, generate
from model.inference.kv_cache import KVCache
from model.inference.quantization import FORMATS, GROUP, packed, quantize, quantized_kind, weight_bytes
from model.inference.sampling import SamplingParams
from model.model import MiniMindLM, add_lora, lora_layers, set_adapter

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
try:
    cpu_step.build()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)


def filled_cache(model: MiniMindLM, lengths: list[int]) -> tuple[KVCache, torch.Tensor]:
    """Slots that hold so many random tokens, and one token more for each."""
    cache = KVCache(model.config, len(lengths), max(lengths) + 1, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (len(lengths), max(lengths) + 1), generator=generator)
    model(ids[:, :-1], cache=cache.window(0, len(lengths), max(lengths)))
    cache.lengths = list(lengths)
    return cache, ids[:, -1]


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, *FORMATS])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(qk_norm=True, num_key_value_heads=4), dict(rope_scaling=YARN, num_attention_heads=2), dict(head_dim=80)],
    ids=["llama", "qwen3", "yarn", "wide heads"],
)
def test_logits_and_cache_equal_torchs(tiny, kind, changes):
    model = tiny(**changes)
    if kind:
        quantize(model, kind)
    step = CpuStep(model)
    for lengths in ([40], [1, 70], [3, 90, 17], [5, 5, 5, 5], list(range(1, 12))):
        ours, tokens = filled_cache(model, lengths)
        theirs, _ = filled_cache(model, lengths)
        logits = step(tokens.tolist(), 0, ours)
        expected = model(tokens[:, None], cache=theirs.window(0, len(lengths), 1)).logits[:, -1]
        assert torch.allclose(logits, expected, atol=2e-5, rtol=1e-5), (lengths, (logits - expected).abs().max())
        for row, n in enumerate(lengths):
            for mine, other in ((ours.k, theirs.k), (ours.v, theirs.v)):
                assert torch.allclose(mine[:, row, :, : n + 1], other[:, row, :, : n + 1], atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, *FORMATS])
def test_a_rows_bits_do_not_depend_on_the_batch(tiny, kind):
    model = tiny()
    if kind:
        quantize(model, kind)
    step, lengths = CpuStep(model), [5, 30, 64, 2, 17, 9, 33]
    cache, tokens = filled_cache(model, lengths)
    whole = step(tokens.tolist(), 0, cache)
    for size in (1, 2, 3, 4, 5):
        for first in range(len(lengths) - size + 1):
            part = step(tokens[first : first + size].tolist(), first, cache)
            assert torch.equal(part, whole[first : first + size]), (first, size)
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(step(tokens.tolist(), 0, cache), whole)
    finally:
        torch.set_num_threads(torch_threads)


@pytest.mark.parametrize("kind", [None, "int8"])
def test_engine_says_the_same_with_the_compiled_step(tiny, kind):
    model = tiny()
    if kind:
        quantize(model, kind)
    prompts = [[20 + i, *range(30, 30 + 7 * i)] for i in range(6)]
    params = [SamplingParams(1.0, seed=i, max_new_tokens=10 + 7 * i, stop_token_ids=()) for i in range(6)]
    plain = generate(model, prompts, params, batch_size=4, compiled=False)
    assert generate(model, prompts, params, batch_size=4) == plain
    assert [generate(model, [p], s)[0] for p, s in zip(prompts, params, strict=True)] == plain


def test_requests_with_an_adapter_go_beside_the_compiled_step(tiny):
    model = tiny()
    add_lora(model, "a")
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.matrices("a")[1], std=0.3, generator=torch.Generator().manual_seed(0))
    prompt, params = list(range(20, 50)), SamplingParams(0, max_new_tokens=12, stop_token_ids=())
    with_adapter = generate(model, [prompt], params, compiled=False)[0].token_ids
    set_adapter(model, None)
    without = generate(model, [prompt], params, compiled=False)[0].token_ids
    assert with_adapter != without
    engine, said = Engine(model, slots=2, compiled=True), {0: [], 1: []}
    engine.add(prompt, params, "a")
    engine.add(prompt, params)
    while engine.busy:
        for event in engine.step():
            said[event.index].append(event.token_id)
    assert said == {0: with_adapter, 1: without}


@pytest.mark.parametrize(
    "changes, message",
    [(dict(num_experts=4), "dense"), (dict(intermediate_size=72), "multiples of 32"), (dict(vocab_size=321), "of 8")],
)
def test_models_that_it_cannot_run_are_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        CpuStep(tiny(**changes))
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
