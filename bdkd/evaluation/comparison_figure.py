"""Draw the figure of a comparison: a dot for every seed and a line for the mean of every method."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdkd.evaluation.comparison import Row, compared_metrics
from bdkd.evaluation.figures import INK, MUTED, NETWORK_COLOURS, mute_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FAR = 4.0
"""A method is drawn at the edge if it is farther away than this many times the range of the others.
Otherwise one bad method would push all others into one line."""


def comparison_figure(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw a grid with a row for each network and a column for each metric, and write a PNG file
    atomically. Each panel has a line of dots for each method, in the order of the seeds.

    Raises:
        ValueError: there are no rows.
        OSError: ``path`` cannot be written. An existing file is not changed.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not rows:
        raise ValueError("a comparison needs the runs of at least one method")
    networks = list(dict.fromkeys(row.network for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    metrics = [metric for metric in compared_metrics() if metric.headline]
    names = 0.075 * max(len(method) for method in methods)  # inches
    figure = Figure(
        figsize=(names + 1.9 * len(metrics), 0.8 + (0.7 + 0.26 * len(methods)) * len(networks)),
        facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.06),
    )  # fmt: skip
    grid = figure.subplots(len(networks), len(metrics), squeeze=False, sharey=True)
    for axes_row, network in zip(grid, networks, strict=True):
        by_method = {row.method: row for row in rows if row.network == network}
        role = next(iter(by_method.values())).role
        head = network if network == role else f"{network} ({role})"
        for axes, metric in zip(axes_row, metrics, strict=True):
            factor = 100 if metric.percent else 1
            values = {
                y: [factor * value for value in by_method[method].cells[metric.key].values.values()]
                for y, method in enumerate(methods)
                if method in by_method
            }
            _draw(axes, {y: seeds for y, seeds in values.items() if seeds})
            axes.set_title(f"{head}: {metric.label}", fontsize=9, color=INK, loc="left")
        axes_row[0].set_yticks(range(len(methods)), methods)
        axes_row[0].set_ylim(len(methods) - 0.4, -0.6)  # the first method is at the top
    seeds = max(len(row.seeds) for row in rows)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
    figure.supxlabel(
        f"a dot is one seed of up to {seeds}, a line the mean", fontsize=9, color=MUTED
    )
    save_figure(figure, path)


def _draw(axes: "Axes", values: dict[int, list[float]]) -> None:
    """Draw the seeds of each method, by its place from the top."""
    mute_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    shown = _shown_range(list(values.values()))
    for y, seeds in values.items():
        mean = math.fsum(seeds) / len(seeds)
        if shown is not None and not shown[0] <= mean <= shown[1]:
            above = mean > shown[1]
            text = (
                f"{mean:.3g} \N{RIGHTWARDS ARROW}" if above else f"\N{LEFTWARDS ARROW} {mean:.3g}"
            )
            axes.text(
                shown[above], y, text, ha="right" if above else "left", va="center", fontsize=8,
                color=INK,
            )  # fmt: skip
            continue
        offsets = [0.44 * ((k + 0.5) / len(seeds) - 0.5) for k in range(len(seeds))]
        axes.plot(
            seeds, [y + offset for offset in offsets], linestyle="", marker="o", markersize=3.5,
            color=NETWORK_COLOURS[y % len(NETWORK_COLOURS)], alpha=0.75, markeredgewidth=0,
        )  # fmt: skip
        axes.plot([mean] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=1.6)
    if shown is not None:
        axes.set_xlim(*shown)


def _shown_range(values: list[list[float]]) -> tuple[float, float] | None:
    """Return the range of the methods that are not far from the others, or None if no method is."""
    finite = [seeds for seeds in values if all(map(math.isfinite, seeds))]
    if len(finite) < 3:
        return None
    middle = statistics.median(math.fsum(seeds) / len(seeds) for seeds in finite)
    near = sorted(finite, key=lambda seeds: abs(math.fsum(seeds) / len(seeds) - middle))
    kept: list[list[float]] = near[: len(near) // 2 + 1]
    for seeds in near[len(kept) :]:
        low, high = min(map(min, kept)), max(map(max, kept))
        distance = max(low - max(seeds), min(seeds) - high)
        if distance > _FAR * (high - low) > 0:
            pad = 0.06 * (high - low)
            return low - pad, high + pad
        kept.append(seeds)
    return None
