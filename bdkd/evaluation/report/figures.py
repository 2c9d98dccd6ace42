"""Make the figures of a report. A figure without data is left out."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from bdkd.evaluation.calibration import BINS

from ..metric_lines import as_number
from . import charts, reliability
from .charts import Format, Line, number, percent
from .embedding import embed
from .groups import Group, Points, average, network_points
from .markup import tag
from .runs import Run

MAX_CARDS = 12  # maximum number of cards of one kind

Row = Sequence[object]


class Card(NamedTuple):
    """A chart with its title, note, legend and a table of its numbers."""

    title: str
    chart: Markup
    note: str | None = None
    legend: Markup | None = None
    head: Row = ()
    rows: Sequence[Row] = ()


class Curves(NamedTuple):
    """Make line charts over epochs, or over steps if the length of an epoch is unknown."""

    groups: Sequence[Group]
    epochs: bool

    def of_groups(
        self, points: Callable[[Run, str, bool], Points], metric: str, title: str, fmt: Format,
        note: str,
    ) -> list[Card]:  # fmt: skip
        """Draw one chart with the mean of every group. ``points`` returns the curve of a run."""
        averages = (
            average(g.label, [points(run, metric, self.epochs) for run in g.runs], style)
            for style, g in enumerate(self.groups)
        )
        lines = [line for line in averages if len(line.x)]
        return self._card(title, lines, fmt, note, _legend(lines), "method")

    def of_networks(self, metric: str, title: str, fmt: Format) -> list[Card]:
        """Draw one chart for each group, with training and validation of its networks."""
        cards = []
        for group in self.groups[:MAX_CARDS]:
            lines, entries = [], []
            first = group.runs[0]
            # Students come first, so that they have the same colour in all charts.
            names = sorted(group.networks, key=lambda n: (first.role(n) != "student", "_ema" in n))
            for style, name in enumerate(names):
                found = [
                    average(
                        name,
                        [network_points(r, name, split, metric, self.epochs) for r in group.runs],
                        style, thin=split == "train",
                    )
                    for split in ("train", "val")
                ]  # fmt: skip
                found = [line for line in found if len(line.x)]
                lines += found
                entries += [(name, style)] if found else []
            legend = charts.legend(entries, training=True)
            cards += self._card(f"{title}: {group.label}", lines, fmt, None, legend, "network")
        return cards

    def _card(
        self, title: str, lines: Sequence[Line], fmt: Format, note: str | None, legend: Markup,
        column: str,
    ) -> list[Card]:  # fmt: skip
        chart = charts.line_chart(title, lines, "epoch" if self.epochs else "step", fmt)
        if chart is None:
            return []
        rows = []
        for line in lines:
            known = line.y[np.isfinite(line.y)]
            if len(known):
                label = line.label + (" (training)" if line.thin else "")
                values = (known[0], known.min(), known.max(), known[-1])
                rows.append([label, *(fmt(float(v)) for v in values)])
        head = [column, "first", "least", "greatest", "last"]
        return [Card(title, chart, note, legend, head, rows)]


def _legend(lines: Sequence[Line]) -> Markup:
    return charts.legend([(line.label, line.style) for line in lines])


def _panels(groups: Sequence[Group], limit: int | None = None) -> list[tuple[Group, str]]:
    """Return up to ``limit`` networks of each role for each group. If these are more than
    ``MAX_CARDS``, return one student for each group."""
    roles = ("student", "teacher")
    panels = [(g, n) for g in groups for role in roles for n in g.networks_with_role(role)[:limit]]
    if len(panels) <= MAX_CARDS:
        return panels
    return [
        (g, names[0]) for g in groups if (names := g.networks_with_role("student") or g.networks)
    ]


def reliability_diagrams(groups: Sequence[Group]) -> list[Card]:
    """Draw one diagram for each network of each group, with the test images of all seeds."""
    cards = []
    for group, name in _panels(groups):
        found = [p for run in group.runs if (p := run.predictions) and name in p.networks]
        if not found:
            continue
        bins = reliability.bin_images(
            np.concatenate([p.networks[name].confidence for p in found]),
            np.concatenate([p.correct(name) for p in found]),
        )
        if not bins.count.sum():
            continue
        eces, expected = group.results(name, "ece"), group.mean(name, "ece_if_calibrated")
        note = f"ECE {spread(eces, percent) if len(eces) else percent(bins.ece)}"
        if math.isfinite(expected):
            note += f", if calibrated {percent(expected)}"
        rows = [
            [f"{k / BINS:.0%}–{(k + 1) / BINS:.0%}", f"{bins.count[k]:,}",
             percent(float(bins.accuracy[k])), percent(float(bins.confidence[k]))]
            for k in np.flatnonzero(bins.count).tolist()
        ]  # fmt: skip
        title = f"{group.label}: {name}"
        chart = reliability.draw(f"Reliability of {title}", bins)
        head = ["confidence", "images", "accuracy", "mean confidence"]
        cards.append(Card(title, chart, note, None, head, rows))
    return cards


def entropy_gap(groups: Sequence[Group]) -> list[Card]:
    """Draw the distribution of the teacher's entropy minus the student's over the test images."""
    gaps = []
    for style, group in enumerate(groups):
        names = [group.networks_with_role(role)[:1] for role in ("teacher", "student")]
        found = [
            p.networks[teacher].entropy - p.networks[student].entropy
            for run in group.runs
            if (p := run.predictions)
            for teacher, student in zip(*names, strict=False)
            if {teacher, student} <= set(p.networks)
        ]
        values = np.concatenate(found) if found else np.empty(0)
        values = values[np.isfinite(values)]
        if len(values):
            gaps.append((style, group.label, values))
    if not gaps:
        return []
    limit = max(float(np.quantile(np.abs(values), 0.99)) for _, _, values in gaps) or 1e-3
    edges = np.linspace(-limit, limit, 32)
    lines, rows = [], []
    for style, label, values in gaps:
        counted, _ = np.histogram(np.clip(values, -limit, limit), edges)
        lines.append(Line(label, edges, counted / len(values), style))
        rows.append([label, number(float(values.mean())), percent(float((values > 0).mean())),
                     f"{len(values):,}"])  # fmt: skip
    title = "Entropy gap on the test images"
    chart = charts.histogram(title, lines, "H teacher − H student (nats)", marker=0.0)
    note = (
        "To the right of the line, the student is more certain than its teacher and BD-KD gives "
        "the forward KL the larger weight. The outermost bars include all values beyond them."
    )
    head = ["method", "mean gap (nats)", "student more certain", "images"]
    return [Card(title, chart, note, _legend(lines), head, rows)] if chart else []


def capacity_gap(groups: Sequence[Group]) -> list[Card]:
    """Draw the students' test accuracy over their teachers' parameters for each method."""
    curves: dict[tuple[str, str], list[tuple[float, np.ndarray, str]]] = {}
    for group in groups:
        run = next((run for run in group.runs if run.summary), None)
        if run is None:
            continue
        teachers, students = (run.networks_with_role(role) for role in ("teacher", "student"))
        if not (teachers and students):
            continue
        size = sum(run.result(name, "parameters") for name in teachers)
        top1 = group.results(students[0], "top1")
        if len(top1) and math.isfinite(size) and size > 0:
            models = " + ".join(run.model(name) for name in teachers)
            curves.setdefault((run.model(students[0]), run.method), []).append((size, top1, models))
    if len({size for points in curves.values() for size, _, _ in points}) < 2:
        return []
    lines, rows = [], []
    for style, ((student, method), points) in enumerate(curves.items()):
        points.sort(key=lambda point: point[0])
        sizes, tops, names = zip(*points, strict=True)
        mean, low, high = (np.array([f(top1) for top1 in tops]) for f in (np.mean, np.min, np.max))
        label = f"{student}, {method}"
        lines.append(Line(label, np.array(sizes), mean, style, False, low, high, names))
        rows += [[label, tag("bdi", n), f"{s:,.0f}", spread(t, percent)] for s, t, n in points]
    title = "Capacity gap: student accuracy over teacher size"
    chart = charts.line_chart(
        title, lines, "parameters of the teacher", percent, marks=True, log_x=True
    )
    note = (
        "Test top-1 of the student. If a curve falls, a larger teacher trains a less accurate "
        "student."
    )
    head = ["student", "teacher", "teacher's parameters", "student's top-1"]
    return [Card(title, chart, note, _legend(lines), head, rows)] if chart else []


def feature_maps(groups: Sequence[Group]) -> list[Card]:
    """Draw t-SNE maps of the features of one student and one teacher of the first run of each group
    that has predictions.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    cards = []
    for group, name in _panels(groups, 1)[:MAX_CARDS]:
        run = next((run for run in group.runs if run.predictions), None)
        if run is None or run.predictions is None or name not in run.predictions.networks:
            continue
        features = run.predictions.networks[name].features
        points = None if features is None else embed(features)
        if points is not None:
            labels = run.predictions.target[run.predictions.featured]
            title = f"{group.label}: {name}"
            chart = charts.scatter(f"t-SNE of {title}", points, labels, run.predictions.classes)
            cards.append(Card(title, chart, f"{len(points)} test images of {run.name}"))
    return cards


def step_times(groups: Sequence[Group]) -> list[Card]:
    """Draw the time of each phase of a training step, from the ``profile.json`` of each run.

    ``phases`` lists phases of the device and ``host`` phases of the training thread, each with
    ``name`` and ``milliseconds``.
    """
    return [card for g in groups for run in g.runs for card in _step_times(run)][:MAX_CARDS]


def _step_times(run: Run) -> Iterator[Card]:
    for key, where in (("phases", str(run.profile.get("device", "device"))), ("host", "host")):
        phases = run.profile.get(key)
        if not isinstance(phases, list) or (key == "host" and phases == run.profile.get("phases")):
            continue
        phases = [phase for phase in phases if isinstance(phase, dict)]
        rows = [(str(p.get("name", "?")), as_number(p.get("milliseconds"))) for p in phases]
        rows = [(name, value) for name, value in rows if 0 <= value < math.inf]
        if not rows:
            continue
        total = sum(value for _, value in rows) or 1.0
        steps = as_number(run.profile.get("steps"))
        note = f"Mean over {steps:.0f} recorded steps. A step takes {total:.3g} ms."
        title = f"Time of a training step: {run.name}, {where}"
        table = [[name, f"{value:.3g} ms", percent(value / total)] for name, value in rows]
        yield Card(
            title, charts.bar_list(title, rows, lambda value: f"{value:.3g} ms"),
            note if math.isfinite(steps) else None, None, ["phase", "time", "share"], table,
        )  # fmt: skip


def spread(values: np.ndarray, fmt: Format) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    if not len(values):
        return "–"
    mean = fmt(float(values.mean()))
    if len(values) == 1:
        return mean
    return f"{mean.removesuffix('%')} ± {fmt(float(values.std(ddof=1)))}"
