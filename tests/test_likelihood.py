"""Likelihoods of continuations, and the figures made of them."""

import math
import random

import pytest
import torch

from evaluation.statistics import paired_difference, pass_at_k, ratio, share_of_best, wilson
from model.inference.likelihood import BATCH_TOKENS, Item, common_beginning, score_items


def expected(model, item: Item) -> list[tuple[float, bool]]:
    """Each continuation in a forward of its own, nothing shared and nothing cached."""
    scores = []
    for continuation in item.continuations:
        logits = model(torch.tensor([item.context + continuation])).logits[0]
        logits = logits[len(item.context) - 1 : -1]
        tokens = torch.tensor(continuation)
        total = logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item()
        scores.append((total, bool((logits.argmax(-1) == tokens).all())))
    return scores


def make_items(n: int, shared: int, seed: int = 0) -> list[Item]:
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(320) for _ in range(rng.randint(low, high))]

    beginning = ids(shared, shared)
    return [Item(beginning + ids(1, 40), [ids(1, 7) for _ in range(rng.randint(1, 5))]) for _ in range(n)]


@pytest.mark.parametrize("shared", [0, 3, 30])
@pytest.mark.parametrize("changes", [{}, {"num_experts": 4}, {"qk_norm": True}])
@torch.no_grad()
def test_branches_in_one_row_are_the_continuations_alone(tiny, shared, changes):
    model, items = tiny(**changes), make_items(25, shared)
    for item, scores in zip(items, score_items(model, items), strict=True):
        for score, (logprob, greedy) in zip(scores, expected(model, item), strict=True):
            assert score.logprob == pytest.approx(logprob, abs=1e-3)
            assert score.is_greedy == greedy


@torch.no_grad()
def test_the_greedy_continuation_is_known_as_such(tiny):
    model = tiny()
    context = [5, 6, 7]
    answer = model.generate(torch.tensor([context]), 6)[0, 3:].tolist()
    (scores,) = score_items(model, [Item(context, [answer, [*answer[:-1], (answer[-1] + 1) % 320]])])
    assert [score.is_greedy for score in scores] == [True, False]


@torch.no_grad()
def test_one_question_is_a_batch_too_and_a_long_one_passes(tiny):
    model, rng = tiny(), random.Random(1)
    long = Item([rng.randrange(320) for _ in range(BATCH_TOKENS + 5)], [[1], [2, 3]])
    (scores,) = score_items(model, [long])
    assert scores[0].logprob == pytest.approx(expected(model, long)[0][0], abs=1e-3)
    assert score_items(model, []) == []


def test_progress_counts_every_item(tiny):
    items, seen = make_items(30, 0), []
    score_items(tiny(), items, seen.append)
    assert seen[-1] == 30 and seen == sorted(seen)


def test_common_beginning_leaves_each_context_a_token():
    assert common_beginning([list(range(20)), list(range(20))]) == 19
    assert common_beginning([list(range(20)), [*range(12), 99]]) == 12
    assert common_beginning([[1, 2], [1, 3]]) == 0  # not worth it


def test_intervals_are_those_of_statsmodels():
    """Wilson's for 25 of 100 and 0 of 10, to four digits as statsmodels.stats.proportion gives them."""
    assert wilson(25, 100) == pytest.approx((0.1755, 0.3430), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson(2882, 11528)  # as many questions as CMMLU has
    assert (high - low) / 2 == pytest.approx(0.0079, abs=1e-4)


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    rng, held = random.Random(0), [0, 0, 0]
    for _ in range(400):
        right = [rng.random() < 0.3 for _ in range(120)]
        other = [r if rng.random() < 0.8 else rng.random() < 0.3 for r in right]
        low, high = wilson(sum(right), len(right))
        held[0] += low <= 0.3 <= high
        _, (low, high) = paired_difference([float(r) for r in right], [float(r) for r in other])
        held[1] += low <= 0 <= high
        sizes = [rng.randint(1, 20) for _ in range(120)]
        bits = [size * rng.uniform(1, 3) for size in sizes]
        _, (low, high) = ratio(bits, sizes)
        held[2] += low <= 2 <= high
    assert all(0.92 <= count / 400 <= 0.98 for count in held), held


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    rng, samples = random.Random(0), [1, 1, 0, 0, 0, 0, 0, 0]
    drawn = sum(max(rng.sample(samples, 3)) for _ in range(20_000)) / 20_000
    assert pass_at_k(8, 2, 3) == pytest.approx(drawn, abs=0.01)
    assert (pass_at_k(4, 0, 4), pass_at_k(4, 1, 4)) == (0.0, 1.0)


def test_equal_scores_share_the_point():
    assert share_of_best([1.0, 1.0, 0.0], 1) == 0.5
    assert share_of_best([1.0, 1.0, 0.0], 2) == 0.0
    assert share_of_best([-math.inf, -1.0], 1) == 1.0
