"""Paired tests of two methods over seeds: is the difference more than the seeds' chance?

Each seed gives one difference. Two tests, both two-sided: Student's t, which takes the differences
as normal and gives an interval, and Wilcoxon's signed ranks (1945), exact, which takes them as
symmetric only. Several methods against one: Holm's correction (1979), which holds the chance of any
false alarm among them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class PairedTest:
    """Of ``n`` differences: their mean, its 95% interval, and the tests' p-values.

    None: with fewer than two differences there is no interval; where all differences are one number
    other than 0, Student's t knows no spread to judge it by.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p_t: float | None
    p_wilcoxon: float | None


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test whether the differences are about 0.

    Raises:
        ValueError: none, or one that is not finite.
    """
    n = len(differences)
    if n == 0 or not all(math.isfinite(d) for d in differences):
        raise ValueError(f"a paired test needs finite differences, got {list(differences)}")
    mean = math.fsum(differences) / n
    p_wilcoxon = wilcoxon(differences) if n > 1 else None
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / max(1, n - 1))
    # Equal differences of rounded numbers are equal to rounding only.
    constant = spread <= 1e-12 * max(abs(d) for d in differences)
    if n < 2 or constant:
        p_t = 1.0 if n > 1 and mean == 0 else None
        return PairedTest(n, mean, None, None, p_t, p_wilcoxon)
    error = spread / math.sqrt(n)
    half = t_quantile(0.975, n - 1) * error
    return PairedTest(
        n, mean, mean - half, mean + half, t_two_sided(mean / error, n - 1), p_wilcoxon
    )


def t_two_sided(t: float, df: float) -> float:
    """Probability that Student's t of ``df`` degrees of freedom is as far from 0 as ``t``."""
    return _incomplete_beta(df / (df + t * t), df / 2, 0.5)


@cache  # a comparison asks for the same one dozens of times
def t_quantile(p: float, df: float) -> float:
    """The value that Student's t stays below with probability ``p``, for 0.5 < p < 1."""
    if not 0.5 < p < 1:
        raise ValueError(f"p must be between 0.5 and 1, got {p}")
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > 2 * (1 - p):
        low, high = high, 2 * high
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_two_sided(middle, df) > 2 * (1 - p) else (low, middle)
    return (low + high) / 2


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p-value of the signed-rank test, exact for any number of ties: the distribution of
    the rank sum over all signs, given the ranks. Differences of 0 are left out; equal sizes share
    their mean rank. Sizes that are equal to rounding are equal."""
    sizes = sorted((abs(d), d > 0) for d in differences if d != 0)
    n = len(sizes)
    doubled = [0] * n  # twice the ranks: whole numbers, halves included
    start = 0
    while start < n:
        end = start
        while end < n and sizes[end][0] <= sizes[start][0] * (1 + 1e-9):
            end += 1
        doubled[start:end] = [start + 1 + end] * (end - start)  # first rank + last rank
        start = end
    observed = sum(rank for rank, (_, positive) in zip(doubled, sizes, strict=True) if positive)
    ways = [1] + [0] * sum(doubled)  # of 2^n signs, how many give a rank sum
    for rank in doubled:
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    tail = min(sum(ways[: observed + 1]), sum(ways[observed:]))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p-values corrected for their number; those that are None are no tests and stay so."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22),
    evaluated on the side where it converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        + a * math.log(x) + b * math.log1p(-x)
    )  # fmt: skip
    # From the tail inwards: 1 + d_1 / (1 + d_2 / (1 + ...)); 400 terms are more than enough for
    # any a, b below 10,000.
    fraction = 1.0
    for m in range(200, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    return front / (a * fraction)
