"""The figures of the paper, from finished or running runs; each is a card of the page, or None
where the runs hold nothing to draw it from."""

import math
from collections.abc import Sequence

import numpy as np

from . import charts, reliability
from .charts import Format, Line, number, percent
from .embedding import embed
from .groups import Group, gap_line
from .markup import Html, table, tag
from .runs import as_number

MANY = 12  # diagrams of one kind: beyond that students alone are drawn


def card(
    title: str, chart: Html | None, *under: object, note: str | None = None, small: bool = False
) -> Html | None:
    """A figure with its heading, what is read from it, its legend and its numbers."""
    if chart is None:
        return None
    return tag(
        "figure",
        tag("h3", title),
        tag("p", note, class_="note") if note else None,
        chart,
        *under,
        class_="card small" if small else "card",
    )


def numbers(lines: Sequence[Line], form: Format, first: str = "series") -> Html:
    """Where each line begins and ends, and between which values it runs."""
    rows: list[list[object]] = []
    for line in lines:
        known = line.y[np.isfinite(line.y)]
        if len(known):
            told = (known[0], known.min(), known.max(), known[-1])
            what = line.label + (" (training)" if line.thin else "")
            rows.append([tag("bdi", what), *(form(float(v)) for v in told)])
    head: list[object] = [first, "first", "least", "greatest", "last"]
    return tag("details", tag("summary", "Numbers"), table(head, rows))


def x_label(epochs: bool) -> str:
    return "epoch" if epochs else "step"


def over_time(
    groups: Sequence[Group], epochs: bool, metric: str, title: str, form: Format, note: str
) -> Html | None:
    """A validation metric of every group's students."""
    lines = [
        group.mean_line(group.label, "student", "val", metric, epochs, k)
        for k, group in enumerate(groups)
    ]
    return _overlay(title, lines, epochs, form, note)


def step_metric(
    groups: Sequence[Group], epochs: bool, metric: str, title: str, form: Format, note: str
) -> Html | None:
    """A number of the whole training step, of every group that has it."""
    lines = [
        group.line(group.label, "", "train", metric, epochs, k) for k, group in enumerate(groups)
    ]
    for line in lines:
        line.thin = False
    return _overlay(title, lines, epochs, form, note)


def accuracy_gap(groups: Sequence[Group], epochs: bool) -> Html | None:
    lines = [gap_line(group, group.label, "top1", epochs, k) for k, group in enumerate(groups)]
    return _overlay(
        "Accuracy gap between teacher and student", lines, epochs, percent,
        "Teachers' validation top-1 less the students'. Below zero the student leads.",
    )  # fmt: skip


def _overlay(
    title: str, lines: Sequence[Line], epochs: bool, form: Format, note: str
) -> Html | None:
    drawn = [line for line in lines if len(line.x)]
    return card(
        title,
        charts.line_chart(title, drawn, x_label(epochs), form),
        charts.legend([(line.label, line.style) for line in drawn]),
        numbers(drawn, form, "method"),
        note=note,
    )


def networks_over_time(
    group: Group, epochs: bool, metric: str, title: str, form: Format
) -> Html | None:
    """One group's networks: training thin, validation thick."""
    lines, named = [], []
    for name, style in network_styles(group).items():
        found = [group.line(name, name, split, metric, epochs, style) for split in ("train", "val")]
        found = [line for line in found if len(line.x)]
        lines += found
        if found:
            named.append((name, style))
    full = f"{title}: {group.label}"
    return card(
        full,
        charts.line_chart(full, lines, x_label(epochs), form),
        charts.legend(named, training=True),
        numbers(lines, form, "network"),
    )


def network_styles(group: Group) -> dict[str, int]:
    """Students first, so that they are blue wherever they are drawn."""
    run = group.runs[0]
    names = sorted(group.networks, key=lambda name: (run.role(name) != "student", "_ema" in name))
    return {name: k for k, name in enumerate(names)}


def reliability_diagrams(groups: Sequence[Group]) -> list[Html]:
    """One for each group and network, of the test images of all its seeds together."""
    wanted = _panels(groups)
    cards = []
    for group, name in wanted:
        found = [r.predictions for r in group.runs if r.predictions is not None]
        found = [p for p in found if name in p.networks]
        if not found:
            continue
        bins = reliability.bin_images(
            np.concatenate([p.networks[name].confidence for p in found]),
            np.concatenate([p.correct(name) for p in found]),
        )
        if not bins.count.sum():
            continue
        eces, chances = group.results(name, "ece"), group.results(name, "ece_if_calibrated")
        said = f"ECE {spread(eces, percent)}" if len(eces) else f"ECE {percent(bins.ece)}"
        if len(chances):
            said += f", if calibrated {percent(float(chances.mean()))}"
        rows: list[list[object]] = [
            [f"{k / 15:.0%}–{(k + 1) / 15:.0%}", f"{bins.count[k]:,}",
             percent(float(bins.accuracy[k])), percent(float(bins.confidence[k]))]
            for k in range(15) if bins.count[k]
        ]  # fmt: skip
        title = f"{group.label}: {name}"
        drawn = card(
            title,
            reliability.draw(f"Reliability of {title}", bins),
            tag("details", tag("summary", "Numbers"),
                table(["confidence", "images", "accuracy", "mean confidence"], rows)),
            note=said,
            small=True,
        )  # fmt: skip
        if drawn:
            cards.append(drawn)
    return cards


def _panels(groups: Sequence[Group]) -> list[tuple[Group, str]]:
    """Group by group its students, then its teachers; of many, one student of each group."""
    every = [(g, n) for g in groups for role in ("student", "teacher") for n in g.judged(role)]
    if len(every) <= MANY:
        return every
    return [(g, names[0]) for g in groups if (names := g.judged("student") or g.networks)]


def entropy_gap(groups: Sequence[Group]) -> Html | None:
    """How much less certain the teacher is than the student, image by image, at the end."""
    gaps = []
    for k, group in enumerate(groups):
        teachers, students = group.judged("teacher"), group.judged("student")
        found = [
            run.predictions.networks[teachers[0]].entropy
            - run.predictions.networks[students[0]].entropy
            for run in group.runs
            if teachers and students and run.predictions is not None
            and {teachers[0], students[0]} <= set(run.predictions.networks)
        ]  # fmt: skip
        values = np.concatenate(found) if found else np.empty(0)
        values = values[np.isfinite(values)]
        if len(values):
            gaps.append((k, group, values))
    if not gaps:
        return None
    limit = max(float(np.quantile(np.abs(values), 0.99)) for _, _, values in gaps) or 1e-3
    edges = np.linspace(-limit, limit, 32)
    lines, rows = [], []
    for k, group, values in gaps:
        counted, _ = np.histogram(np.clip(values, -limit, limit), edges)
        lines.append(Line(group.label, edges, counted / len(values), k))
        rows.append([tag("bdi", group.label), number(float(values.mean())),
                     percent(float((values > 0).mean())), f"{len(values):,}"])  # fmt: skip
    title = "Entropy gap on the test images"
    head: list[object] = ["method", "mean gap (nats)", "student more certain", "images"]
    return card(
        title,
        charts.histogram(title, lines, "H teacher − H student (nats)", marker=0.0),
        charts.legend([(line.label, line.style) for line in lines]),
        tag("details", tag("summary", "Numbers"), table(head, rows)),
        note="Right of the line the student is more certain than its teacher, and BD-KD gives the "
        "forward KL the larger weight. The outermost bars hold what lies beyond.",
    )


def capacity_gap(groups: Sequence[Group]) -> Html | None:
    """Students' test accuracy over their teachers' parameters, method by method."""
    curves: dict[tuple[str, str], list[tuple[float, np.ndarray, str]]] = {}
    for group in groups:
        run = next((run for run in group.runs if run.summary), None)
        if run is None or not (run.judged("teacher") and run.judged("student")):
            continue
        sizes = [run.result(name, "parameters") for name in run.judged("teacher")]
        student = run.judged("student")[0]
        top1 = group.results(student, "top1")
        if len(top1) and math.isfinite(sum(sizes)) and sum(sizes) > 0:
            teachers = " + ".join(run.model(name) for name in run.judged("teacher"))
            key = (run.model(student), run.method)
            curves.setdefault(key, []).append((sum(sizes), top1, teachers))
    if len({size for points in curves.values() for size, _, _ in points}) < 2:
        return None
    lines, rows = [], []
    for k, ((student, method), points) in enumerate(curves.items()):
        points.sort(key=lambda point: point[0])
        x = np.array([size for size, _, _ in points])
        y = np.array([top1.mean() for _, top1, _ in points])
        low, high = (np.array([f(top1) for _, top1, _ in points]) for f in (np.min, np.max))
        label = f"{student}, {method}"
        lines.append(Line(label, x, y, k, False, low, high, [name for _, _, name in points]))
        rows += [[tag("bdi", label), tag("bdi", name), f"{size:,.0f}", spread(top1, percent)]
                 for size, top1, name in points]  # fmt: skip
    title = "Capacity gap: student accuracy over teacher size"
    head: list[object] = ["student", "teacher", "teacher's parameters", "student's top-1"]
    return card(
        title,
        charts.line_chart(title, lines, "parameters of the teacher", percent, marks=True,
                          log_x=True),
        charts.legend([(line.label, line.style) for line in lines]),
        tag("details", tag("summary", "Numbers"), table(head, rows)),
        note="Test top-1 of the student. A curve that falls to the right is a teacher that has "
        "outgrown its student.",
    )  # fmt: skip


def feature_maps(groups: Sequence[Group]) -> list[Html]:
    """t-SNE of the penultimate features of the first run of each group, of one student and one
    teacher.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    cards = []
    wanted = [
        (group, names[0])
        for group in groups
        for role in ("student", "teacher")
        if (names := group.judged(role))
    ]
    if len(wanted) > MANY:
        wanted = [(group, name) for group, name in wanted if name in group.judged("student")]
    for group, name in wanted[:MANY]:
        run = next((r for r in group.runs if r.predictions is not None), None)
        if run is None or run.predictions is None or name not in run.predictions.networks:
            continue
        features = run.predictions.networks[name].features
        points = None if features is None else embed(features)
        if points is None:
            continue
        labels = run.predictions.target[run.predictions.featured]
        title = f"{group.label}: {name}"
        drawn = card(
            title,
            charts.scatter(f"t-SNE of {title}", points, labels, run.predictions.classes),
            note=f"{len(points)} test images of {run.name}",
            small=True,
        )
        if drawn:
            cards.append(drawn)
    return cards


def step_times(groups: Sequence[Group]) -> list[Html]:
    """Where the time of a step went, of runs with a ``profile.json``: its ``phases`` are of the
    device, its ``host`` of the thread that trains; rows have ``name`` and ``milliseconds``."""
    cards = []
    for run in (run for group in groups for run in group.runs):
        device = str(run.profile.get("device", "device"))
        parts = [(device, run.profile.get("phases"))]
        if run.profile.get("host") != run.profile.get("phases"):
            parts.append(("host", run.profile.get("host")))
        for where, phases in parts:
            if rows := _phases(phases):
                steps = as_number(run.profile.get("steps"))
                cards.append(_times(f"{run.name}, {where}", rows, steps))
    return [drawn for drawn in cards[:MANY] if drawn is not None]


def _phases(given: object) -> list[tuple[str, float]]:
    rows = [
        (str(phase.get("name", "?")), as_number(phase.get("milliseconds")))
        for phase in (given if isinstance(given, list) else [])
        if isinstance(phase, dict)
    ]
    return [(name, value) for name, value in rows if math.isfinite(value) and value >= 0]


def _times(what: str, rows: Sequence[tuple[str, float]], steps: float) -> Html | None:
    total = sum(value for _, value in rows) or 1.0
    shares: list[list[object]] = [
        [tag("bdi", name), f"{value:.3g} ms", percent(value / total)] for name, value in rows
    ]
    title = f"Where a step's time went: {what}"
    return card(
        title,
        charts.bar_list(title, rows, lambda value: f"{value:.3g} ms"),
        tag("details", tag("summary", "Numbers"), table(["phase", "a step", "share"], shares)),
        note=f"Mean of {steps:.0f} recorded steps of {total:.3g} ms."
        if math.isfinite(steps)
        else None,
    )


def spread(values: np.ndarray, form: Format) -> str:
    """Mean, and the standard deviation where there are several."""
    if not len(values):
        return "–"
    mean = form(float(values.mean()))
    if len(values) == 1:
        return mean
    return f"{mean.removesuffix('%')} ± {form(float(values.std(ddof=1)))}"
