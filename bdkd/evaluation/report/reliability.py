"""Reliability diagrams as inline SVG, from the confidences and correctness of single images."""

from dataclasses import dataclass

import numpy as np

from bdkd.evaluation.calibration import BINS
from bdkd.evaluation.figures import wilson

from .charts import Scale, percent, svg
from .markup import Html, tag


@dataclass(frozen=True)
class Bins:
    """15 equal bins of confidence, (lo, hi]; accuracy and confidence are means, 0 where empty."""

    count: np.ndarray  # (15,) int64
    accuracy: np.ndarray  # (15,)
    confidence: np.ndarray  # (15,)

    @property
    def ece(self) -> float:
        """Of all these images together."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.count * gaps).sum() / max(1, self.count.sum()))


def bin_images(confidence: np.ndarray, correct: np.ndarray) -> Bins:
    """Bins of images ``(N,)``; an image whose confidence is NaN has no place among them."""
    known = np.isfinite(confidence)
    confidence, correct = confidence[known], correct[known]
    edges = np.array([k / BINS for k in range(1, BINS)])
    where = np.searchsorted(edges, confidence, side="left")  # closed on the right
    count = np.bincount(where, minlength=BINS)
    some = np.maximum(count, 1)
    return Bins(
        count,
        np.bincount(where, weights=correct, minlength=BINS) / some,
        np.bincount(where, weights=confidence, minlength=BINS) / some,
    )


def draw(title: str, bins: Bins) -> Html:
    """Accuracy over confidence with the gap hatched, 95% intervals, and the images in each bin."""
    width, height, left, top, side = 300.0, 338.0, 40.0, 8.0, 250.0
    x = Scale(0.0, 1.0, left, left + side)
    y = Scale(0.0, 1.0, top + side, top)
    base = height - 34
    counts = Scale(0.0, float(max(1, bins.count.max())), base, top + side + 14)
    parts = []
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts += [
            tag("line", x1=x(0), x2=x(1), y1=y(value), y2=y(value), class_="grid"),
            tag("text", f"{value:.0%}", x=left - 5, y=y(value) + 3.5, class_="tick end"),
            tag("text", f"{value:.0%}", x=x(value), y=base + 14, class_="tick middle"),
        ]
    for k, count in enumerate(bins.count.tolist()):
        if not count:
            continue
        accuracy, confidence = float(bins.accuracy[k]), float(bins.confidence[k])
        low, high = min(accuracy, confidence), max(accuracy, confidence)
        start, wide = x(k / BINS) + 0.6, side / BINS - 1.2
        kind = "over" if confidence > accuracy else "under"
        gap = abs(confidence - accuracy)
        told = (f"confidence {k / BINS:.0%} to {(k + 1) / BINS:.0%}: {count} images, accuracy "
                f"{percent(accuracy)}, {kind}confident by {percent(gap)}")  # fmt: skip
        middle = start + wide / 2
        interval = wilson(accuracy, count)
        parts.append(
            tag(
                "g",
                tag("title", told),
                tag("rect", x=start, width=wide, y=y(low), height=y(0) - y(low), class_="bar"),
                tag("rect", x=start, width=wide, y=y(high), height=y(low) - y(high), class_=kind),
                tag("line", x1=middle, x2=middle, y1=y(interval[0]), y2=y(interval[1]),
                    class_="interval"),
                tag("rect", x=start, width=wide, y=counts(count), height=base - counts(count),
                    class_="count"),
            )
        )  # fmt: skip
    parts += [
        tag("line", x1=x(0), y1=y(0), x2=x(1), y2=y(1), class_="reference"),
        tag("line", x1=x(0), y1=y(0), x2=x(1), y2=y(0), class_="axis"),
        tag("line", x1=x(0), y1=base, x2=x(1), y2=base, class_="axis"),
        tag("text", "confidence", x=x(0.5), y=height - 4, class_="label middle"),
        tag("text", "images", x=left - 5, y=base - 12, class_="tick end"),
    ]
    told = (f"Reliability diagram of {int(bins.count.sum())} images: the mean gap between accuracy "
            f"and confidence is {percent(bins.ece)}.")  # fmt: skip
    return svg(width, height, title, told, *parts)


# Hatches that every diagram of a page shares.
PATTERNS = tag(
    "svg",
    tag(
        "defs",
        tag("pattern", tag("rect", width=6, height=6, class_="over-ground"),
            tag("line", x1=0, y1=0, x2=0, y2=6, class_="over-line"), id="over", width=6, height=6,
            patternUnits="userSpaceOnUse", patternTransform="rotate(45)"),
        tag("pattern", tag("rect", width=5, height=5, class_="under-ground"),
            tag("circle", cx=2.5, cy=2.5, r=1.1, class_="under-dot"), id="under", width=5, height=5,
            patternUnits="userSpaceOnUse"),
    ),
    width=0, height=0, aria_hidden="true", class_="patterns",
)  # fmt: skip


def key() -> Html:
    """What the parts of a diagram mean."""

    def box(kind: str) -> Html:
        return tag("svg", tag("rect", x=1, y=1, width=18, height=10, class_=kind),
                   viewBox="0 0 20 12", width=20, height=12, aria_hidden="true")  # fmt: skip

    def stroke(kind: str) -> Html:
        return tag("svg", tag("line", x1=1, x2=19, y1=6, y2=6, class_=kind),
                   viewBox="0 0 20 12", width=20, height=12, aria_hidden="true")  # fmt: skip

    return tag(
        "ul",
        tag("li", box("bar"), "accuracy"),
        tag("li", box("over"), "overconfident by"),
        tag("li", box("under"), "underconfident by"),
        tag("li", stroke("interval"), "95% interval"),
        tag("li", stroke("reference"), "calibrated"),
        class_="legend",
    )
