"""Draw reliability diagrams as inline SVG from the confidence and correctness of each image."""

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from bdkd.evaluation.calibration import BINS, bin_edges
from bdkd.evaluation.figures import wilson

from .charts import Scale, percent, stroke, svg, write
from .markup import tag


@dataclass(frozen=True)
class Bins:
    """15 equal bins of confidence, closed on the right. The means of an empty bin are 0."""

    count: np.ndarray  # (15,) int64
    accuracy: np.ndarray  # (15,)
    confidence: np.ndarray  # (15,)

    @property
    def ece(self) -> float:
        """The ECE of all images."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.count * gaps).sum() / max(1, self.count.sum()))


def bin_images(confidence: np.ndarray, correct: np.ndarray) -> Bins:
    """Bin images by their confidence (N,). Images with a confidence of NaN are left out."""
    known = np.isfinite(confidence)
    confidence, correct = confidence[known], correct[known]
    edges = bin_edges(BINS).numpy()
    where = np.searchsorted(edges, confidence, side="left")  # bins are closed on the right
    count = np.bincount(where, minlength=BINS)
    accuracy, mean_confidence = (
        np.bincount(where, weights=values, minlength=BINS) / np.maximum(count, 1)
        for values in (correct, confidence)
    )
    return Bins(count, accuracy, mean_confidence)


def draw(title: str, bins: Bins) -> Markup:
    """Draw accuracy over confidence, with the gap hatched and 95% intervals, and below it the
    number of images in each bin."""
    width, height, left, top, side = 300.0, 338.0, 40.0, 8.0, 250.0
    x, y = Scale(0.0, 1.0, left, left + side), Scale(0.0, 1.0, top + side, top)
    base = height - 34
    counts = Scale(0.0, float(max(1, bins.count.max())), base, top + side + 14)
    parts = []
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts += [
            stroke(x(0), y(value), x(1), y(value), "grid"),
            write(f"{value:.0%}", left - 5, y(value) + 3.5, "tick end"),
            write(f"{value:.0%}", x(value), base + 14, "tick middle"),
        ]
    for k in np.flatnonzero(bins.count).tolist():
        count, accuracy, confidence = (
            a[k].item() for a in (bins.count, bins.accuracy, bins.confidence)
        )
        low, high = sorted((accuracy, confidence))
        start, wide = x(k / BINS) + 0.6, side / BINS - 1.2
        kind = "over" if confidence > accuracy else "under"
        description = (
            f"confidence {k / BINS:.0%} to {(k + 1) / BINS:.0%}: {count} images, accuracy "
            f"{percent(accuracy)}, {kind}confident by {percent(high - low)}"
        )
        rects = [
            tag("rect", x=start, width=wide, y=upper, height=lower - upper, class_=class_)
            for lower, upper, class_ in (
                (y(0), y(low), "bar"), (y(low), y(high), kind), (base, counts(count), "count"),
            )
        ]  # fmt: skip
        ends = (y(end) for end in wilson(accuracy, count))
        middle = start + wide / 2
        interval = stroke(middle, next(ends), middle, next(ends), "interval")
        parts.append(tag("g", tag("title", description), *rects[:2], interval, rects[2]))
    parts += [
        stroke(x(0), y(0), x(1), y(1), "reference"),
        stroke(x(0), y(0), x(1), y(0), "axis"),
        stroke(x(0), base, x(1), base, "axis"),
        write("confidence", x(0.5), height - 4, "label middle"),
        write("images", left - 5, base - 12, "tick end"),
    ]
    description = (
        f"Reliability diagram of {int(bins.count.sum())} images: the mean gap between accuracy and "
        f"confidence is {percent(bins.ece)}."
    )
    return svg(width, height, title, description, *parts)
