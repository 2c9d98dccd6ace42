"""Paired tests of two methods over seeds.

Each seed gives one difference. Both tests are two-sided. Student's t-test assumes normal
differences and gives a confidence interval. Wilcoxon's signed-rank test (1945) assumes only
symmetric differences and is exact. Holm's correction (1979) controls the probability of any false
positive when several methods are compared with one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedTest:
    """Mean of ``n`` differences, its 95% interval and the p-values of both tests.

    The interval and the p-values are None for a single difference. The interval and ``p_t`` are
    also None if all differences are equal, except that ``p_t`` is 1 if all are 0.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p_t: float | None
    p_wilcoxon: float | None


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test whether the mean difference is 0.

    Raises:
        ValueError: there are no differences, or one is not finite.
    """
    from scipy import stats  # importing it takes time

    n = len(differences)
    if n == 0 or not all(math.isfinite(d) for d in differences):
        raise ValueError(f"a paired test needs finite differences, got {list(differences)}")
    mean = math.fsum(differences) / n
    p_wilcoxon = wilcoxon(differences) if n > 1 else None
    std = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / max(1, n - 1))
    # Equal differences of rounded numbers can differ by the rounding.
    if n < 2 or std <= 1e-12 * max(abs(d) for d in differences):
        p_t = 1.0 if n > 1 and mean == 0 else None
        return PairedTest(n, mean, None, None, p_t, p_wilcoxon)
    error = std / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p_t = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return PairedTest(n, mean, mean - half, mean + half, p_t, p_wilcoxon)


def wilcoxon(differences: Sequence[float]) -> float:
    """Return the exact two-sided p-value of the signed-rank test, with any number of ties.

    The distribution of the rank sum is computed over all signs, given the ranks. Differences of 0
    are left out. Sizes that are equal up to rounding share their mean rank.
    """
    sizes = sorted((abs(d), d > 0) for d in differences if d != 0)
    n = len(sizes)
    doubled = [0] * n  # twice the ranks, which are integers
    start = 0
    while start < n:
        end = start
        while end < n and sizes[end][0] <= sizes[start][0] * (1 + 1e-9):
            end += 1
        doubled[start:end] = [start + 1 + end] * (end - start)  # first rank + last rank
        start = end
    observed = sum(rank for rank, (_, positive) in zip(doubled, sizes, strict=True) if positive)
    ways = [1] + [0] * sum(doubled)  # number of the 2^n signs that give each rank sum
    for rank in doubled:
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    tail = min(sum(ways[: observed + 1]), sum(ways[observed:]))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values corrected for their number. None is not a test and is returned as is."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected
