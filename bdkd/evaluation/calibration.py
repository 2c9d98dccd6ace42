"""Measure accuracy and calibration of a classifier batch by batch, on its device and exactly.

Definitions for ``N`` samples with probabilities ``p`` (softmax at temperature 1, in float64 for
logits of any type), labels ``y`` and confidence ``c = max p``:

- top-1, top-5: fraction of samples with fewer than 1 (5) classes ranked before the label. Of equal
  logits, the lower class is ranked first, as in ``argmax``.
- NLL: mean of ``-log p_y``, nats. Brier: mean of ``sum over classes of (p - onehot(y))^2``.
  Entropy: mean of ``-sum p log p``, nats.
- ECE: ``sum over bins of (n_b / N) |accuracy_b - confidence_b|`` over 15 bins ``(k/15, (k+1)/15]``
  of confidence (Guo et al. 2017, arXiv 1706.04599). MCE: the largest gap of a bin.
- adaptive ECE: the ECE over 15 bins with equal numbers of samples. Samples of equal confidence are
  in the same bin.
- class-wise ECE: mean over classes of the ECE of the probability of the class, with the label rate
  instead of accuracy (Kull et al. 2019, arXiv 1910.12656). A probability of 0 is in the first bin.

Bin edges and sums are float64 and counts are int64: several float32 edges differ from ``k/15``,
softmax saturates at 1.0 in low precision, and low-precision counters stop increasing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15
_TOP = 5


@dataclass(frozen=True)
class CalibrationResult:
    """Metrics of one network on one data set, as defined in this module.

    Accuracies and calibration errors are fractions; ``nll`` and ``entropy`` are in nats. The tuples
    have one value for each of the 15 bins, 0 for an empty bin. ``ece_if_calibrated`` is the
    expected ECE of a perfectly calibrated network with the same confidences
    (:func:`expected_ece`). A similar ECE is no evidence of miscalibration.
    """

    count: int
    top1: float
    top5: float
    nll: float
    brier: float
    ece: float
    mce: float
    adaptive_ece: float
    classwise_ece: float
    entropy: float
    ece_if_calibrated: float
    bin_count: tuple[int, ...]
    bin_accuracy: tuple[float, ...]
    bin_confidence: tuple[float, ...]
    registered: Mapping[str, float] = field(default_factory=dict)
    """The metrics of plugins, by key."""


class Calibration:
    """Accumulate the predictions of a network over batches of any size.

    ``update`` runs on ``device`` and does not synchronize. On the CPU, the result does not depend
    on the batch sizes, to the last bit.

    A sample whose logits have no softmax (NaN, or +inf) counts as wrong and is in the last bin with
    a confidence of NaN. NLL, Brier score, entropy and calibration errors are then NaN, and the
    accuracies are exact.

    With several ranks, all-reduce ``counts``, ``sums`` and ``class_gaps`` by sum and gather
    ``confidences`` and ``corrects``, or call :meth:`merge`. Do not average the errors of the ranks:
    the ECE of a part of the samples is larger than the ECE of all.

    Args:
        num_classes: number of classes, the columns of the logits.
        device: device of the logits and targets.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")
        self.num_classes = num_classes
        # (3, BINS): samples, correct, label among the first five; by confidence
        self.counts = torch.zeros(3, BINS, dtype=torch.int64, device=device)
        # (4, BINS): sums of confidence, NLL, Brier, entropy; by confidence
        self.sums = torch.zeros(4, BINS, dtype=torch.float64, device=device)
        # (C, BINS): sums of onehot(y) - p; by p
        self.class_gaps = torch.zeros(num_classes, BINS, dtype=torch.float64, device=device)
        self.confidences: list[Tensor] = []  # of batches, (B,) float64
        self.corrects: list[Tensor] = []  # of batches, (B,) bool
        self._edges = bin_edges(BINS, device)  # (BINS - 1,)
        self._rows = torch.arange(4, device=device).unsqueeze(-1)  # (4, 1)
        self._classes = torch.arange(num_classes, device=device)  # (C,)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            logits: (B, C), any floating-point type.
            target: (B,), integer labels.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape or device. On the CPU, a
                label outside [0, C) also raises. On a GPU, this check would synchronize. There,
                such a sample counts as wrong and has an NLL of NaN.
        """
        self._check(logits, target)
        x, target = logits.double(), target.long()  # (B, C), (B,)
        p = x.softmax(-1)  # (B, C)
        confidence = p.amax(-1)  # (B,)
        bins = torch.bucketize(confidence, self._edges)  # (B,)

        known = (target >= 0) & (target < self.num_classes)  # (B,)
        label = target.clamp(0, self.num_classes - 1).unsqueeze(-1)  # (B, 1)
        x_label = x.gather(-1, label)  # (B, 1)
        ahead = (x > x_label) | ((x == x_label) & (self._classes < label))  # (B, C)
        valid = known & (confidence > 0)  # (B,); False for NaN and unknown labels
        rank = ahead.sum(-1).where(valid, self.num_classes + _TOP)  # (B,)
        correct = rank < 1
        counted = torch.stack((torch.ones_like(rank), correct, rank < _TOP))  # (3, B)
        self._add(self.counts, self._rows[:3], bins, counted)

        nll = -x.log_softmax(-1).gather(-1, label).squeeze(-1).where(known, torch.nan)  # (B,)
        gap = (self._classes == target.unsqueeze(-1)).double() - p  # (B, C)
        entropy = torch.special.entr(p).sum(-1)  # (B,)
        summed = torch.stack((confidence, nll, gap.square().sum(-1), entropy))  # (4, B)
        self._add(self.sums, self._rows, bins, summed)
        self._add(self.class_gaps, self._classes, torch.bucketize(p, self._edges), gap)

        self.confidences.append(confidence)
        self.corrects.append(correct)

    @staticmethod
    def _add(total: Tensor, rows: Tensor, bins: Tensor, values: Tensor) -> None:
        """Add values to ``total`` (R, BINS) at rows and bins. The three arguments broadcast."""
        _add_at(total.view(-1), (BINS * rows + bins).flatten(), values.flatten())

    def merge(self, other: "Calibration") -> None:
        """Add the samples of another calibration, such as another shard of the data set."""
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"cannot merge a calibration of {other.num_classes} classes "
                f"into one of {self.num_classes}"
            )
        device = self.counts.device
        self.counts += other.counts.to(device)
        self.sums += other.sums.to(device)
        self.class_gaps += other.class_gaps.to(device)
        self.confidences += [confidence.to(device) for confidence in other.confidences]
        self.corrects += [correct.to(device) for correct in other.corrects]

    def samples(self) -> tuple[Tensor, Tensor]:
        """Return confidence (N,) float64 and correctness (N,) bool of all samples."""
        if not self.confidences:
            return self.sums.new_empty(0), self.counts.new_empty(0, dtype=torch.bool)
        return torch.cat(self.confidences), torch.cat(self.corrects)

    def compute(self, draws: int = 1000, seed: int = 0) -> CalibrationResult:
        """Return the metrics of all samples. This call synchronizes with the device.

        Args:
            draws: simulated data sets for :func:`expected_ece`.
            seed: seed for :func:`expected_ece`.

        Raises:
            ValueError: there are no samples.
        """
        counts, sums = self.counts.cpu(), self.sums.cpu()
        size, correct, top5 = counts  # each (BINS,)
        confidence, nll, brier, entropy = sums  # each (BINS,)
        count = int(size.sum())
        if count == 0:
            raise ValueError("there are no samples to measure: call update() first")
        confidences, corrects = self.samples()
        gap = (correct - confidence).abs()  # (BINS,)
        occupied = size.clamp(min=1)
        return CalibrationResult(
            count=count,
            top1=correct.sum().item() / count,
            top5=top5.sum().item() / count,
            nll=nll.sum().item() / count,
            brier=brier.sum().item() / count,
            ece=gap.sum().item() / count,
            mce=(gap / occupied).max().item(),
            adaptive_ece=_adaptive_ece(confidences, corrects),
            classwise_ece=self.class_gaps.abs().sum().item() / (count * self.num_classes),
            entropy=entropy.sum().item() / count,
            ece_if_calibrated=expected_ece(confidences, draws=draws, seed=seed),
            bin_count=tuple(size.tolist()),
            bin_accuracy=tuple((correct / occupied.double()).tolist()),
            bin_confidence=tuple((confidence / occupied).tolist()),
        )

    def _check(self, logits: Tensor, target: Tensor) -> None:
        for name, value in (("logits", logits), ("target", target)):
            _check_tensor(name, value)
        if not logits.is_floating_point():
            raise TypeError(
                f"logits must be floating-point, got {logits.dtype}: labels go into target"
            )
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits must have shape (B, {self.num_classes}), got {tuple(logits.shape)}"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
            raise TypeError(
                f"target must hold integer labels, got {target.dtype}: convert with .long()"
            )
        if target.shape != logits.shape[:1]:
            raise ValueError(
                f"target must have shape ({logits.shape[0]},), got {tuple(target.shape)}"
            )
        device = self.counts.device
        for name, tensor in (("logits", logits), ("target", target)):
            if tensor.device != device:
                raise ValueError(
                    f"{name} must be on the calibration's device {device}, got {tensor.device}: "
                    f"move it with {name}.to({str(device)!r})"
                )
        if device.type == "cpu":
            labels = target.long()  # comparing int8 with 1000 would overflow
            bad = ((labels < 0) | (labels >= self.num_classes)).nonzero()
            if len(bad):
                row = int(bad[0])
                raise ValueError(
                    f"target[{row}] is {int(target[row])}: "
                    f"a label must be in [0, {self.num_classes}), for {self.num_classes} classes"
                )


def expected_ece(confidences: Tensor, bins: int = BINS, draws: int = 1000, seed: int = 0) -> float:
    """Return the expected ECE of a perfectly calibrated network with these confidences.

    In each simulated data set, sample ``i`` is correct with probability ``confidences[i]``. The
    expected ECE is larger for fewer samples, so compare an ECE with it.

    Args:
        confidences: (N,), fractions; N >= 1.
        bins: number of equal bins of confidence.
        draws: number of simulated data sets.
        seed: seed of the simulation, which runs on the CPU and does not depend on the device.
    """
    confidence = _check_confidences(confidences, draws)  # (N,)
    count = len(confidence)
    member = torch.nn.functional.one_hot(
        torch.bucketize(confidence, bin_edges(bins)), bins
    ).double()  # (N, bins)
    expected = confidence @ member  # (bins,)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for rows in _chunks(draws, count):
        chance = torch.rand(rows, count, dtype=torch.float64, generator=generator)
        correct = (chance < confidence).double()  # (rows, N)
        total += (correct @ member - expected).abs().sum().item()
    return total / (count * draws)


class Interval(NamedTuple):
    low: float
    high: float


class Intervals(NamedTuple):
    """Bootstrap intervals of ECE and top-1, as fractions."""

    ece: Interval
    top1: Interval


def bootstrap(
    confidences: Tensor, corrects: Tensor, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Intervals:
    """Return bootstrap intervals of ECE and top-1, from samples drawn with replacement.

    Resampling increases the ECE, so that the percentile interval can lie entirely above the true
    value. The interval of the ECE is therefore the pivotal one, ``2 ECE - quantile``, clamped at 0.
    The interval of top-1, which has no such bias, is the percentile interval.

    Args:
        confidences: (N,), fractions; N >= 1.
        corrects: (N,) bool, or 0 and 1.
        draws: number of resampled data sets.
        seed: seed of the resampling, which runs on the CPU and does not depend on the device.
        level: coverage of the intervals, in (0, 1).
    """
    confidence = _check_confidences(confidences, draws)  # (N,)
    _check_tensor("corrects", corrects)
    correct = corrects.detach().to("cpu", torch.float64)  # (N,)
    if correct.shape != confidence.shape:
        raise ValueError(
            f"corrects must have the confidences' shape {tuple(confidence.shape)}, "
            f"got {tuple(correct.shape)}"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    count = len(confidence)
    bins = torch.bucketize(confidence, bin_edges(BINS))  # (N,)
    gap = correct - confidence  # (N,)

    def ece(of_bins: Tensor, of_gaps: Tensor) -> Tensor:  # (rows, N), (rows, N) -> (rows,)
        totals = torch.zeros(len(of_gaps), BINS, dtype=torch.float64)
        return totals.scatter_add_(1, of_bins, of_gaps).abs().sum(1) / count

    generator = torch.Generator().manual_seed(seed)
    eces, top1s = [], []
    for rows in _chunks(draws, count):
        pick = torch.randint(count, (rows, count), generator=generator)
        eces.append(ece(bins[pick], gap[pick]))
        top1s.append(correct[pick].mean(1))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    observed = ece(bins[None], gap[None])  # (1,)
    pivotal = (2 * observed - torch.cat(eces).quantile(tails.flip(0))).clamp(min=0)  # (2,)
    return Intervals(
        ece=Interval(*pivotal.tolist()),
        top1=Interval(*torch.cat(top1s).quantile(tails).tolist()),
    )


def bin_edges(bins: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the inner edges ``k / bins`` of equal bins, (bins - 1,) float64. Bins of
    ``torch.bucketize`` are closed on the right."""
    inner = [k / bins for k in range(1, bins)]
    return torch.tensor(inner, dtype=torch.float64, device=device)


def _adaptive_ece(confidences: Tensor, corrects: Tensor) -> float:  # (N,), (N,)
    confidence, order = confidences.sort()
    correct = corrects[order].double()
    count = len(confidence)
    # Equal confidences share the bin of the first. NaN is ranked after the end, in the last bin.
    rank = torch.searchsorted(confidence, confidence)  # (N,)
    bins = (rank * BINS // count).clamp(max=BINS - 1)  # (N,)
    totals = confidence.new_zeros(2, BINS)
    _add_at(totals[0], bins, correct)
    _add_at(totals[1], bins, confidence)
    return (totals[0] - totals[1]).abs().sum().item() / count


def _add_at(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values (N,) to ``total`` at ``index`` (N,), with the same rounding every time."""
    if total.is_cuda:
        # index_add_ is atomic there and adds in any order; this sorts by index first.
        total.index_put_((index,), values.to(total.dtype), accumulate=True)
    else:
        # The values are added one by one, so that the sums do not depend on the batch sizes. A
        # matrix product or the sum of a batch would round differently.
        total.index_add_(0, index, values.to(total.dtype))


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        array = hasattr(value, "__array__") or isinstance(value, list | tuple)
        remedy = f": convert with torch.as_tensor({name})" if array else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{remedy}")


def _check_confidences(confidences: Tensor, draws: int) -> Tensor:
    _check_tensor("confidences", confidences)
    if confidences.ndim != 1 or len(confidences) == 0:
        raise ValueError(
            f"confidences must have shape (N,) with N >= 1, got {tuple(confidences.shape)}"
        )
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    confidence = confidences.detach().to("cpu", torch.float64)
    bad = confidence[(confidence < 0) | (confidence > 1)]  # NaN is allowed
    if len(bad):
        raise ValueError(f"confidences must be fractions in [0, 1], got {bad[0].item():g}")
    return confidence


def _chunks(draws: int, count: int) -> list[int]:
    """Split draws of ``count`` numbers into chunks of about 2^22 numbers (32 MB)."""
    rows = min(draws, max(1, 2**22 // count))
    return [min(rows, draws - start) for start in range(0, draws, rows)]
