"""The page: sections of figures, tables of what the runs came to, and the runs themselves."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from . import charts, figures, reliability
from .charts import number, percent, three_decimals
from .groups import Group, differing
from .markup import Html, join, printable, table, tag
from .runs import Run

# Even markup that slipped through could load and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_TILES = 8


def render(
    groups: Sequence[Group], comparisons: Sequence[tuple[Path, str]], tsne: bool, title: str
) -> tuple[str, list[str]]:
    """The HTML of a page, and what could not be shown on it.

    Args:
        comparisons: Markdown of ``bdkd compare`` and the folder it is of.
        tsne: draw the features, which takes some seconds a network.
    """
    runs = [run for group in groups for run in group.runs]
    epochs = all(run.steps_per_epoch for run in runs if run.series)
    warnings = [f"{run.path}: {note}" for run in runs for note in run.notes]
    sections = [
        ("results", "Results", [*_results(groups), *_comparisons(comparisons)]),
        ("accuracy", "Accuracy", _accuracy(groups, epochs)),
        ("calibration", "Calibration", _calibration(groups, epochs)),
        ("balance", "Entropies and divergences", _balance(groups, epochs)),
        ("features", "Features", _features(groups, warnings) if tsne else []),
        ("time", "Time", _time(groups, epochs)),
        ("runs", "Runs", _runs(groups)),
    ]
    shown = [(key, name, parts) for key, name, parts in sections if parts]
    document = tag(
        "html",
        _head(title),
        tag(
            "body",
            reliability.PATTERNS,
            tag("a", "Skip to the results", href="#results", class_="skip"),
            tag("header", tag("div", _title(title, groups, runs), class_="wide")),
            tag("nav", tag("ul", *(tag("li", tag("a", name, href=f"#{key}"))
                                   for key, name, _ in shown), class_="wide"),
                aria_label="Sections"),
            tag("main", *(tag("section", tag("h2", name, id=f"{key}-name"), *parts, id=key,
                              aria_labelledby=f"{key}-name")
                          for key, name, parts in shown), class_="wide"),
            tag("footer", tag("p", "Made by bdkd report from the folders of the runs. Accuracies "
                                   "and calibration errors in percent, entropies and NLL in nats; "
                                   "ECE over 15 bins. Bands span all seeds."), class_="wide"),
        ),
        lang="en",
    )  # fmt: skip
    return f"<!doctype html>\n{document}\n", warnings


def _head(title: str) -> Html:
    style = (files(__package__) / "style.css").read_text("utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )


def _title(title: str, groups: Sequence[Group], runs: Sequence[Run]) -> Html:
    recipes = sorted({str(run.config.get("name") or "") for run in runs} - {""})
    running = sum(1 for run in runs if not run.summary)
    facts = [
        f"{len(runs)} run{'s' if len(runs) != 1 else ''}",
        f"{len(groups)} configuration{'s' if len(groups) != 1 else ''}",
        *([f"{running} not finished"] if running else []),
        *([", ".join(recipes)[:120]] if recipes else []),
    ]
    tiles = [_tile(group, k) for k, group in enumerate(groups[:_TILES])]
    return join([
        tag("p", "bdkd report", class_="brand"),
        tag("h1", title),
        tag("p", " · ".join(facts), class_="facts"),
        tag("ul", *tiles, class_="tiles"),
    ])  # fmt: skip


def _tile(group: Group, style: int) -> Html:
    """What the student of a configuration came to, in three numbers."""
    student = (group.judged("student") or group.networks or [""])[0]
    top1, ece = group.results(student, "top1"), group.results(student, "ece")
    teachers = group.judged("teacher")
    against = group.results(teachers[0], "top1") if teachers else np.empty(0)
    seeds = len(top1)
    return tag(
        "li",
        tag("p", charts.swatch(style), tag("bdi", group.label), class_="tile-name"),
        tag("p", percent(float(top1.mean())) if seeds else "running", class_="tile-number"),
        tag("p", "top-1 of the student" + (f", {seeds} seeds" if seeds > 1 else "")),
        tag("p", "its ECE ", tag("b", percent(float(ece.mean())) if len(ece) else "–")),
        tag("p", "teacher ", tag("b", percent(float(against.mean()))))
        if len(against) else None,
    )  # fmt: skip


def _results(groups: Sequence[Group]) -> list[Html]:
    metrics = [
        ("top1", "top-1", percent),
        ("ece", "ECE", percent),
        ("ece_if_calibrated", "ECE if calibrated", percent),
        ("ece_scaled", "ECE after T scaling", percent),
        ("nll", "NLL", three_decimals),
        ("brier", "Brier", three_decimals),
    ]
    shown = [
        m for m in metrics
        if any(len(g.results(n, m[0])) for g in groups for n in g.networks)
    ]  # fmt: skip
    rows: list[list[object]] = []
    seeds: list[int] = []
    for k, group in enumerate(groups):
        for name in group.networks:
            run = next((r for r in group.runs if np.isfinite(r.result(name, "top1"))), None)
            if run is None:
                continue
            size = run.result(name, "parameters")
            seeds.append(len(group.results(name, "top1")))
            rows.append([
                join([charts.swatch(k), tag("bdi", group.label)]),
                tag("bdi", name),
                run.model(name) + ("" if run.role(name) in name else f", {run.role(name)}"),
                f"{size:,.0f}" if np.isfinite(size) else "–",
                *(_of_seeds(group.results(name, m), m, form) for m, _, form in shown),
                _agreement(group, name),
            ])  # fmt: skip
    if not rows:
        return [tag("p", "No run is finished yet: what follows is how far they are.")]
    head: list[object] = ["method", "network", "model", "parameters",
                          *(label for _, label, _ in shown), "agrees with teacher"]  # fmt: skip
    caption = "Test images"
    if max(seeds) > 1:
        caption += "; mean ± standard deviation over seeds"
    if len(set(seeds)) > 1:
        head.insert(4, "seeds")
        for row, count in zip(rows, seeds, strict=True):
            row.insert(4, count)
    elif seeds[0] > 1:
        caption = caption.replace("over seeds", f"over {seeds[0]} seeds")
    return [
        table(head, rows, caption, head_rows=2, class_="results"),
        tag("p", "ECE if calibrated: what a perfectly calibrated network with the same confidences "
                 "would show on so few images. ECE after T scaling: with the logits divided by one "
                 "temperature, fitted on the validation part. Agreement: the share of test images "
                 "that student and teacher take for the same class.", class_="note"),
    ]  # fmt: skip


def _of_seeds(values: np.ndarray, metric: str, form: charts.Format) -> str:
    """Mean and deviation; what chance leaves hardly differs between seeds."""
    if metric == "ece_if_calibrated" and len(values):
        return form(float(values.mean()))
    return figures.spread(values, form)


def _agreement(group: Group, name: str) -> str:
    teachers = group.judged("teacher")
    if not teachers or group.runs[0].role(name) != "student":
        return "–"
    shares = [
        float((run.predictions.networks[name].predicted
               == run.predictions.networks[teachers[0]].predicted).mean())
        for run in group.runs
        if run.predictions is not None and {name, teachers[0]} <= set(run.predictions.networks)
    ]  # fmt: skip
    return figures.spread(np.array(shares), percent)


def _comparisons(comparisons: Sequence[tuple[Path, str]]) -> list[Html]:
    return [
        tag("details",
            tag("summary", f"Tables and tests of bdkd compare in {folder.resolve().name}"),
            *_from_markdown(markdown), class_="run")
        for folder, markdown in comparisons
    ]  # fmt: skip


def _from_markdown(markdown: str) -> list[Html]:
    """Headings and tables as such, the rest as text; pictures lie beside the Markdown."""
    parts: list[Html] = []
    rows: list[list[object]] = []
    for line in [*markdown.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("|"):
            cells = [cell.strip() for cell in stripped.strip("|").split("|")]
            if not all(set(cell) <= set(":- ") for cell in cells):
                rows.append(list(cells))
            continue
        if rows:
            parts.append(table(rows[0], rows[1:]))
            rows = []
        if stripped.startswith("#"):
            parts.append(tag("h3", stripped.lstrip("# ")))
        elif stripped and not stripped.startswith("!["):
            parts.append(tag("p", stripped.strip("`"), class_="note"))
    return parts


def _grid(cards: Sequence[Html | None], small: bool = False) -> list[Html]:
    kept = [card for card in cards if card is not None]
    return [tag("div", *kept, class_="grid small" if small else "grid")] if kept else []


def _accuracy(groups: Sequence[Group], epochs: bool) -> list[Html]:
    return _grid([
        figures.over_time(groups, epochs, "top1", "Student accuracy", percent,
                          "Top-1 on the validation part."),
        figures.accuracy_gap(groups, epochs),
        figures.capacity_gap(groups),
        *(figures.networks_over_time(group, epochs, "top1", "Top-1", percent)
          for group in groups[:figures.MANY]),
    ])  # fmt: skip


def _calibration(groups: Sequence[Group], epochs: bool) -> list[Html]:
    diagrams = figures.reliability_diagrams(groups)
    parts = _grid([
        figures.over_time(groups, epochs, "ece", "Student calibration error", percent,
                          "ECE on the validation part; few images leave some by chance."),
        figures.over_time(groups, epochs, "nll", "Student NLL", number,
                          "On the validation part, nats."),
    ])  # fmt: skip
    if diagrams:
        parts += [
            tag("h3", "Reliability"),
            tag("p", "Each bar is the accuracy of the test images with that confidence; the "
                     "hatched part is the gap that the ECE averages. Seeds of a configuration are "
                     "pooled.", class_="note"),
            reliability.key(),
            *_grid(diagrams, small=True),
        ]  # fmt: skip
    return parts


def _balance(groups: Sequence[Group], epochs: bool) -> list[Html]:
    kl = "Mean over the training samples of a log interval, nats."
    return _grid([
        *(figures.networks_over_time(group, epochs, "entropy", "Entropy H (nats)", number)
          for group in groups[:figures.MANY]),
        figures.entropy_gap(groups),
        figures.step_metric(groups, epochs, "forward_weight", "Weight of the forward KL", number,
                            "Mean of d1. Unweighted distillation stays at 1."),
        figures.step_metric(groups, epochs, "reverse_weight", "Weight of the reverse KL", number,
                            "Mean of d2. Unweighted distillation stays at 1."),
        figures.step_metric(groups, epochs, "forward_kl", "Forward KL (teacher ‖ student)", number,
                            kl),
        figures.step_metric(groups, epochs, "reverse_kl", "Reverse KL (student ‖ teacher)", number,
                            kl),
    ])  # fmt: skip


def _features(groups: Sequence[Group], warnings: list[str]) -> list[Html]:
    try:
        maps = figures.feature_maps(groups)
    except ImportError:
        missing = "features are not drawn without scikit-learn: pip install 'bdkd[train]'"
        warnings.append(missing)
        return [tag("p", missing, class_="note")]
    if not maps:
        return []
    return [
        tag("p", "t-SNE of what the last layer sees. Distances between far groups, and the axes, "
                 "mean nothing; what stands apart is told apart. A name stands in the middle of "
                 "its class.", class_="note"),
        *_grid(maps, small=True),
    ]  # fmt: skip


def _time(groups: Sequence[Group], epochs: bool) -> list[Html]:
    return _grid([
        *figures.step_times(groups),
        figures.step_metric(groups, epochs, "images_per_second", "Training speed (images/s)",
                            number, "Evaluation and saving do not count."),
        figures.step_metric(groups, epochs, "data_wait", "Waiting for data (share of the time)",
                            percent, "What a faster loader would save."),
    ])  # fmt: skip


def _runs(groups: Sequence[Group]) -> list[Html]:
    parts: list[Html] = []
    keys = differing(groups)
    if keys:
        rows: list[list[object]] = [
            [tag("code", key), *("–" if v is None else _value(v) for v in of)]
            for key, of in keys.items()
        ]
        head: list[object] = ["key", *(tag("bdi", group.label) for group in groups)]
        parts.append(table(head, rows, "Keys of the recipes that differ"))
    for group in groups:
        for run in group.runs:
            parts.append(_run(group, run))
    return parts


def _run(group: Group, run: Run) -> Html:
    seconds = run.result_of_run("wall_seconds")
    facts = [
        f"method {run.method}",
        *([f"seed {_value(run.seed)}"] if run.seed is not None else []),
        *([f"trained {seconds:,.0f} s"] if seconds == seconds else []),
        *([str(run.summary[k]) for k in ("device", "torch") if k in run.summary]),
    ]
    return tag(
        "details",
        tag("summary", tag("bdi", run.name), tag("span", f" {group.label}", class_="muted")),
        tag("p", ", ".join(facts)[:400]),
        *(tag("p", note, class_="warning") for note in run.notes),
        tag("pre", tag("code", run.config_text), tabindex=0) if run.config_text else None,
        class_="run",
    )


def _value(value: object) -> str:
    return printable(value)[:120]
