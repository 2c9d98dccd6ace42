"""Methods side by side over seeds: means, spreads, paired tests against the first, as tables."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdkd.evaluation.paired import PairedTest, holm, paired_test
from bdkd.evaluation.temperature import HIGHEST, LOWEST
from bdkd.metrics import METRICS as ALL_METRICS
from bdkd.metrics import Metric

METRICS = [metric for metric in ALL_METRICS if metric.compared]


@dataclass(frozen=True)
class Run:
    """One finished run: its method as the user wrote it, its seed, its ``summary.json``, and the
    networks that the method did not train: no test says anything of those."""

    method: str
    seed: int
    summary: Mapping[str, Any]
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Cell:
    """One metric of one network under one method."""

    values: Mapping[int, float]  # by seed; seeds without a value (no T, a NaN) are not in it
    mean: float | None
    std: float | None  # of the sample, over seeds; None of fewer than two
    test: PairedTest | None  # against the first method, on the seeds that both have
    p_t: float | None  # corrected by Holm for the number of methods, as the next
    p_wilcoxon: float | None


@dataclass(frozen=True)
class Row:
    """One network under one method."""

    method: str
    network: str
    role: str
    model: str
    seeds: tuple[int, ...]
    train_seconds: float  # the whole run's, of all networks, mean over seeds
    cells: Mapping[str, Cell]  # by metric


def compare(runs: Sequence[Run], methods: Sequence[str]) -> list[Row]:
    """A row for every network and method that has runs: students first, networks in the order of
    the recipe, methods in the order given. Tests are against ``methods[0]``; Holm's correction is
    over the other methods, for each metric of each network by itself."""
    networks: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for name, values in run.summary["networks"].items():
            networks.setdefault(name, values)
    rows = []
    for name in sorted(networks, key=lambda name: networks[name]["role"] != "student"):
        by_method = {
            method: own
            for method in methods
            if (own := [r for r in runs if r.method == method and name in r.summary["networks"]])
        }
        cells = {metric.key: _cells(by_method, name, metric, methods[0]) for metric in METRICS}
        for method, own in by_method.items():
            rows.append(
                Row(
                    method, name, networks[name]["role"], networks[name]["model"],
                    tuple(sorted(run.seed for run in own)),
                    statistics.fmean(run.summary["wall_seconds"] for run in own),
                    {key: of_method[method] for key, of_method in cells.items()},
                )
            )  # fmt: skip
    return rows


def _cells(
    by_method: Mapping[str, Sequence[Run]], network: str, metric: Metric, first: str
) -> dict[str, Cell]:
    values: dict[str, dict[int, float]] = {}
    for method, own in by_method.items():
        found = {run.seed: run.summary["networks"][network].get(metric.key) for run in own}
        values[method] = {
            seed: float(value)
            for seed, value in sorted(found.items())
            if value is not None and math.isfinite(value)
        }
    tests: dict[str, PairedTest] = {}
    for method, of_method in values.items():
        paired = sorted(of_method.keys() & values.get(first, {}).keys())
        trained = all(network not in run.frozen for m in (method, first) for run in by_method[m])
        if metric.tested and method != first and paired and trained:
            differences = [of_method[seed] - values[first][seed] for seed in paired]
            tests[method] = paired_test(differences)
    p_t = dict(zip(tests, holm([test.p_t for test in tests.values()]), strict=True))
    p_wilcoxon = dict(zip(tests, holm([test.p_wilcoxon for test in tests.values()]), strict=True))
    return {
        method: Cell(
            of_method,
            statistics.fmean(of_method.values()) if of_method else None,
            statistics.stdev(of_method.values()) if len(of_method) > 1 else None,
            tests.get(method), p_t.get(method), p_wilcoxon.get(method),
        )
        for method, of_method in values.items()
    }  # fmt: skip


def results(rows: Sequence[Row], network: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one network's table: mean and standard deviation of every metric."""
    header = ["method", *(metric.label for metric in METRICS), "seeds", "train s"]
    lines = [
        [
            row.method,
            *(_mean_and_std(row.cells[metric.key], metric) for metric in METRICS),
            str(len(row.seeds)),
            f"{row.train_seconds:.0f}",
        ]
        for row in rows
        if row.network == network
    ]
    return header, lines


def differences(rows: Sequence[Row], network: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one network's tests: a line for every method but the first and every
    headline metric."""
    header = ["method", "metric", "difference", "95% interval", "p (t)", "p (Wilcoxon)", "seeds"]
    lines = []
    for row in rows:
        for metric in METRICS:
            cell = row.cells[metric.key]
            if row.network != network or cell.test is None or not metric.headline:
                continue
            low, high = (metric.show(v, "+") for v in (cell.test.low, cell.test.high))
            interval = "–" if cell.test.low is None else f"{low} to {high}"
            lines.append(
                [
                    row.method, metric.label, metric.show(cell.test.mean, "+"), interval,
                    _p_value(cell.p_t), _p_value(cell.p_wilcoxon), str(cell.test.n),
                ]
            )  # fmt: skip
    return header, lines


def notes(first: str, images: int, rows: Sequence[Row]) -> list[str]:
    """What a reader must know of the tables, a paragraph each."""
    text = [
        f"Mean ± standard deviation over seeds, on {images:,} test images. ECE: 15 bins, as "
        "trained. "
        "At T: the logits divided by one temperature that was fitted on the validation part "
        "(temperature scaling), never on the test images.",
        "train s: seconds of training and evaluating all networks of one run, beside whatever else "
        "the machine did meanwhile: no claim of speed.",
    ]
    bounded = sum(
        value in (LOWEST, HIGHEST)
        for row in rows
        for value in row.cells["temperature"].values.values()
    )
    if bounded:
        text.append(
            f"T has no minimum to stand at in {bounded} fits (a validation part without an error, "
            f"or worse than chance): there it is at its bound, {LOWEST:g} or {HIGHEST:g}."
        )
    if any(cell.test for row in rows for cell in row.cells.values()):
        text.append(
            f"Differences are from {first}, seed by seed. p: paired t-test, and Wilcoxon's exact "
            "signed-rank test, which takes nothing as normal; both two-sided and corrected by Holm "
            "for the number of methods, for each metric of each network by itself. The interval is "
            "that of the t-test, uncorrected."
        )
    return text


def to_csv(rows: Sequence[Row]) -> str:
    """One line a method, network and metric; fractions in [0, 1], empty where there is no value."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["method", "network", "role", "model", "metric", "seeds", "mean", "std", "difference",
         "difference_low", "difference_high", "paired_seeds", "p_t_holm", "p_wilcoxon_holm",
         "train_seconds"]
    )  # fmt: skip
    for row in rows:
        for key, cell in row.cells.items():
            t = cell.test
            writer.writerow(
                [row.method, row.network, row.role, row.model, key, len(cell.values), cell.mean,
                 cell.std, *((t.mean, t.low, t.high, t.n) if t else (None,) * 4), cell.p_t,
                 cell.p_wilcoxon, round(row.train_seconds, 3)]
            )  # fmt: skip
    return file.getvalue()


def to_markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in (header, rule, *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _mean_and_std(cell: Cell, metric: Metric) -> str:
    if cell.std is None:
        return metric.show(cell.mean)
    return f"{metric.show(cell.mean)} ± {metric.show(cell.std)}"


def _p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "<0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.001 else f"{p:.3f}"
