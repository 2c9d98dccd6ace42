"""Paired tests of two methods over seeds.

Each seed gives one difference. Both tests are two-sided. Student's t-test assumes normal
differences and gives a confidence interval. Wilcoxon's signed-rank test (1945) assumes only
symmetric differences and is exact. Holm's correction (1979) controls the probability of any false
positive when several methods are compared with one.

The smallest p-value of Wilcoxon's test of ``n`` differences is ``2 / 2**n``. The test is left out
if this is not below :data:`LEVEL`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05  # level of significance


@dataclass(frozen=True)
class PairedTest:
    """Mean of ``n`` differences, its 95% interval and the p-values of both tests.

    The interval and the p-values are None for a single difference. The interval and ``p_t`` are
    also None if all differences are equal, except that ``p_t`` is 1 if all are 0. ``p_wilcoxon`` is
    None for fewer than six differences.
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
    mean, error = _mean_and_error(differences)
    p_wilcoxon = wilcoxon(differences) if wilcoxon_can_reach(n) else None
    if error is None:
        p_t = 1.0 if n > 1 and mean == 0 else None
        return PairedTest(n, mean, None, None, p_t, p_wilcoxon)
    low, high = _interval(mean, error, n)
    p_t = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return PairedTest(n, mean, low, high, p_t, p_wilcoxon)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% interval of Student's t for the mean of finite values. Return None if there
    are fewer than two values or all are equal."""
    if len(values) < 2:
        return None
    mean, error = _mean_and_error(values)
    return None if error is None else _interval(mean, error, len(values))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, which is None for a single value and equal values."""
    n = len(values)
    mean = math.fsum(values) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1))
    # Equal differences of rounded numbers can differ by the rounding.
    if n < 2 or std <= 1e-12 * max(abs(value) for value in values):
        return mean, None
    return mean, std / math.sqrt(n)


def _interval(mean: float, error: float, n: int) -> tuple[float, float]:
    from scipy import stats

    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean - half, mean + half


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


def wilcoxon_can_reach(n: int, comparisons: int = 1) -> bool:
    """Return whether Wilcoxon's test of ``n`` differences can have a p-value below ``LEVEL`` after
    Holm's correction for a number of comparisons."""
    return comparisons * 2 / 2**n < LEVEL


def describe_power(n: int, of_t: int, of_wilcoxon: int) -> str:
    """Return one sentence that says what the tests of ``n`` differences can show.

    Args:
        of_t: number of t-tests that are corrected together by Holm.
        of_wilcoxon: number of Wilcoxon tests that are corrected together by Holm.
    """
    from scipy import stats

    seeds = f"With {n} seed{'s' * (n > 1)}"
    fewest = next(k for k in range(1, 64) if wilcoxon_can_reach(k, of_wilcoxon))
    needs = f"at least {fewest} seeds to reach p < {LEVEL}{_corrected(of_wilcoxon)}"
    if n < 2:
        return (
            f"{seeds} there is no test: the t-test needs at least 2 seeds, and Wilcoxon's test "
            f"needs {needs}."
        )
    errors = float(stats.t.ppf(1 - LEVEL / 2 / of_t, n - 1))
    t_test = (
        f"the t-test ({n - 1} degree{'s' * (n > 2)} of freedom) reaches p < {LEVEL}"
        f"{_corrected(of_t)} if a mean difference is above {errors:.1f} standard errors"
    )
    if wilcoxon_can_reach(n, of_wilcoxon):
        return f"{seeds} both tests can reach p < {LEVEL}: {t_test}."
    return (
        f"{seeds} Wilcoxon's test is left out, because it needs {needs}; {t_test}, and assumes "
        "normal differences, which so few seeds cannot confirm."
    )


def _corrected(comparisons: int) -> str:
    return f" after the correction for {comparisons} methods" if comparisons > 1 else ""


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values with Holm's correction for their number. None means no test and
    stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected
