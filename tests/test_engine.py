"""The engine: whoever joins, leaves or is cancelled, each request gets what it gets alone."""

import random

import pytest
import torch

from dataset.chat import load_tokenizer
from model.inference.engine import Engine, Event, generate
from model.inference.sampling import SamplingParams, SamplingState
from model.model import LoRAConfig, MiniMindLM, add_lora, lora_layers, merge_lora, set_adapter

NO_STOP = dict(stop_token_ids=())
VOCAB = 320


@pytest.fixture
def model(tiny):
    return tiny()


def greedy(n: int = 12, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_new_tokens": n, **NO_STOP, **more})


def make_prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(20, VOCAB) for _ in range(n)] for n in lengths]


def alone(model: MiniMindLM, prompt: list[int], params: SamplingParams) -> list[int]:
    return generate(model, [prompt], params)[0].token_ids


def run(engine: Engine) -> dict[int, list[int]]:
    """All that the engine still says, by request."""
    said: dict[int, list[int]] = {}
    while engine.busy:
        for event in engine.step():
            said.setdefault(event.index, []).append(event.token_id)
    return said


def count_prefill(monkeypatch, engine: Engine) -> list[int]:
    """A list that grows by the number of tokens (padding included) of whatever the engine computes at once."""
    computed, forward, step = [], engine.model.forward, engine.cpu_step
    if step is None:
        monkeypatch.setattr(
            engine.model, "forward", lambda ids, **kwargs: (computed.append(ids.numel()), forward(ids, **kwargs))[1]
        )
    else:
        counted = lambda new, *rest: (computed.append(sum(map(len, new))), step(new, *rest))[1]  # noqa: E731
        monkeypatch.setattr(engine, "cpu_step", counted)
    return computed


# ------------------------------------------------------------------------------------------------ joining, leaving


@pytest.mark.parametrize("chunk", [512, 16])
def test_join_and_leave_at_random_times_changes_nothing(model, chunk):
    """60 requests with seeds, lengths, samplers and prefixes of all kinds come and go, some are cancelled."""
    rng = random.Random(0)
    system = make_prompts(40)[0]
    requests = []
    for i in range(60):
        prompt = (system[: rng.choice([0, 0, 20, 40])]) + make_prompts(rng.randrange(1, 70), seed=i)[0]
        sampling = rng.choice([{}, dict(temperature=1.0, seed=i, top_p=0.9), dict(temperature=1.3, top_k=20, seed=i)])
        penalty = rng.choice([{}, dict(presence_penalty=1.0), dict(repetition_penalty=1.2, frequency_penalty=0.5)])
        requests.append((prompt, greedy(rng.randrange(1, 40), **sampling, **penalty)))
    engine = Engine(model, slots=5, prefill_chunk=chunk)
    said, cancelled, largest = {}, set(), 0
    waiting = list(enumerate(requests))
    while waiting or engine.busy:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                number, (prompt, params) = waiting.pop(0)
                assert engine.add(prompt, params) == number
        if rng.random() < 0.05 and said:
            cancelled.add(number := rng.choice(list(said)))
            engine.cancel(number)
        for event in engine.step():
            said.setdefault(event.index, []).append(event.token_id)
        largest = max(largest, engine.running)
    assert largest == 5 and cancelled
    for number, (prompt, params) in enumerate(requests):
        expected = alone(model, prompt, params)
        if number in cancelled:
            expected = expected[: len(said[number])]
        assert said.get(number, []) == expected, f"request {number}"


def test_a_long_prompt_does_not_stall_the_others(model):
    engine = Engine(model, slots=3, prefill_chunk=16)
    short = engine.add(make_prompts(3)[0], greedy(30))
    engine.step()
    long = engine.add(make_prompts(100)[0], greedy(3))
    for _ in range(6):  # 96 of 100 tokens
        assert [event.index for event in engine.step()] == [short]
    assert [event.index for event in engine.step()] == [short, long]


def test_waiting_requests_run_in_order_and_the_counts_are_right(model):
    engine = Engine(model, slots=2)
    assert not engine.busy and engine.step() == []
    numbers = [engine.add(prompt, greedy(2)) for prompt in make_prompts(4, 5, 6, 7, 8)]
    assert (engine.running, engine.waiting, engine.busy) == (0, 5, True)
    first = [event.index for event in engine.step()]
    assert first == numbers[:2] and (engine.running, engine.waiting) == (2, 3)
    order = list(run(engine))
    assert set(order[:2]) == set(numbers[:2]) and set(order[2:4]) == set(numbers[2:4]) and order[4:] == numbers[4:]
    assert not engine.busy


def test_cancel_frees_the_slot_at_once(model):
    engine = Engine(model, slots=1, prefill_chunk=8)
    long, other, last = (engine.add(prompt, greedy(100)) for prompt in make_prompts(60, 5, 6))
    engine.step()
    assert engine.running == 1
    engine.cancel(long)  # in the middle of its prefill
    assert (engine.running, engine.waiting) == (0, 2)
    engine.cancel(last)  # before it ran
    engine.cancel(99)
    engine.cancel(long)
    assert (engine.running, engine.waiting) == (0, 1)
    assert [event.index for event in engine.step()] == [other]
    engine.cancel(other)
    assert not engine.busy and engine.step() == []


# ------------------------------------------------------------------------------------------------ prefix reuse


def test_a_shared_prefix_is_computed_once_and_changes_nothing(model, monkeypatch):
    system = make_prompts(200)[0]
    prompts = [system + question for question in make_prompts(5, 9, 7, seed=2)]
    expected = [alone(model, prompt, greedy()) for prompt in prompts]
    engine = Engine(model, slots=4)
    computed = count_prefill(monkeypatch, engine)
    for prompt in prompts:
        engine.add(prompt, greedy())
    assert list(run(engine).values()) == expected
    # the first whole, the others padded to the longer of the two, and the steps
    assert computed[0] == 205 and sum(computed) < 205 + 2 * 9 + 3 * 13


def test_a_continued_chat_computes_only_what_is_new(model, monkeypatch):
    engine = Engine(model, slots=2)
    engine.add(first := make_prompts(60)[0], greedy())
    answer = run(engine)[0]
    computed = count_prefill(monkeypatch, engine)
    again = [*first, *answer, *make_prompts(6, seed=3)[0]]
    engine.add(again, greedy())
    said = run(engine)[1]
    assert computed[0] == 7  # the last token of the answer was never put in
    assert said == alone(model, again, greedy())
    engine.add(again, greedy())  # all of it is there: its last token is computed for the logits
    assert run(engine)[2] == said


def test_a_running_slots_prefix_is_copied_while_it_runs(model, monkeypatch):
    engine = Engine(model, slots=2)
    prompt, tail = make_prompts(50, 4)
    engine.add(prompt, greedy(20))
    engine.step()
    computed = count_prefill(monkeypatch, engine)
    engine.add([*prompt, *tail], greedy(20))
    said = run(engine)
    assert computed[1] == 4
    assert said == {0: alone(model, prompt, greedy(20))[1:], 1: alone(model, [*prompt, *tail], greedy(20))}


# ------------------------------------------------------------------------------------------------ adapters


def with_adapters(model: MiniMindLM, *names: str) -> MiniMindLM:
    for i, name in enumerate(names):
        add_lora(model, name, LoRAConfig(rank=4, alpha=16))
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.matrices(name)[1], std=0.3, generator=torch.Generator().manual_seed(i))
    set_adapter(model, None)
    return model


@pytest.mark.parametrize("moe", [{}, dict(num_experts=4)], ids=["dense", "moe"])
def test_adapters_per_request_equal_the_switched_model(tiny, moe):
    model = with_adapters(tiny(**moe), "a", "b")
    prompt = make_prompts(40)[0]  # the same for all: a cache shared between adapters would be wrong
    expected = {}
    for name in (None, "a", "b"):
        set_adapter(model, name)
        expected[name] = alone(model, prompt, greedy())
    assert len({tuple(ids) for ids in expected.values()}) == 3
    set_adapter(model, None)
    engine = Engine(model, slots=5)
    names = ["b", None, "a", "b", None, "a", "b"]
    numbers = {engine.add(prompt, greedy(), name): name for name in names}
    for number, ids in run(engine).items():
        assert ids == expected[numbers[number]], f"request {number}, adapter {numbers[number]}"
    assert all(layer.active is None for layer in lora_layers(model).values())
    set_adapter(model, "a")
    engine.add(prompt, greedy())  # None: what is active in the model
    assert list(run(engine).values()) == [expected["a"]]


def test_adapters_that_cannot_work_are_refused(model):
    engine = Engine(with_adapters(model, "a"))
    with pytest.raises(ValueError, match="there is no adapter b; the model has a"):
        engine.add([5], greedy(), "b")
    set_adapter(model, "a")
    merge_lora(model)
    with pytest.raises(ValueError, match="merged"):
        engine.add([5], greedy(), "a")


# ------------------------------------------------------------------------------------------------ sampling


@torch.inference_mode()
def test_penalties_and_bias_follow_openais_formula(model):
    prompt = make_prompts(9)[0]
    p = greedy(40, presence_penalty=0.7, frequency_penalty=0.4, logit_bias={7: 2.5, 300: -3.0})
    expected: list[int] = []
    for _ in range(40):
        logits = model(torch.tensor([prompt + expected])).logits[0, -1]
        for token in set(expected):  # not the prompt's
            logits[token] -= 0.7 + 0.4 * expected.count(token)
        logits[7] += 2.5
        logits[300] -= 3.0
        expected.append(int(logits.argmax()))
    assert alone(model, prompt, p) == expected
    assert expected != alone(model, prompt, greedy(40))
    assert set(alone(model, prompt, greedy(5, logit_bias={7: 100}))) == {7}


def test_presence_counts_once_and_frequency_each_time():
    params = SamplingParams(presence_penalty=0.7, frequency_penalty=0.4)
    state = SamplingState(params, [9, 9], VOCAB, torch.device("cpu"), set())
    for token in (7, 7, 7, 8):
        state.accept(token)
    penalty = -state.adjust(torch.zeros(VOCAB))
    assert penalty.nonzero()[:, 0].tolist() == [7, 8]
    assert penalty[[7, 8]].tolist() == pytest.approx([0.7 + 3 * 0.4, 0.7 + 0.4])


@torch.inference_mode()
def test_logprobs_are_log_softmax(model):
    prompt = make_prompts(9)[0]
    engine = Engine(model, slots=2)
    engine.add(prompt, greedy(6, temperature=1.5, seed=1, top_logprobs=4, logit_bias={5: 3}))
    engine.add(prompt, greedy(6))
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    mine = [event for event in events if event.index == 0]
    ids = prompt + [event.token_id for event in mine]
    wanted = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for event, row in zip(mine, wanted, strict=True):
        assert event.logprob == pytest.approx(float(row[event.token_id]), abs=1e-4)
        assert [i for i, _ in event.top_logprobs] == row.topk(4).indices.tolist()
        assert [value for _, value in event.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
    assert all(event.logprob is None and event.top_logprobs is None for event in events if event.index == 1)


class OnlyThese:
    """Each of these tokens once, in any order."""

    def __init__(self, tokens: set[int]):
        self.left = set(tokens)

    def mask(self) -> torch.Tensor:
        mask = torch.zeros(VOCAB, dtype=torch.bool)
        mask[sorted(self.left)] = True
        return mask

    def accept(self, token: int) -> None:
        self.left.remove(token)


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_a_constraint_is_respected_and_ends_the_text(model, temperature):
    engine = Engine(model, slots=2)
    free = engine.add(make_prompts(8)[0], greedy(9))
    sampling = dict(temperature=temperature, seed=0, stop_token_ids=(2,))
    number = engine.add(make_prompts(8)[0], greedy(9, constraint=OnlyThese({30, 40, 50}), **sampling))
    said = run(engine)
    assert sorted(said[number][:3]) == [30, 40, 50] and said[number][3:] == [2]
    assert said[free] == alone(model, make_prompts(8)[0], greedy(9))


# ------------------------------------------------------------------------------------------------ limits


def test_what_cannot_be_served_is_refused_and_the_rest_goes_on(model):
    engine = Engine(model, slots=2, max_len=20)
    good = engine.add([5, 6], greedy(3))
    for prompt, params, message in [
        ([], greedy(), "empty"),
        ([5] * 20, greedy(), "20 tokens, but at most 19 fit a context of 20"),
        ([5, VOCAB], greedy(), f"prompt: there is no token {VOCAB}"),
        ([-1], greedy(), "no token -1"),
        ([5], greedy(logit_bias={VOCAB: 1}), "logit_bias: there is no token"),
        ([5], greedy(top_logprobs=VOCAB + 1), "top_logprobs"),
        ([5], greedy(stop=["x"]), "tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, params)
    assert len(run(engine)[good]) == 3
    with pytest.raises(ValueError, match="slots 0"):
        Engine(model, slots=0)


def test_the_context_fills_to_its_last_token(model):
    engine = Engine(model, slots=1, max_len=20)
    engine.add(prompt := make_prompts(15)[0], greedy(50))
    assert run(engine)[0] == alone(model, prompt, greedy(5))


def test_text_comes_with_the_events(tiny):
    tokenizer = load_tokenizer()
    model = tiny(vocab_size=6400)
    engine = Engine(model, tokenizer, slots=2)
    engine.add([5, 6], greedy(30))
    engine.add([7, 8], greedy(30))
    texts = {0: "", 1: ""}
    while engine.busy:
        for event in engine.step():
            texts[event.index] += event.text
    assert texts == {i: generate(model, [[a, a + 1]], greedy(30), tokenizer)[0].text for i, a in ((0, 5), (1, 7))}
