"""The decode loop: cache, batches, sampling and text streaming against slow references and transformers."""

import random
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch

from dataset.chat import load_tokenizer
from model.inference import sampling
from model.inference.engine import (
    decode,
    generate,
    generate_each,
    generate_stream,
)
from model.inference.kv_cache import KVCache
from model.inference.sampling import (
    Sampler,
    SamplingParams,
    SamplingState,
    make_samplers,
    outside_nucleus,
    sample,
)
from model.inference.text_stream import TextStream
from model.model import MiniMindConfig, MiniMindLM

SHAPE = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    qk_norm=True,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
NO_STOP = dict(stop_token_ids=())


def make_model(**changes) -> MiniMindLM:
    torch.manual_seed(0)
    model = MiniMindLM(MiniMindConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():  # larger weights: an untrained model would repeat one token whatever the context
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def make_prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(20, 6400) for _ in range(n)] for n in lengths]


def greedy(n: int = 16, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_new_tokens": n, **NO_STOP, **more})


def uncached(model: MiniMindLM, prompt: list[int], n: int) -> list[int]:
    """The greedy continuation that the model itself makes, by whole forwards."""
    with mock.patch.object(model.config, "eos_token_id", -1):  # it goes on whatever it says
        return model.generate(torch.tensor([prompt]), n)[0, len(prompt) :].tolist()


# ------------------------------------------------------------------------------------------------ without a cache


def test_the_plain_generate_is_greedy_samples_and_stops(model):
    prompts = torch.tensor(make_prompts(6, 6))
    ids = model.generate(prompts, 8)
    assert ids.shape == (2, 14) and torch.equal(ids[:, :6], prompts)
    with torch.inference_mode():
        assert torch.equal(model(ids[:, :-1]).logits[:, 5:].argmax(-1), ids[:, 6:])  # each the likeliest
    drawn = [model.generate(prompts, 8, 1.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with mock.patch.object(model.config, "eos_token_id", int(ids[0, 7])):
        stopped = model.generate(prompts[:1], 8)[0]
    assert stopped.tolist() == ids[0, : 6 + 1 + ids[0, 6:].tolist().index(int(ids[0, 7]))].tolist()


# ------------------------------------------------------------------------------------------------ cache


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [512, 7, 1])
def test_cached_logits_equal_uncached(model, chunk):
    prompts = make_prompts(23, 5, 14)
    cache = KVCache(model.config, 4, 20, "cpu", torch.float32)
    longest = max(map(len, prompts))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in prompts])
    for start in range(0, longest, chunk):
        piece = padded[:, start : start + chunk]
        out = model(piece, cache=cache.window(1, 3, piece.shape[1])).logits
        cache.lengths = [0] + [start + out.shape[1]] * 3
    cache.lengths = [0] + [len(row) - 1 for row in prompts]  # what padding wrote counts for nothing
    ids = [list(prompt) for prompt in prompts]
    for token in range(100, 150):  # past one block of the cache that is read, and past its first capacity
        logits = model(torch.tensor([row[-1:] for row in ids]), cache=cache.window(1, 3, 1)).logits[:, -1]
        whole = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in ids])
        assert torch.allclose(logits, whole, atol=1e-4), f"at token {token}"
        ids = [[*row, token] for row in ids]
        cache.lengths = [0] + [n + 1 for n in cache.lengths[1:]]


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, MOE], ids=["dense", "no-qk-norm", "moe"])
def test_ragged_batch_equals_single_equals_uncached(changes):
    model = make_model(**changes)
    prompts = make_prompts(3, 40, 11, 1, 70, 26)
    batched = [result.token_ids for result in generate(model, prompts, greedy())]
    assert batched == [generate(model, [prompt], greedy())[0].token_ids for prompt in prompts]
    assert batched == [uncached(model, prompt, 16) for prompt in prompts]
    assert len({tuple(ids) for ids in batched}) == len(prompts)


def test_chunked_prefill_and_small_batches_change_nothing(model):
    prompts = make_prompts(3, 40, 11, 1, 70, 26)
    whole = generate(model, prompts, greedy())
    assert generate(model, prompts, greedy(), prefill_chunk=8) == whole
    assert generate(model, prompts, greedy(), batch_size=2) == whole


def test_sequences_that_end_leave_and_change_nothing(model):
    prompts = make_prompts(9, 30, 4, 17, 22, 8, 60, 2)
    budgets = [2, 50, 5, 3, 30, 9, 1, 40]
    results = generate(model, prompts, [greedy(n) for n in budgets], batch_size=3)
    for prompt, n, result in zip(prompts, budgets, results, strict=True):
        assert result.token_ids == uncached(model, prompt, n)
        assert result.finish_reason == "length"


def test_long_prompt_that_ends_early_does_not_overflow_the_cache(model):
    prompts = make_prompts(60, 2, 2, 2, 2)  # one of five: stays in the batch as an idle row
    results = generate(model, prompts, [greedy(1)] + [greedy(50)] * 4)
    assert [len(result.token_ids) for result in results] == [1, 50, 50, 50, 50]


def test_equals_transformers_greedy():
    transformers = pytest.importorskip("transformers")
    model = make_model()
    c = model.config
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size head_dim vocab_size"
    )
    config = transformers.Qwen3Config(
        **{name: getattr(c, name) for name in names.split()}, rope_theta=c.rope_theta, rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    state = model.state_dict()
    theirs.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    for penalty in (1.0, 1.3):
        for prompt in make_prompts(12, 33):
            expected = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=penalty
            )[0, len(prompt) :].tolist()
            ours = generate(model, [prompt], SamplingParams(0, max_new_tokens=24, repetition_penalty=penalty))[0]
            assert ours.token_ids == expected


# ------------------------------------------------------------------------------------------------ sampling


def test_seed_gives_the_same_text_whatever_else_runs(model):
    prompts = make_prompts(5, 20, 9, 33)
    lengths = (2, 12, 12, 3)  # two leave early: the others move to other rows of the batch
    params = [
        SamplingParams(1.0 + i / 10, i, 0.9, 0.01 * i, 1 + i / 10, seed=i, max_new_tokens=n, **NO_STOP)
        for i, n in enumerate(lengths)
    ]
    together = generate(model, prompts, params)
    for i in range(4):
        assert generate(model, [prompts[i]], [params[i]])[0] == together[i]
    longer = replace(params[2], max_new_tokens=30)
    assert generate(model, [prompts[2]], longer)[0].token_ids[:12] == together[2].token_ids
    assert generate(model, [prompts[1]], replace(params[1], top_k=0, seed=77))[0] != together[1]
    unseeded = SamplingParams(1.0, max_new_tokens=12, **NO_STOP)
    assert generate(model, [prompts[2]], unseeded) != generate(model, [prompts[2]], unseeded)


FILTERS = [
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.8),
    dict(top_p=0.05),
    dict(min_p=0.1),
    dict(repetition_penalty=1.4),
    dict(temperature=1.5, top_k=300, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    dict(temperature=0.3, top_k=40, top_p=0.5, repetition_penalty=0.8),
]


@pytest.mark.parametrize("spread", [0.5, 3.0], ids=["flat", "peaked"])
def test_filters_equal_transformers(spread):
    """All parameter sets in one batch, each row against the processors of transformers."""
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    vocab = 1000
    logits = torch.randn(len(FILTERS), vocab, generator=generator) * spread
    prompts = [torch.randint(vocab, (20,), generator=generator).tolist() for _ in FILTERS]
    params = [SamplingParams(**{"temperature": 1.0, **changes}) for changes in FILTERS]
    cpu = torch.device("cpu")
    states = [SamplingState(p, prompt, vocab, cpu, set()) for p, prompt in zip(params, prompts, strict=True)]
    sampler = Sampler(states, vocab, cpu)
    probs = sampler.probabilities(sampler.adjust(logits))
    for row, p in enumerate(params):
        processors = [
            (p.repetition_penalty != 1, transformers.RepetitionPenaltyLogitsProcessor, p.repetition_penalty),
            (True, transformers.TemperatureLogitsWarper, p.temperature),
            (p.top_k > 0, transformers.TopKLogitsWarper, p.top_k),
            (p.top_p < 1, transformers.TopPLogitsWarper, p.top_p),
            (p.min_p > 0, transformers.MinPLogitsWarper, p.min_p),
        ]
        theirs = logits[row : row + 1].clone()
        for used, kind, value in processors:
            if used:
                theirs = kind(value)(torch.tensor([prompts[row]]), theirs)
        outside = outside_nucleus(probs[row].expand(vocab, -1), torch.arange(vocab), sampler.top_p[row])
        ours = probs[row].masked_fill(outside | (probs[row] < p.min_p * probs[row].max()), 0)
        assert torch.equal(ours == 0, theirs[0].isinf()), f"row {row}: {FILTERS[row]}"
        assert torch.allclose(ours / ours.sum(), theirs[0].softmax(-1), rtol=1e-4)


@pytest.mark.parametrize("changes", [dict(top_p=0.6), dict(top_p=0.95, min_p=0.3), dict(top_p=1e-6), dict(top_p=1.0)])
def test_draws_follow_the_probabilities_within_the_nucleus(changes):
    probs = torch.tensor([0.02, 0.3, 0.0, 0.25, 0.2, 0.08, 0.15])  # a nucleus of 0.6: 1, 3 and 4
    n = 10_000
    params = [SamplingParams(1.0, seed=i, **changes) for i in range(n)]
    sampler = Sampler([SamplingState(p, [], 7, probs.device, set()) for p in params], 7, probs.device)
    counts = torch.bincount(torch.tensor(sampler(probs.log().expand(n, -1))), minlength=7)
    expected = probs.clone()
    expected[{0.6: [0, 5, 6], 0.95: [0], 1e-6: [0, 3, 4, 5, 6], 1.0: []}[changes["top_p"]]] = 0
    if "min_p" in changes:
        expected[5] = 0
    expected *= n / expected.sum()
    assert not counts[expected == 0].any()
    seen = expected > 0
    assert ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum() < 20.5  # 5 degrees: once in a thousand


def test_sample_follows_the_probabilities():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    n = 20_000
    tokens = sample(probs.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(tokens, minlength=7)
    assert counts[probs == 0].sum() == 0
    expected = n * probs[probs > 0]
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in a thousand
    edges = torch.tensor([0.0, 1 - 2**-24])  # the smallest and largest number that torch.rand gives
    assert sample(probs.expand(2, -1), edges).tolist() == [1, 5]


def test_rows_are_sampled_alike_in_parts_and_together(monkeypatch):
    logits = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    tokens = []
    for room in (1, 3000, 1 << 20):
        monkeypatch.setattr(sampling, "CACHED", room)
        params = [SamplingParams(1.0, top_p=0.5 + i / 14, seed=i) for i in range(7)]
        states = [SamplingState(p, [], 1000, logits.device, set()) for p in params]
        samplers = make_samplers(states, 1000, logits.device)
        assert [len(sampler.states) for sampler in samplers] == {1: [1] * 7, 3000: [3, 3, 1]}.get(room, [7])
        parts = logits.split([len(sampler.states) for sampler in samplers])
        tokens.append([token for sampler, part in zip(samplers, parts, strict=True) for token in sampler(part)])
    assert tokens[0] == tokens[1] == tokens[2]


def test_greedy_and_sampled_rows_mix(model):
    prompts = make_prompts(6, 6)
    mixed = generate(model, prompts, [greedy(), SamplingParams(1.0, seed=1, max_new_tokens=16, **NO_STOP)])
    assert mixed[0].token_ids == uncached(model, prompts[0], 16)
    assert mixed[1].token_ids != uncached(model, prompts[1], 16)
    one_left = SamplingParams(5.0, top_k=1, seed=1, max_new_tokens=16, **NO_STOP)
    assert generate(model, [prompts[1]], one_left)[0].token_ids == uncached(model, prompts[1], 16)


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 1e-46, 5e-324])
def test_the_coldest_temperatures_take_the_likeliest(model, temperature):
    prompts = make_prompts(5, 9)
    cold = generate(model, prompts, SamplingParams(temperature=temperature, max_new_tokens=8, seed=1, **NO_STOP))
    likeliest = generate(model, prompts, SamplingParams(temperature=0, max_new_tokens=8, **NO_STOP))
    assert [answer.token_ids for answer in cold] == [answer.token_ids for answer in likeliest]


@torch.inference_mode()
def test_logprobs_are_the_models_own(model):
    prompt = make_prompts(7)[0]
    params = SamplingParams(0.5, top_k=3, seed=0, max_new_tokens=8, top_logprobs=0, **NO_STOP)
    result = generate(model, [prompt], params)[0]
    logits = model(torch.tensor([prompt + result.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(result.logprobs), expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"top_k": -1}, {"max_new_tokens": 0},
                {"repetition_penalty": 0}, {"stop": ("",)}],
)  # fmt: skip
def test_impossible_parameters_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        SamplingParams(**changes)


# ------------------------------------------------------------------------------------------------ text


TEXTS = [
    "Hello, world! 你好，世界。",
    "👶🏽👨‍👩‍👧 emoji family 🇨🇳 and 𠀀𪚥 rare characters, ﷽",
    "tabs\t and\n\n\nnewlines  and   spaces ",
    "ñandú façade Ελληνικά русский العربية हिन्दी 한국어",
]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_whole_characters_and_adds_up(tokenizer, text):
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.close()]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    if "emoji" in text:  # the test is about something: tokens that hold parts of characters
        assert any("�" in tokenizer.decode([token]) for token in ids) and "" in pieces


def test_stream_of_any_bytes_equals_the_tokenizers_decode(tokenizer):
    rng = random.Random(0)
    single_bytes = [i for i in range(16, 400) if "�" in tokenizer.decode([i])]
    assert len(single_bytes) > 100
    for _ in range(200):
        ids = [rng.choice(single_bytes) if rng.random() < 0.7 else rng.randrange(16, 6400) for _ in range(12)]
        stream = TextStream(tokenizer)
        assert "".join([stream.push(token) for token in ids] + [stream.close()]) == tokenizer.decode(ids)


def test_control_tokens_are_not_text_but_thinking_is(tokenizer):
    ids = [1, 3, *tokenizer.encode("hm").ids, 4, 9, 0, 2, 999_999]
    stream = TextStream(tokenizer)
    assert "".join([stream.push(token) for token in ids] + [stream.close()]) == "<think>hm</think>"


def test_half_a_character_at_a_cut_is_dropped(tokenizer):
    ids = tokenizer.encode("ok𪚥").ids
    for cut, expected in ((True, "ok"), (False, "ok�")):
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids[:-1]]
        assert "".join(pieces + [stream.close(cut)]) == expected


@pytest.mark.parametrize("cut", range(1, 12))
def test_stop_string_across_token_borders(tokenizer, cut):
    text = "The answer is ready END of it. 好的"
    stream = TextStream(tokenizer, stop=("ready END", "nowhere"))
    shown = ""
    for at in range(0, len(text), cut):  # pieces of `cut` characters, whatever the tokens are
        for token in tokenizer.encode(text[at : at + cut]).ids:
            shown += stream.push(token)
            assert "The answer is ".startswith(shown), "a part of the stop string was shown"
    assert stream.stopped and shown + stream.close() == "The answer is "


def test_a_beginning_that_was_no_stop_string_is_shown(tokenizer):
    stream = TextStream(tokenizer, stop=("\n\nuser:",))
    shown = [stream.push(token) for token in tokenizer.encode("one\n\nus").ids]
    assert "".join(shown) == "one"
    assert stream.close() == "\n\nus" and not stream.stopped


class Parrot(torch.nn.Module):
    """A model that says known sentences: the next token follows from the last one. The loop sees logits as usual."""

    def __init__(self, model: MiniMindLM, sentences: list[list[int]]):
        super().__init__()
        self.config, self.model = model.config, model.model
        pairs = dict(pair for ids in sentences for pair in zip(ids, ids[1:], strict=False))
        self.following = torch.tensor([pairs.get(token, 0) for token in range(self.config.vocab_size)])

    def forward(self, ids, cache, logits_at):
        logits = 50.0 * torch.nn.functional.one_hot(self.following[ids[logits_at]], self.config.vocab_size)
        return type("Output", (), {"logits": logits})


def test_finish_reasons_and_texts(model, tokenizer):
    def encode(text):
        return tokenizer.encode(text).ids

    goodbye = encode("Good day")
    parrot = Parrot(model, [[30, *goodbye, 2], [31, *encode("cats, dogs and birds")], [32, *encode("x" * 60)]])
    params = [SamplingParams(0), SamplingParams(0, stop=["and b", "zebra"]), greedy(3)]
    stop, stop_string, length = generate(parrot, [[30], [31], [32]], params, tokenizer, compiled=False)
    assert (stop.finish_reason, stop.text, stop.token_ids) == ("stop", "Good day", [*goodbye, 2])
    assert (stop_string.finish_reason, stop_string.text) == ("stop", "cats, dogs ")
    assert (length.finish_reason, len(length.token_ids)) == ("length", 3)
    assert length.text == tokenizer.decode(length.token_ids)
    own = generate(parrot, [[30]], SamplingParams(0, stop_token_ids=goodbye[-1:]), tokenizer, compiled=False)[0]
    assert own.finish_reason == "stop" and own.token_ids == goodbye


def test_generate_stream_equals_generate(model, tokenizer):
    prompt = make_prompts(8)[0]
    params = SamplingParams(1.0, seed=3, max_new_tokens=40, **NO_STOP)
    result = generate(model, [prompt], params, tokenizer)[0]
    pieces = list(generate_stream(model, prompt, params, tokenizer))
    assert len(pieces) > 10 and all(pieces)
    assert "".join(pieces) == result.text
    assert tokenizer.decode(result.token_ids).startswith(result.text)


# ------------------------------------------------------------------------------------------------ limits


def test_contexts_limit(model):
    prompt = make_prompts(20)[0]
    with pytest.raises(ValueError, match="prompt 1: the prompt has 20 tokens, but at most 19 fit"):
        generate(model, [[1], prompt], greedy(), max_len=20)
    result = generate(model, [prompt], greedy(50), max_len=25)[0]
    assert len(result.token_ids) == 5 and result.finish_reason == "length"
    short = make_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match="context of 16"):
        generate(short, [prompt], greedy(), max_len=100)
    with pytest.raises(ValueError, match="empty"):
        generate(model, [[]], greedy())
    with pytest.raises(ValueError, match="tokenizer"):
        generate(model, [[5]], greedy(stop=["x"]))
    assert generate(model, [], greedy()) == []


def test_weights_that_give_no_numbers_are_reported():
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(model, [[5]], greedy())


def test_training_mode_is_given_back(model):
    model.train()
    events = decode(model, [[5, 6]], greedy(4))
    next(events)
    assert not model.training
    events.close()
    assert model.training
    model.eval()


def test_results_come_as_they_end(model):
    order = [i for i, _ in generate_each(model, make_prompts(4, 4, 4), [greedy(9), greedy(1), greedy(5)])]
    assert order == [1, 2, 0]


def test_half_precision_weights_run(model):
    half = make_model().to(torch.bfloat16)
    results = generate(half, make_prompts(5, 12), SamplingParams(0.8, top_p=0.9, seed=0, max_new_tokens=8, **NO_STOP))
    assert [len(result.token_ids) for result in results] == [8, 8]


def test_five_hundred_short_prompts_take_seconds(model):
    rng = random.Random(0)
    prompts = make_prompts(*(rng.randrange(8, 40) for _ in range(500)))
    begin = time.process_time()
    results = generate(model, prompts, [greedy(rng.randrange(4, 33)) for _ in prompts])
    assert all(results) and time.process_time() - begin < 30


@pytest.mark.parametrize("least", [0, 3])
def test_no_stop_token_comes_before_the_least_number(tiny, least):
    model = tiny()
    params = SamplingParams(
        temperature=0, max_new_tokens=8, min_new_tokens=least, logit_bias={5: 100}, stop_token_ids=(5,)
    )
    (result,) = generate(model, [[7, 8, 9]], params)
    assert len(result.token_ids) == least + 1 and result.token_ids.index(5) == least
    with pytest.raises(ValueError, match="min_new_tokens"):
        SamplingParams(max_new_tokens=2, min_new_tokens=3)
