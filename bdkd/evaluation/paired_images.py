"""Compare two networks on the same images, such as an fp32 network and its int8 version.

Each metric has a value before and after the change, and a 95% interval of the difference by the
paired bootstrap over images: each resample contains the same images for both networks, so that
images which are difficult for both do not widen the interval.

- **top-1**: the interval of Bonett and Price (2012) for paired proportions, which adds an image to
  each kind of change. The bootstrap interval is too narrow if few images change between right and
  wrong. If no image changes, it is 0 to 0.
- **NLL, Brier**: percentile interval. They are means over images.
- **ECE**: pivotal interval, ``2 difference - quantile``, not clamped. Resampling increases an ECE,
  most of all for a calibrated network (see :func:`bdkd.evaluation.calibration.bootstrap`). If both
  networks are equally calibrated, the increases cancel. Otherwise, the percentile interval is far
  too close to 0. The pivotal interval corrects only a part of this: if the ECE changes by more than
  about one point, it contains the true change in less than 95% of the data sets (see the coverage
  tests). The temperature and the NLL show such changes more reliably.
- **temperature**: refitted on the validation images. The interval resamples the validation images,
  and moves the temperature of each resample by one Newton step in ``log T`` from the fitted one.
- **ECE, NLL, Brier at T**: the logits of each network are divided by its own fitted temperature,
  which is the same in all resamples: the intervals do not include the error of the fit.
- **agreement**: the share of the images with equal predictions, with the Clopper-Pearson interval,
  which is valid even if all images agree.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bdkd.evaluation.calibration import BINS, Calibration, bin_edges
from bdkd.evaluation.temperature import HIGHEST, LOWEST, fit_temperature, newton_terms
from bdkd.metrics import SCALED

LEVEL = 0.95
DRAWS = 1000
_NORMAL = 1.959964  # 97.5% quantile
_METRICS = ("top1", "nll", "ece", "brier")
_NUMBERS = 2**22  # maximum number of float64 values at a time: 32 MB


class Change(NamedTuple):
    """A metric before and after, and the 95% interval of the difference. A value that cannot be
    computed is None."""

    before: float | None
    after: float | None
    difference: float | None
    low: float | None
    high: float | None


class Agreement(NamedTuple):
    """The share of the images with equal predictions, and its 95% interval."""

    value: float | None
    low: float | None
    high: float | None


class Comparison(NamedTuple):
    changes: Mapping[str, Change]  # by metric
    agreement: Agreement
    images: int
    validation_images: int
    draws: int


class Logits(NamedTuple):
    """The logits of two networks on the same images."""

    before: Tensor  # (N, C)
    after: Tensor  # (N, C)
    target: Tensor  # (N,)


NO_CHANGE = Change(None, None, None, None, None)


def compare_on_images(
    split: Logits, validation: Logits | None = None, draws: int = DRAWS, seed: int = 0
) -> Comparison:
    """Return the changes of all metrics from one network to another. The result is deterministic.

    Args:
        split: logits on the images to measure on.
        validation: logits on the images to fit temperatures on. Without them, the temperature and
            the metrics at T are None.
        draws: number of resampled data sets.
        seed: seed of the resampling, which runs on the CPU.

    Raises:
        ValueError: shapes do not match, there are no images, or draws is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    for logits in (split, *((validation,) if validation else ())):
        _check(logits)
    temperatures, change_of_temperature = _temperatures(validation, draws, seed)
    changes = dict(zip(_METRICS, _changes(split, (1.0, 1.0), draws, seed), strict=True))
    changes["temperature"] = change_of_temperature
    scaled = [NO_CHANGE] * len(_METRICS)
    if None not in temperatures:
        before, after = (float(temperature or 1) for temperature in temperatures)
        scaled = _changes(split, (before, after), draws, seed)
    at_t = dict(zip(_METRICS, scaled, strict=True))
    changes |= {f"{metric}_scaled": at_t[metric] for metric in SCALED}
    count = len(validation.target) if validation else 0
    return Comparison(changes, _agreement(split), len(split.target), count, draws)


def _check(logits: Logits) -> None:
    before, after, target = logits
    if before.ndim != 2 or before.shape != after.shape or target.shape != before.shape[:1]:
        raise ValueError(
            "the logits of both networks must have the same shape (N, C) and target (N,), got "
            f"{tuple(before.shape)}, {tuple(after.shape)} and {tuple(target.shape)}"
        )
    if not len(target):
        raise ValueError("there are no images to compare on")
    low, high, classes = int(target.min()), int(target.max()), before.shape[1]
    if low < 0 or high >= classes:
        found = low if low < 0 else high
        raise ValueError(f"a label must be in [0, {classes}), for {classes} classes, got {found}")


class _Measured(NamedTuple):
    """One network at one temperature."""

    values: list[float]  # of _METRICS
    columns: Tensor  # (N, 3 + BINS) float64: correct, NLL, Brier, gap of confidence by bin

    def resampled(self, counts: Tensor) -> Tensor:
        """Return the metrics of resamples, (R, 4).

        Args:
            counts: (R, N) float64, how often each image is in each resample.
        """
        sums = counts @ self.columns / counts.shape[1]  # (R, 3 + BINS)
        correct, nll, brier = sums[:, :3].unbind(1)
        return torch.stack((correct, nll, sums[:, 3:].abs().sum(1), brier), 1)


def _measure(logits: Tensor, target: Tensor, temperature: float) -> _Measured:
    meter = Calibration(logits.shape[1])
    rows, columns = max(1, _NUMBERS // logits.shape[1]), []
    for x, y in zip(logits.split(rows), target.long().split(rows), strict=True):
        x = x.double() / temperature
        meter.update(x, y)
        nll = cross_entropy(x, y, reduction="none")  # (B,)
        p = x.softmax(-1)  # (B, C)
        p_label = p.gather(-1, y.unsqueeze(-1)).squeeze(-1)  # (B,)
        columns.append(torch.stack((nll, p.square().sum(-1) - 2 * p_label + 1), 1))
    confidence, correct = meter.samples()
    bins = torch.bucketize(confidence, bin_edges(BINS)).unsqueeze(1)  # (N, 1)
    gap = (correct.double() - confidence).unsqueeze(1)  # (N, 1)
    gaps = torch.zeros(len(gap), BINS, dtype=torch.float64).scatter_(1, bins, gap)
    result = meter.compute(draws=1)
    values = [result.top1, result.nll, result.ece, result.brier]
    of_correct = correct.double().unsqueeze(1)  # (N, 1)
    return _Measured(values, torch.cat((of_correct, torch.cat(columns), gaps), 1))


def _changes(
    split: Logits, temperatures: tuple[float, float], draws: int, seed: int
) -> list[Change]:
    """Return the changes of ``_METRICS``, with the logits divided by a temperature each."""
    before = _measure(split.before, split.target, temperatures[0])
    after = _measure(split.after, split.target, temperatures[1])
    differences = torch.cat(
        [
            after.resampled(counts) - before.resampled(counts)
            for counts in _resamples(len(split.target), draws, seed)
        ]
    )  # (draws, 4)
    changes = []
    for metric, resampled, was, now in zip(
        _METRICS, differences.unbind(1), before.values, after.values, strict=True
    ):
        low, high = _quantiles(resampled)
        if metric == "top1":
            low, high = _interval_of_top1(before.columns[:, 0], after.columns[:, 0])
        elif metric == "ece":
            low, high = 2 * (now - was) - high, 2 * (now - was) - low
        changes.append(_change(was, now, low, high))
    return changes


def _interval_of_top1(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the Bonett-Price interval of a difference of accuracies.

    Args:
        before, after: (N,), 1 for the images that are classified correctly, else 0.
    """
    count = len(before) + 2
    gained = (int(((before == 0) & (after == 1)).sum()) + 1) / count
    lost = (int(((before == 1) & (after == 0)).sum()) + 1) / count
    difference = gained - lost
    half = _NORMAL * math.sqrt((gained + lost - difference**2) / count)
    return max(-1.0, difference - half), min(1.0, difference + half)


def _temperatures(
    validation: Logits | None, draws: int, seed: int
) -> tuple[tuple[float | None, float | None], Change]:
    """Return the fitted temperatures of both networks, and their change."""
    if validation is None:
        return (None, None), NO_CHANGE
    target = validation.target
    before, after = (fit_temperature(x, target) for x in validation[:2])
    if before is None or after is None:
        return (before, after), Change(before, after, None, None, None)
    low = high = math.nan
    if LOWEST < before < HIGHEST and LOWEST < after < HIGHEST:
        terms = [newton_terms(validation.before, target, before),
                 newton_terms(validation.after, target, after)]  # fmt: skip
        differences = torch.cat(
            [
                _newton_step(counts @ terms[1], after) - _newton_step(counts @ terms[0], before)
                for counts in _resamples(len(target), draws, seed)
            ]
        )
        low, high = _quantiles(differences)
    return (before, after), _change(before, after, low, high)


def _newton_step(sums: Tensor, temperature: float) -> Tensor:
    """Return the temperatures (R,) of resamples.

    Args:
        sums: (R, 2) float64, the derivatives of the NLL with respect to ``log T``.
    """
    first, second = sums.unbind(1)
    # The NLL is convex in 1 / T and may not be in log T. first + second is always positive.
    curvature = second.where(second > 0, first + second)
    return (temperature * (-first / curvature).exp()).clamp(LOWEST, HIGHEST)


def _agreement(split: Logits) -> Agreement:
    from scipy import stats  # importing it takes time

    if any(x.double().softmax(-1).isnan().any() for x in _pieces(split)):
        return Agreement(None, None, None)
    count = len(split.target)
    equal = int((split.before.argmax(-1) == split.after.argmax(-1)).sum())
    interval = stats.binomtest(equal, count).proportion_ci(LEVEL, method="exact")
    return Agreement(equal / count, float(interval.low), float(interval.high))


def _pieces(split: Logits) -> Iterator[Tensor]:
    rows = max(1, _NUMBERS // split.before.shape[1])
    yield from split.before.split(rows)
    yield from split.after.split(rows)


def _resamples(count: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each image is in each resample, (R, N) float64, in pieces of limited size."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _NUMBERS // count)
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        pick = torch.randint(count, (size, count), generator=generator)
        counts = torch.zeros(size, count, dtype=torch.float64)
        yield counts.scatter_add_(1, pick, torch.ones_like(counts))


def _quantiles(values: Tensor) -> tuple[float, float]:
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = values.quantile(tails).tolist()
    return low, high


def _change(before: float, after: float, low: float, high: float) -> Change:
    values = (before, after, after - before, low, high)
    return Change(*(value if math.isfinite(value) else None for value in values))
