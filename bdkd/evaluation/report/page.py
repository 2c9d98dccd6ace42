"""Render the page of a report: the results, the figures and the list of runs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdkd.metrics import registered_metrics

from . import charts, figures
from .charts import number, percent, three_decimals
from .groups import Group, differing, gap_points, step_points, student_points
from .markup import environment, printable, tag
from .runs import Run

_RESULTS = (
    ("top1", "top-1", percent),
    ("ece", "ECE", percent),
    ("ece_if_calibrated", "ECE if calibrated", percent),
    ("ece_scaled", "ECE after T scaling", percent),
    ("nll", "NLL", three_decimals),
    ("brier", "Brier", three_decimals),
)
_QUANTIZED = (
    ("top1", percent),
    ("ece", percent),
    ("nll", three_decimals),
    ("brier", three_decimals),
)
_NO_SKLEARN = "features are not drawn without scikit-learn: pip install 'bdkd[train]'"


def render(
    groups: Sequence[Group], comparisons: Sequence[tuple[Path, str]], tsne: bool, title: str
) -> tuple[str, list[str]]:
    """Return the HTML of a page, and warnings about missing parts.

    Args:
        groups: runs by configuration.
        comparisons: folders of ``bdkd compare`` with the Markdown text of the comparison.
        tsne: draw t-SNE maps of the features, which takes a few seconds for each network.
        title: the heading of the page.
    """
    runs = [run for group in groups for run in group.runs]
    warnings = [f"{run.path}: {note}" for run in runs for note in run.notes]
    maps: list[figures.Card] = []
    missing = None
    try:
        maps = figures.feature_maps(groups) if tsne else []
    except ImportError:
        missing = _NO_SKLEARN
        warnings.append(missing)
    page = environment.get_template("page.html.j2").render(
        title=title,
        recipes=sorted({str(run.config.get("name") or "") for run in runs} - {""}),
        runs=runs,
        results=_results(groups),
        quantized=_quantized(groups),
        comparisons=[(f.resolve().name, list(_blocks(markdown))) for f, markdown in comparisons],
        groups=groups,
        registered=_registered(),
        curves=figures.Curves(groups, all(run.steps_per_epoch for run in runs if run.series)),
        figures=figures,
        missing=missing,
        maps=maps,
        differing=_differing(groups),
        run_facts=_run_facts,
        swatch=charts.swatch,
        number=number,
        percent=percent,
        gap_points=gap_points,
        step_points=step_points,
        student_points=student_points,
    )
    return page + "\n", warnings


def _registered() -> list[tuple[str, str, Callable[[float], str]]]:
    """Return key, label and format of the metrics of plugins."""
    return [(m.key, m.label, percent if m.percent else number) for m in registered_metrics()]


def _results(groups: Sequence[Group]) -> dict[str, Any]:
    """Return caption, head and rows of the table of test results."""
    shown = [
        (metric, label, fmt)
        for metric, label, fmt in (*_RESULTS, *_registered())
        if any(len(g.results(n, metric)) for g in groups for n in g.networks)
    ]
    rows: list[list[object]] = []
    seeds: list[int] = []
    for style, group in enumerate(groups):
        for name in group.networks:
            run = next((r for r in group.runs if np.isfinite(r.result(name, "top1"))), None)
            if run is None:
                continue
            size = run.result(name, "parameters")
            seeds.append(len(group.results(name, "top1")))
            rows.append([
                charts.swatch(style) + printable(group.label),
                name,
                run.model(name) + ("" if run.role(name) in name else f", {run.role(name)}"),
                f"{size:,.0f}" if np.isfinite(size) else "–",
                *(
                    # The expected ECE hardly differs between seeds, so show no deviation.
                    fmt(group.mean(name, metric)) if metric == "ece_if_calibrated"
                    else figures.spread(group.results(name, metric), fmt)
                    for metric, _, fmt in shown
                ),
                _agreement(group, name),
            ])  # fmt: skip
    labels = [label for _, label, _ in shown]
    head = ["method", "network", "model", "parameters", *labels, "agrees with teacher"]
    caption = "Test images"
    if seeds and max(seeds) > 1:
        same = len(set(seeds)) == 1
        caption += f"; mean ± standard deviation over {f'{seeds[0]} ' if same else ''}seeds"
    if len(set(seeds)) > 1:
        for row, cell in zip([head, *rows], ["seeds", *seeds], strict=True):
            row.insert(4, cell)  # type: ignore[attr-defined]
    return {"caption": caption, "head": head, "rows": rows}


def _quantized(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Return caption, head and rows of the table of int8 students, or None if there are none."""
    rows: list[list[object]] = []
    for style, group in enumerate(groups):
        files = [file for run in group.runs for file in run.quantized]
        for name in dict.fromkeys(file.network for file in files):
            of_network = [file for file in files if file.network == name]
            cells: list[object] = []
            for key, fmt in _QUANTIZED:
                cells += [
                    figures.spread(_finite([file.value(key, when) for file in of_network]), fmt)
                    for when in ("before", "after")
                ]
            agreements = [np.nan if f.agreement is None else f.agreement for f in of_network]
            ratios = [file.bytes[0] / max(1, file.bytes[1]) for file in of_network]
            rows.append([
                charts.swatch(style) + printable(group.label), name, *cells,
                figures.spread(np.array([file.temperature for file in of_network]), number),
                figures.spread(_finite([file.ece_without for file in of_network]), percent),
                figures.spread(_finite(agreements), percent), f"{np.mean(ratios):.1f}",
                len(of_network),
            ])  # fmt: skip
    if not rows:
        return None
    labels = [label for key, label, _ in _RESULTS if key in dict(_QUANTIZED)]
    head: list[object] = ["method", "network"]
    head += [f"{label} {precision}" for label in labels for precision in ("fp32", "int8")]
    head += ["T", "ECE int8 without T", "equal predictions", "times smaller", "files"]
    every = [file for group in groups for run in group.runs for file in run.quantized]
    if all(file.temperature == 1 for file in every):
        for row in (head, *rows):
            del row[-5:-3]
    caption = "Students in fp32 and int8, on the test images"
    return {"caption": caption, "head": head, "rows": rows}


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.array(values, float)
    return array[np.isfinite(array)]


def _agreement(group: Group, name: str) -> str:
    """Return the share of test images for which a student and its first teacher agree."""
    teachers = group.networks_with_role("teacher")
    if not teachers or group.runs[0].role(name) != "student":
        return "–"
    found = [p.networks for run in group.runs if (p := run.predictions)]
    shares = [
        float((networks[name].predicted == networks[teachers[0]].predicted).mean())
        for networks in found
        if {name, teachers[0]} <= set(networks)
    ]
    return figures.spread(np.array(shares), percent)


def _blocks(markdown: str) -> Iterator[tuple[str, Any]]:
    """Yield the tables, headings and paragraphs of a Markdown text, without its pictures."""
    rows: list[list[str]] = []
    for line in [*map(str.strip, markdown.splitlines()), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not all(set(cell) <= set(":- ") for cell in cells):
                rows.append(cells)
            continue
        if rows:
            yield "table", rows
            rows = []
        if line.startswith("#"):
            yield "heading", line.lstrip("# ")
        elif line and not line.startswith("!["):
            yield "paragraph", line.strip("`")


def _differing(groups: Sequence[Group]) -> dict[str, Any] | None:
    rows = [
        [tag("code", key), *("–" if value is None else printable(value)[:120] for value in values)]
        for key, values in differing(groups).items()
    ]
    head = ["key", *(tag("bdi", group.label) for group in groups)]
    return {"head": head, "rows": rows} if rows else None


def _run_facts(run: Run) -> str:
    facts = [
        f"method {run.method}",
        f"seed {printable(run.seed)[:120]}" if run.seed is not None else "",
        f"trained {run.wall_seconds:,.0f} s" if np.isfinite(run.wall_seconds) else "",
        *(str(run.summary[key]) for key in ("device", "torch") if key in run.summary),
    ]
    return ", ".join(filter(None, facts))[:400]
