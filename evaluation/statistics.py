"""What figures of a benchmark are worth: intervals, paired differences, pass@k.

low, high = wilson(25, 100); difference, (low, high) = paired_difference(ours, theirs)
"""

import math
from collections.abc import Sequence

Z = 1.959964  # standard deviations of a 95 % interval
Interval = tuple[float, float]


def wilson(right: float, n: int) -> Interval:
    """95 % interval of a share (Wilson 1927), which stays within 0 and 1 and is right for few questions too."""
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(max(share * (1 - share), 0.0) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, Interval]:
    """Mean of second - first over the same questions, and its 95 % interval (Miller 2024, arXiv:2411.00640): what makes
    a question hard for both of them drops out."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean, error = mean_and_error(differences)
    return mean, (mean - Z * error, mean + Z * error)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.inf
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, Interval]:
    """Sum over sum, such as bits per byte, and its 95 % interval by linearisation over the questions."""
    total = sum(denominators)
    value = sum(numerators) / total
    n = len(numerators)
    if n < 2:
        return value, (-math.inf, math.inf)
    rest = [a - value * b for a, b in zip(numerators, denominators, strict=True)]
    error = math.sqrt(n / (n - 1) * sum(r * r for r in rest)) / total
    return value, (value - Z * error, value + Z * error)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k of the samples is right, without bias (Chen et al. 2021, arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def share_of_best(scores: Sequence[float], right: int) -> float:
    """1 if the right one has the highest score, 0 if not; among k equal ones 1 / k."""
    best = max(scores)
    winners = [i for i, score in enumerate(scores) if score == best]
    return 1 / len(winners) if right in winners else 0.0
