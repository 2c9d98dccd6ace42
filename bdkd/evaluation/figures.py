"""Draw the figures of a run: reliability diagrams and training curves.

The figures are ``matplotlib.figure.Figure`` objects without pyplot, so that they need no display
and have no global state. The colours are those of Okabe and Ito, which color-blind readers can
distinguish.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration import BINS, CalibrationResult
from .metric_lines import LineReader, as_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE = (
    "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7",
)  # fmt: skip
INK, MUTED, FAINT = "#222222", "#666666", "#E4E4E4"
NETWORK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY)
_CENTRES = [(k + 0.5) / BINS for k in range(BINS)]
_TOP = 1.02  # upper limit of the accuracy axis, with space for the outline of a bar that ends at 1
_OVER: dict[str, Any] = {"facecolor": "#F7DCC9", "edgecolor": VERMILION, "hatch": "////"}
_UNDER: dict[str, Any] = {"facecolor": "#DDF0FB", "edgecolor": SKY, "hatch": "...."}
_DIAGONAL: dict[str, Any] = {"color": INK, "linewidth": 1.1, "linestyle": (0, (5, 4))}
_POINTS: dict[str, Any] = {"linewidth": 2, "marker": "o", "markersize": 3.5}
# Split -> label and style of its curves
_CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("training", {"linewidth": 1}),
    "val": ("validation", _POINTS | {"linestyle": "-"}),
    "test": ("test images, not used for selection", _POINTS | {"linestyle": "--"}),
}


def reliability_diagram(results: Mapping[str, CalibrationResult], path: Path, title: str) -> None:
    """Draw the reliability of each network side by side and write a PNG file atomically.

    The upper panels show the accuracy of each bin with its 95% Wilson interval, and the gap between
    accuracy and mean confidence, which the ECE averages. The dashed diagonal is perfect
    calibration. The lower panels show the number of samples in each bin. "Chance" is the expected
    ECE of a perfectly calibrated network on the same number of samples.

    Raises:
        ValueError: there are no results.
        OSError: ``path`` cannot be written. An existing file is not changed.
    """
    from matplotlib.figure import Figure

    if not results:
        raise ValueError("a reliability diagram needs the results of at least one network")
    width, height = 0.75 + 4.0 * len(results), 6.4  # inches, like all lengths below
    figure = Figure(figsize=(width, height), facecolor="white")

    def add_axes(left: float, bottom: float, wide: float, high: float) -> "Axes":
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    most = max(count for result in results.values() for count in result.bin_count)
    for column, (name, result) in enumerate(results.items()):
        left = 0.75 + 4.0 * column
        upper, lower = add_axes(left, 1.95, 3.55, 3.55 * _TOP), add_axes(left, 0.95, 3.55, 0.8)
        _draw_reliability(upper, result)
        _draw_counts(lower, result, most)
        above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        upper.annotate(name, (0, 1), (0, 22), fontsize=12, fontweight="bold", color=INK, **above)
        headline = (
            f"top-1 {result.top1:.1%}    NLL {result.nll:.3f}    "
            f"ECE {result.ece:.1%} (chance: {result.ece_if_calibrated:.1%})"
        )
        upper.annotate(headline, (0, 1), (0, 6), fontsize=9.5, color=MUTED, **above)
        lower.set_xlabel("confidence", fontsize=10.5, color=INK)
        for axes, label in ((upper, "accuracy"), (lower, "samples")):
            if column == 0:
                axes.set_ylabel(label, fontsize=10.5, color=INK)
            else:
                axes.tick_params(labelleft=False)
    figure.text(
        0.75 / width, 1 - 0.1 / height, title,
        fontsize=13, fontweight="bold", color=INK, va="top",
    )  # fmt: skip
    _add_legend(figure)
    save_figure(figure, path)


def _draw_reliability(axes: "Axes", result: CalibrationResult) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.6, foreground="white")]  # visible on white and on blue
    for k, count in enumerate(result.bin_count):
        if count == 0:
            continue
        accuracy, confidence = result.bin_accuracy[k], result.bin_confidence[k]
        # A bin that contains NaN has no mean confidence and therefore no gap.
        shared = accuracy if math.isnan(confidence) else min(accuracy, confidence)
        bar: dict[str, Any] = {"x": _CENTRES[k], "width": 1 / BINS, "linewidth": 0.8}
        axes.bar(height=shared, color=BLUE, edgecolor="white", **bar)
        if not math.isnan(confidence):
            style = _OVER if confidence > accuracy else _UNDER
            axes.bar(height=abs(confidence - accuracy), bottom=shared, **style, **bar)
        axes.plot(
            [_CENTRES[k]] * 2, wilson(accuracy, count),
            color=INK, linewidth=1.1, solid_capstyle="butt", path_effects=halo,
        )  # fmt: skip
    axes.plot([0, 1], [0, 1], path_effects=halo, **_DIAGONAL)
    ticks = [k / 5 for k in range(6)]
    axes.set(xlim=(0, 1), ylim=(0, _TOP), xticks=ticks, yticks=ticks)
    mute_axes(axes)
    axes.tick_params(labelbottom=False)


def _draw_counts(axes: "Axes", result: CalibrationResult, most: int) -> None:
    axes.bar(
        _CENTRES, result.bin_count, 1 / BINS, color="#9AA5AE", edgecolor="white", linewidth=0.8
    )
    for centre, count in zip(_CENTRES, result.bin_count, strict=True):
        if count:
            axes.annotate(
                _short(count), (centre, count), (0, 1.5), textcoords="offset points",
                ha="center", va="bottom", fontsize=7, color=MUTED,
            )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1.25 * most), xticks=[k / 5 for k in range(6)])
    axes.locator_params(axis="y", nbins=3, integer=True)
    mute_axes(axes)


def _add_legend(figure: "Figure") -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Patch(color=BLUE, label="accuracy"),
            Patch(label="overconfident by", **_OVER),
            Patch(label="underconfident by", **_UNDER),
            Line2D([], [], color=INK, linewidth=1.1, label="95% interval"),
            Line2D([], [], label="calibrated", **_DIAGONAL),
        ],
        loc="lower center", ncols=5 if figure.get_figwidth() > 6 else 3, fontsize=9.5,
        frameon=False, handlelength=1.8, columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip


def training_curves(metrics: Path, path: Path) -> None:
    """Draw the curves of a run's ``metrics.jsonl`` and write a PNG file atomically.

    The panels show loss, top-1 and entropy of every network, and the mean weight of the forward KL.
    A panel without data is left out. Thin lines are training intervals, thick lines with dots are
    validations, and dashed lines are evaluations on the test images (``watch_test``). An incomplete
    last line of the file is ignored.

    Raises:
        ValueError: the file contains no metrics.
        OSError: a file cannot be read or written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    series = _read_series(metrics)
    networks = list(dict.fromkeys(network for network, _, _ in series if network))
    labels = {
        "loss": "training loss", "top1": "top-1", "entropy": "entropy (nats)",
        "forward_weight": "mean weight of the forward KL",
    }  # fmt: skip
    panels = [metric for metric in labels if any(key[2] == metric for key in series)]
    if not panels:
        raise ValueError(f"{metrics} contains no metrics to draw")
    rows = math.ceil(len(panels) / 2)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(9.2, 0.6 + 2.9 * rows), layout=layout, facecolor="white")
    grid = figure.subplots(rows, min(2, len(panels)), squeeze=False, sharex=True).flatten()
    colours = {name: NETWORK_COLOURS[i % len(NETWORK_COLOURS)] for i, name in enumerate(networks)}
    for axes, metric in zip(grid, panels, strict=False):
        axes.set_title(labels[metric], fontsize=10.5, color=INK, loc="left")
        for (network, split, name), points in series.items():
            if name == metric:
                _, style = _CURVES.get(split, _CURVES["test"])
                axes.plot(
                    *zip(*points, strict=True), color=colours.get(network, INK),
                    alpha=0.55 if split == "train" else None, **style,
                )  # fmt: skip
        if metric == "top1":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.tick_params(labelbottom=True)
        mute_axes(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=10.5, color=INK)
    _add_curves_legend(figure, colours, {split for _, split, _ in series})
    save_figure(figure, path)


Series = dict[tuple[str, str, str], list[tuple[int, float]]]  # (network, split, metric) -> points


def _read_series(metrics: Path) -> Series:
    """Return all numbers of the file. Numbers of the whole training step have the network ``""``.
    null becomes NaN."""
    series: Series = defaultdict(list)
    reader = LineReader()
    lines = metrics.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            values = reader.parse(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{metrics}, line {number}, is not JSON: {error}") from error
        if values is None or values.get("split") is None:
            continue
        for key, value in values.items():
            network, named = (key, value) if isinstance(value, dict) else ("", {key: value})
            for name, y in named.items():
                if y is None or isinstance(y, int | float):
                    point = values["step"], as_number(y)
                    series[network, values["split"], name].append(point)
    return series


def _add_curves_legend(figure: "Figure", colours: Mapping[str, str], splits: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linewidth=3, label=name) for name, c in colours.items()]
    for split, (label, style) in _CURVES.items():
        if split in splits:
            handles.append(Line2D([], [], color=MUTED, label=label, **style))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9.5,
                  frameon=False)  # fmt: skip


def mute_axes(axes: "Axes") -> None:
    """Draw a faint grid and no box."""
    axes.set_axisbelow(True)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(labelsize=9, colors=MUTED)


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a rate that was observed in ``count`` trials."""
    z = 1.959964
    scale = 1 + z * z / count
    centre = (rate + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def _short(count: int) -> str:
    if count < 1000:
        return str(count)
    return f"{count / 1000:.1f}k" if count < 9_950 else f"{count / 1000:.0f}k"


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG file atomically. Equal data give equal bytes."""
    options: dict[str, Any] = {"format": "png", "dpi": 200, "metadata": {"Software": None}}
    replace_file(path, lambda temporary: figure.savefig(temporary, **options))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it, so that ``path`` is never incomplete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
