"""Draw the figure of a comparison: a dot for every seed and a line for the mean of every method."""

import math
from collections.abc import Sequence
from pathlib import Path

from bdkd.evaluation.comparison import Row, compared_metrics
from bdkd.evaluation.figures import INK, MUTED, NETWORK_COLOURS, mute_axes, save_figure


def comparison_figure(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw a grid with a row for each network and a column for each metric, and write a PNG file
    atomically. Each panel has a column of dots for each method, in the order of the seeds.

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
    width = max(2.4, 0.55 * len(methods) + 1.0)
    figure = Figure(
        figsize=(width * len(metrics), 0.8 + 2.9 * len(networks)), facecolor="white",
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06),
    )  # fmt: skip
    grid = figure.subplots(len(networks), len(metrics), squeeze=False)
    for axes_row, network in zip(grid, networks, strict=True):
        by_method = {row.method: row for row in rows if row.network == network}
        role = next(iter(by_method.values())).role
        head = network if network == role else f"{network} ({role})"
        for axes, metric in zip(axes_row, metrics, strict=True):
            factor = 100 if metric.percent else 1
            for x, method in enumerate(methods):
                cell = by_method[method].cells[metric.key] if method in by_method else None
                if cell is None or not cell.values:
                    continue
                values = [factor * value for value in cell.values.values()]
                offsets = [0.36 * ((k + 0.5) / len(values) - 0.5) for k in range(len(values))]
                axes.plot(
                    [x + offset for offset in offsets], values, linestyle="", marker="o",
                    markersize=4, color=NETWORK_COLOURS[x % len(NETWORK_COLOURS)], alpha=0.75,
                    markeredgewidth=0,
                )  # fmt: skip
                mean = math.fsum(values) / len(values)
                axes.plot([x - 0.32, x + 0.32], [mean] * 2, color=INK, linewidth=1.6)
            axes.set_title(f"{head}: {metric.label}", fontsize=10, color=INK, loc="left")
            mute_axes(axes)
            axes.set_xlim(-0.6, len(methods) - 0.4)
            axes.set_xticks(
                range(len(methods)), methods, rotation=40, ha="right", rotation_mode="anchor"
            )
            axes.grid(visible=False, axis="x")
    seeds = max(len(row.seeds) for row in rows)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
    figure.supxlabel(
        f"a dot is one seed of up to {seeds}, a line the mean", fontsize=9, color=MUTED
    )
    save_figure(figure, path)
