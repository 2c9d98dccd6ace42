"""Accuracy and calibration of a classifier, streamed on its device and exact.

Definitions, for ``N`` samples with probabilities ``p`` (softmax at temperature 1, in float64
whatever the logits' type), labels ``y`` and confidence ``c = max p``:

- top-1, top-5: the share of samples with fewer than 1 (5) classes ahead of the label; among equal
  logits the lower class is ahead, as in ``argmax``.
- NLL: mean of ``-log p_y``, nats. Brier: mean of ``sum over classes of (p - onehot(y))^2``.
  Entropy: mean of ``-sum p log p``, nats.
- ECE: ``sum over bins of (n_b / N) |accuracy_b - confidence_b|`` over 15 bins ``(k/15, (k+1)/15]``
  of confidence (Guo et al. 2017, arXiv 1706.04599). MCE: the largest of those gaps.
- adaptive ECE: the same over 15 bins of equally many samples; equal confidences share a bin.
- class-wise ECE: mean over classes of the ECE of that class's probability, its label rate in place
  of accuracy (Kull et al. 2019, arXiv 1910.12656). A probability of exactly 0 is in the first bin.

Float32 bin edges differ from ``k/15`` at several edges, low-precision softmax saturates at 1.0 and
low-precision counters stall: hence edges and sums in float64, counts in int64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15
_TOP = 5


@dataclass(frozen=True)
class CalibrationResult:
    """Metrics of one network on one data set, as defined at the head of this module.

    Accuracies and calibration errors are fractions, ``nll`` and ``entropy`` nats. The tuples have a
    value for each of the 15 bins, 0 where a bin is empty. ``ece_if_calibrated`` is the ECE that a
    perfectly calibrated network with these confidences would show on as many samples
    (:func:`expected_ece`): an ECE near it is no evidence of miscalibration.
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


class Calibration:
    """Gathers a network's predictions batch by batch; batches may differ in size.

    ``update`` runs on ``device`` and never waits for it; on the CPU the result does not depend, to
    the last bit, on how the samples were cut into batches.

    A sample whose logits have no softmax (NaN, or +inf) is counted, as wrong, and lands in the last
    bin with a confidence of NaN: NLL, Brier, entropy and calibration errors are then NaN, the
    accuracies stay exact.

    For several ranks: all-reduce ``counts``, ``sums`` and ``class_gaps`` (sum) and gather
    ``confidences`` and ``corrects``, or :meth:`merge`. Averages of the ranks' errors would be
    wrong: the ECE of a part is larger than that of the whole.
    """

    counts: Tensor  # (3, BINS) int64: samples, correct, label among the first five; by confidence
    sums: Tensor  # (4, BINS) float64: confidence, NLL, Brier, entropy; by confidence
    class_gaps: Tensor  # (num_classes, BINS) float64: sum of onehot(y) - p; by p
    confidences: list[Tensor]  # a batch's confidences (B,) float64
    corrects: list[Tensor]  # a batch's correctness (B,) bool

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")
        self.num_classes = num_classes
        self.counts = torch.zeros(3, BINS, dtype=torch.int64, device=device)
        self.sums = torch.zeros(4, BINS, dtype=torch.float64, device=device)
        self.class_gaps = torch.zeros(num_classes, BINS, dtype=torch.float64, device=device)
        self.confidences = []
        self.corrects = []
        self._edges = bin_edges(BINS, device)  # (BINS - 1,)
        self._rows = torch.arange(4, device=device).unsqueeze(-1)  # (4, 1)
        self._classes = torch.arange(num_classes, device=device)  # (C,)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count one batch of logits ``(B, C)``, any floating type, and its labels ``(B,)``.

        Raises:
            TypeError, ValueError: a shape, type or device that does not fit. A label outside
                [0, C) raises on the CPU; on a GPU, where reading it would wait for the device, its
                sample counts as wrong with an NLL of NaN.
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
        sound = known & (confidence > 0)  # (B,); false for NaN alone
        rank = ahead.sum(-1).where(sound, self.num_classes + _TOP)  # (B,)
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
        """Add each of ``values`` to ``total (R, BINS)`` at its row and bin; the three broadcast."""
        # One-dimensional index_add_ adds one value after the other on the CPU, so that the sums do
        # not depend on the batches; a matrix product or a batch's sum would round by batch.
        total.view(-1).index_add_(0, (BINS * rows + bins).flatten(), values.flatten())

    def merge(self, other: "Calibration") -> None:
        """Count the samples of ``other`` too: the shards of a data set make the whole."""
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
        """Confidence (N,) float64 and correctness (N,) bool of every sample so far."""
        if not self.confidences:
            return self.sums.new_empty(0), self.counts.new_empty(0, dtype=torch.bool)
        return torch.cat(self.confidences), torch.cat(self.corrects)

    def compute(self, draws: int = 1000, seed: int = 0) -> CalibrationResult:
        """The metrics of all samples so far; waits for the device.

        ``draws`` and ``seed`` are those of :func:`expected_ece`.

        Raises:
            ValueError: no sample was counted.
        """
        counts, sums = self.counts.cpu(), self.sums.cpu()
        size, correct, top5 = counts  # each (BINS,)
        confidence, nll, brier, entropy = sums  # each (BINS,)
        count = int(size.sum())
        if count == 0:
            raise ValueError("no metrics of no samples: update() was given none")
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
                f"logits must be floating, got {logits.dtype}: labels go into target, after them"
            )
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits must have shape (B, {self.num_classes}), one column a class, "
                f"got {tuple(logits.shape)}"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
            raise TypeError(
                f"target must hold integer labels, got {target.dtype}: convert with .long()"
            )
        if target.shape != logits.shape[:1]:
            raise ValueError(
                f"target must have shape ({logits.shape[0]},), one label a sample, "
                f"got {tuple(target.shape)}"
            )
        for name, tensor in (("logits", logits), ("target", target)):
            if tensor.device != self.counts.device:
                raise ValueError(
                    f"{name} must be on the calibration's device {self.counts.device}, "
                    f"got {tensor.device}: move it with {name}.to({str(self.counts.device)!r})"
                )
        if target.device.type == "cpu":
            labels = target.long()  # comparing int8 with 1000 would wrap
            bad = ((labels < 0) | (labels >= self.num_classes)).nonzero()
            if len(bad):
                row = int(bad[0])
                raise ValueError(
                    f"target[{row}] is {int(target[row])}: "
                    f"a label must be in [0, {self.num_classes}), for {self.num_classes} classes"
                )


def expected_ece(confidences: Tensor, bins: int = BINS, draws: int = 1000, seed: int = 0) -> float:
    """The mean ECE that a perfectly calibrated network with these confidences would show.

    Each draw takes sample ``i`` as correct with probability ``confidences[i]``; what ECE remains is
    chance. It grows as samples get fewer, so an ECE says little without it.

    Args:
        confidences: (N,), fractions; N >= 1.
        bins: equal bins of confidence.
        draws: simulated data sets; the mean over them is returned.
        seed: of the simulation, which runs on the CPU and is the same for every device.
    """
    confidence = _on_host(confidences, draws)  # (N,)
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
    """Bootstrap intervals of ECE and top-1, fractions."""

    ece: Interval
    top1: Interval


def bootstrap(
    confidences: Tensor, corrects: Tensor, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Intervals:
    """Intervals of ECE and top-1 over data sets drawn anew from these samples, with replacement.

    Resampling adds chance to the chance already there, so the ECE of a resample is biased upward
    and the plain percentile interval may lie wholly above the truth. The ECE's interval is the
    pivotal one, ``2 ECE - quantile``, which reverses that bias, cut at 0; top-1 has no such bias
    and takes the percentiles.

    Args:
        confidences: (N,), fractions; N >= 1.
        corrects: (N,) bool, or 0 and 1.
        draws: resampled data sets.
        seed: of the resampling, which runs on the CPU and is the same for every device.
        level: the share of the distribution that the intervals span, in (0, 1).
    """
    confidence = _on_host(confidences, draws)  # (N,)
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
    """Return the edges between ``bins`` equal bins, each ``k / bins`` rounded once, (bins - 1,)
    float64. ``torch.bucketize`` closes every bin on its right."""
    inner = [k / bins for k in range(1, bins)]
    return torch.tensor(inner, dtype=torch.float64, device=device)


def _adaptive_ece(confidences: Tensor, corrects: Tensor) -> float:  # (N,), (N,)
    confidence, order = confidences.sort()
    correct = corrects[order].double()
    count = len(confidence)
    # Equal confidences go where the first of them goes; NaN, ranked past the end, to the last bin.
    rank = torch.searchsorted(confidence, confidence)  # (N,)
    bins = (rank * BINS // count).clamp(max=BINS - 1)  # (N,)
    totals = confidence.new_zeros(2, BINS)
    totals[0].index_add_(0, bins, correct)
    totals[1].index_add_(0, bins, confidence)
    return (totals[0] - totals[1]).abs().sum().item() / count


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        array = hasattr(value, "__array__") or isinstance(value, list | tuple)
        remedy = f": torch.as_tensor({name}) makes one" if array else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{remedy}")


def _on_host(confidences: Tensor, draws: int) -> Tensor:
    _check_tensor("confidences", confidences)
    if confidences.ndim != 1 or len(confidences) == 0:
        raise ValueError(
            f"confidences must have shape (N,) with N >= 1, got {tuple(confidences.shape)}"
        )
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    confidence = confidences.detach().to("cpu", torch.float64)
    if (confidence < 0).any() or (confidence > 1).any():  # not NaN, which is passed on
        bad = confidence[(confidence < 0) | (confidence > 1)][0].item()
        raise ValueError(
            f"confidences must be fractions in [0, 1], the largest softmax, got {bad:g}"
        )
    return confidence


def _chunks(draws: int, count: int) -> list[int]:
    """Rows a chunk so that one chunk of ``count`` columns stays near 2^22 numbers (32 MB)."""
    rows = min(draws, max(1, 2**22 // count))
    return [min(rows, draws - start) for start in range(0, draws, rows)]
