"""Draw stored results: time, bandwidth and memory over classes, and one suite over commits.

Pictures use ``matplotlib.figure.Figure`` without pyplot. The colours are those of Okabe and Ito,
which colour-blind readers can distinguish. Every line also has a different marker.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import ResultsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#222222", "#666666", "#E4E4E4"
# (name of the contender, name in the picture, colour, marker)
LINES = (
    ("bdkd_loss, backward", "bdkd_loss", "#0072B2", "o"),
    ("torch.compile default", "torch.compile", "#E69F00", "s"),
    ("torch.compile max-autotune-no-cudagraphs", "torch.compile, max-autotune", "#D55E00", "D"),
    ("eager", "eager PyTorch", "#CC79A7", "^"),
)
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
COPY: dict[str, Any] = {"color": INK, "linestyle": (0, (5, 3)), "linewidth": 1.3}


def draw_all(by_suite: Mapping[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every picture for which there are results, as PNGs in ``folder``. Return their paths."""
    drawn = []
    for suite in ("loss_cpu", "loss_gpu"):
        if suite in by_suite and _sweep(by_suite[suite]):
            path = folder / f"{suite}.png"
            draw_sweep(by_suite[suite], path)
            drawn.append(path)
    if not drawn:
        raise ResultsError("these results have no sweep over classes: run loss_cpu or loss_gpu")
    return drawn


def _sweep(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cases of the sweep, sorted by number of classes."""
    found = [case for case in result["cases"] if case["parameters"].get("sweep")]
    return sorted(found, key=lambda case: case["parameters"]["classes"])


def draw_sweep(result: dict[str, Any], path: Path) -> None:
    """Draw time, bandwidth and extra memory over the number of classes, at a fixed number of class
    pairs.

    Lines are medians, and bands reach from the 20th to the 80th percentile. The dashed line is a
    copy of both logits that was measured in the same rounds.
    """
    from matplotlib.figure import Figure

    cases = _sweep(result)
    classes = [case["parameters"]["classes"] for case in cases]
    pairs = [case["parameters"]["rows"] * case["parameters"]["classes"] for case in cases]
    figure = Figure(figsize=(11.4, 4.5), facecolor="white")
    axes = [figure.add_axes((left, 0.23, 0.265, 0.53)) for left in (0.055, 0.38, 0.705)]
    panels: list[tuple[str, str, Callable[[dict, str], float | None]]] = [
        ("time for a million class pairs, ms", "time", lambda row, key: row["seconds"][key]),
        ("GB/s of the least traffic of the loss", "bandwidth",
         lambda row, key: row["bytes"] / row["seconds"][key] / 1e9),
        ("extra memory, in sizes of both logits", "memory",
         lambda row, key: row["peak_bytes"] / (row["bytes"] / 2)),
    ]  # fmt: skip
    for panel, (label, kind, value) in zip(axes, panels, strict=True):
        panel.set_title(label, fontsize=10.5, color=INK, loc="left")
        for name, shown, colour, marker in LINES:
            rows = [_row(case, name) for case in cases]
            if not all(rows):
                continue
            scale = [1e9 / n if kind == "time" else 1.0 for n in pairs]  # to ms per million pairs

            def at(key: str, rows=rows, scale=scale, value=value) -> list[float]:
                values = [value(row, key) for row in rows if row]
                return [s * v for s, v in zip(scale, values, strict=True) if v is not None]

            panel.plot(classes, at("median"), color=colour, marker=marker, markersize=5,
                       linewidth=1.8, label=shown)  # fmt: skip
            if kind != "memory":
                panel.fill_between(classes, at("p20"), at("p80"), color=colour, alpha=0.18,
                                   linewidth=0)  # fmt: skip
        copies = [_row(case, "copy of both logits") for case in cases]
        if kind != "memory" and all(copies):
            line = [value(row, "median") or 0.0 for row in copies if row]
            if kind == "time":
                line = [1e9 / n * v for n, v in zip(pairs, line, strict=True)]
            panel.plot(classes, line, label="copy of both logits: the limit", **COPY)
        panel.set_xscale("log")
        if kind == "memory":
            panel.set_ylim(bottom=0)
        else:
            panel.set_yscale("log")
        panel.set_xlabel("classes", fontsize=10, color=INK)
        quiet(panel)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.05, 0.93), ncols=5,
                  fontsize=9.5, frameon=False, labelcolor=INK)  # fmt: skip
    first = cases[0]["parameters"]
    title = (
        f"Both losses and both gradients of BD-KD: {first['dtype']}, temperature "
        f"{first['temperature']:g}, {pairs[0] / 1e6:.1f} million class pairs"
    )
    figure.text(0.06, 0.95, title, fontsize=12.5, fontweight="bold", color=INK)
    figure.text(0.06, 0.025, _caption(result, cases), fontsize=8.5, color=MUTED)
    save(figure, path)


def _caption(result: dict[str, Any], cases: Sequence[dict[str, Any]]) -> str:
    machine = result["machine"]
    where = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    trials = min(row["trials"] for case in cases for row in case["rows"] if "trials" in row)
    share = result["others_share"]
    busy = f"; other processes used {share:.0%} of the CPUs" if share and share > 0.05 else ""
    cold = (cases[0].get("caches") or {}).get("cold")
    inputs = f"; {cold}" if cold else ""
    threads = "" if machine["gpu"] else f", torch threads: {machine['threads']}"
    return (
        f"{where}{threads}; torch {machine['versions']['torch']}{inputs}; medians of {trials} or "
        "more rounds,\nbands from the 20th to the 80th percentile; commit "
        f"{result['commit']['id']}, {result['date'][:10]}{busy}"
    )


def draw_history(runs: Sequence[Mapping[str, dict[str, Any]]], path: Path) -> None:
    """Draw the times of our loss over commits, each divided by the time of the copy in the same
    run. This ratio depends little on the speed of the machine. Each suite has a panel, and each
    case a line.

    Raises:
        ResultsError: no two runs have a case in common.
    """
    from matplotlib.figure import Figure

    series: dict[str, dict[str, list[tuple[str, str, float]]]] = {}
    for run in runs:
        for suite, result in run.items():
            for case in result["cases"]:
                ours, copied = _row(case, case["base"]), _row(case, "copy of both logits")
                if ours and copied:
                    copies = ours["seconds"]["median"] / copied["seconds"]["median"]
                    when = (result["commit"]["date"] or result["date"], result["commit"]["id"])
                    lines = series.setdefault(suite, {})
                    lines.setdefault(case["case"], []).append((*when, copies))
    series = {
        suite: {name: points for name, points in lines.items() if len(points) > 1}
        for suite, lines in series.items()
    }
    series = {suite: lines for suite, lines in series.items() if lines}
    if not series:
        raise ResultsError("no two of these results have a case of the loss in common")
    figure = Figure(figsize=(10, 4.6 * len(series)), facecolor="white", layout="constrained")
    grid = figure.subplots(len(series), 1, squeeze=False).flatten()
    for axes, (suite, lines) in zip(grid, series.items(), strict=True):
        dates = {commit: date for points in lines.values() for date, commit, _ in points}
        commits = sorted(dates, key=lambda commit: dates[commit])
        place = {commit: i for i, commit in enumerate(commits)}
        for i, (name, points) in enumerate(sorted(lines.items())):
            points.sort()
            colour, marker = PALETTE[i % len(PALETTE)], "os^Dvp"[i % len(PALETTE)]
            style = ("-", "--", ":", "-.")[i // len(PALETTE) % 4]
            axes.plot([place[commit] for _, commit, _ in points], [y for *_, y in points],
                      color=colour, marker=marker, linestyle=style, label=name)  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(f"{suite}: our time / time of the copy", fontsize=11, loc="left")
        axes.set_xticks(range(len(commits)), commits, rotation=20, ha="right")
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        quiet(axes)
    save(figure, path)


def _row(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the row of a contender if it was measured, else None."""
    for row in case["rows"]:
        if row["name"] == name and "seconds" in row:
            return row
    return None


def quiet(axes: "Axes") -> None:
    """Style axes with a faint grid and no box."""
    axes.set_axisbelow(True)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(labelsize=9, colors=MUTED, which="both")
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            axis.set_major_formatter(
                lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:g}"
            )
            axis.set_minor_formatter("")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, in full or not at all. The same data give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
