"""Compare methods over seeds: means, standard deviations and paired tests, as tables."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdkd.evaluation.paired import (
    PairedTest,
    describe_power,
    holm,
    mean_interval,
    paired_test,
    wilcoxon_can_reach,
)
from bdkd.evaluation.temperature import HIGHEST, LOWEST
from bdkd.metrics import METRICS, Metric

Table = tuple[list[str], list[list[str]]]  # header and lines


@dataclass(frozen=True)
class Run:
    """One finished run. ``frozen`` networks are not trained by the method and not tested."""

    method: str
    seed: int
    summary: Mapping[str, Any]  # the content of ``summary.json``
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Cell:
    """One metric of one network with one method."""

    values: Mapping[int, float]  # by seed; seeds without a finite value are left out
    mean: float | None
    std: float | None  # sample standard deviation over seeds, None for fewer than two
    interval: tuple[float, float] | None  # interval of the mean, see :func:`mean_interval`
    test: PairedTest | None  # against the first method, on the seeds that both have
    p_t: float | None  # with Holm's correction for the number of methods
    p_wilcoxon: float | None  # with the same correction; None if it cannot be below 0.05


@dataclass(frozen=True)
class Row:
    """One network with one method."""

    method: str
    network: str
    role: str
    model: str
    seeds: tuple[int, ...]
    train_seconds: float  # time of the whole run with all networks, mean over seeds
    cells: Mapping[str, Cell]  # by metric


def compared_metrics() -> list[Metric]:
    """Return the metrics that are columns of the tables."""
    return [metric for metric in METRICS.values() if metric.compared]


def compare(runs: Sequence[Run], methods: Sequence[str]) -> list[Row]:
    """Return a row for every network and method that has runs.

    Students come first, networks are in the order of the recipe, and methods are in the given
    order. Tests compare each method with ``methods[0]``. Holm's correction covers these tests for
    each metric of each network separately.
    """
    networks: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for name, values in run.summary["networks"].items():
            networks.setdefault(name, values)
    rows = []
    for name in sorted(networks, key=lambda name: networks[name]["role"] != "student"):
        by_method = {
            method: found
            for method in methods
            if (found := [r for r in runs if r.method == method and name in r.summary["networks"]])
        }
        cells = {
            metric.key: _cells(by_method, name, metric, methods[0]) for metric in compared_metrics()
        }
        for method, found in by_method.items():
            rows.append(
                Row(
                    method, name, networks[name]["role"], networks[name]["model"],
                    tuple(sorted(run.seed for run in found)),
                    statistics.fmean(run.summary["wall_seconds"] for run in found),
                    {key: of_methods[method] for key, of_methods in cells.items()},
                )
            )  # fmt: skip
    return rows


def _cells(
    by_method: Mapping[str, Sequence[Run]], network: str, metric: Metric, first: str
) -> dict[str, Cell]:
    values: dict[str, dict[int, float]] = {}
    for method, runs in by_method.items():
        found = {run.seed: run.summary["networks"][network].get(metric.key) for run in runs}
        values[method] = {
            seed: float(value)
            for seed, value in sorted(found.items())
            if value is not None and math.isfinite(value)
        }
    tests: dict[str, PairedTest] = {}
    for method, by_seed in values.items():
        paired = sorted(by_seed.keys() & values.get(first, {}).keys())
        trained = all(network not in run.frozen for m in (method, first) for run in by_method[m])
        if metric.tested and method != first and paired and trained:
            tests[method] = paired_test([by_seed[seed] - values[first][seed] for seed in paired])
    p_t = dict(zip(tests, holm([test.p_t for test in tests.values()]), strict=True))
    given = [test.p_wilcoxon for test in tests.values()]
    comparisons = sum(p is not None for p in given)
    p_wilcoxon = {
        method: p if wilcoxon_can_reach(tests[method].n, comparisons) else None
        for method, p in zip(tests, holm(given), strict=True)
    }
    return {
        method: Cell(
            by_seed,
            statistics.fmean(by_seed.values()) if by_seed else None,
            statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
            mean_interval(list(by_seed.values())),
            tests.get(method), p_t.get(method), p_wilcoxon.get(method),
        )
        for method, by_seed in values.items()
    }  # fmt: skip


def results(rows: Sequence[Row], network: str) -> Table:
    """Return the table of mean and standard deviation of every metric of one network."""
    header = ["method", *(metric.label for metric in compared_metrics()), "seeds", "train s"]
    lines = []
    for row in rows:
        if row.network == network:
            cells = [(metric, row.cells[metric.key]) for metric in compared_metrics()]
            shown = [
                metric.show(cell.mean) + ("" if cell.std is None else f" ± {metric.show(cell.std)}")
                for metric, cell in cells
            ]
            lines.append([row.method, *shown, str(len(row.seeds)), f"{row.train_seconds:.0f}"])
    return header, lines


def differences(
    rows: Sequence[Row], network: str, metrics: Sequence[Metric] | None = None
) -> Table:
    """Return the table of tests of one network: a line for every method except the first and every
    metric. Default: the headline metrics."""
    if metrics is None:
        metrics = [metric for metric in compared_metrics() if metric.headline]
    header = ["method", "metric", "difference", "95% interval", "p (t)", "p (Wilcoxon)", "seeds"]
    lines = []
    for row in rows:
        for metric in metrics:
            cell = row.cells[metric.key]
            if row.network != network or cell.test is None:
                continue
            mean, low, high = (
                metric.show(v, "+") for v in (cell.test.mean, cell.test.low, cell.test.high)
            )
            interval = "–" if cell.test.low is None else f"{low} to {high}"
            p_values = show_p(cell.p_t), show_p(cell.p_wilcoxon)
            lines.append([row.method, metric.label, mean, interval, *p_values, str(cell.test.n)])
    return header, lines


def notes(first: str, images: int, rows: Sequence[Row]) -> list[str]:
    """Return paragraphs that explain the tables."""
    text = [
        f"Mean ± standard deviation over seeds, on {images:,} test images. ECE: 15 bins, without "
        "temperature scaling. At T: after temperature scaling, which divides the logits by one "
        "temperature that was fitted on the validation part, never on the test images.",
        "train s: seconds of training and evaluating all networks of one run. Other work on the "
        "machine affects this time, so that it does not compare the speed of methods.",
    ]
    temperatures = [t for row in rows for t in row.cells["temperature"].values.values()]
    bounded = sum(t in (LOWEST, HIGHEST) for t in temperatures)
    if bounded:
        text.append(
            f"In {bounded} fits the NLL has no minimum, because the validation part has no error "
            f"or because the network is worse than chance. There T is {LOWEST:g} or {HIGHEST:g}."
        )
    if any(cell.test for row in rows for cell in row.cells.values()):
        text.append(
            f"Differences are from {first}, seed by seed. p: paired t-test, and Wilcoxon's exact "
            "signed-rank test, which does not assume a normal distribution. Both are two-sided and "
            "corrected by Holm for the number of methods, for each metric of each network "
            "separately. The interval is that of the t-test, without correction."
        )
        text += _powers(rows)
    return text


def _powers(rows: Sequence[Row]) -> list[str]:
    """Return a sentence about the tests for each number of seeds, most seeds first."""
    families: dict[tuple[str, str], list[int]] = {}  # seeds of each test, by network and metric
    for row in rows:
        for key, cell in row.cells.items():
            if cell.test is not None:
                families.setdefault((row.network, key), []).append(cell.test.n)
    of_t: dict[int, int] = {}  # the most tests of one family, by number of seeds
    of_wilcoxon: dict[int, int] = {}
    for seeds in families.values():
        reaching = sum(wilcoxon_can_reach(n) for n in seeds)
        for n in seeds:
            of_t[n] = max(of_t.get(n, 0), len(seeds))
            count = reaching if wilcoxon_can_reach(n) else len(seeds)
            of_wilcoxon[n] = max(of_wilcoxon.get(n, 0), count)
    return [describe_power(n, of_t[n], of_wilcoxon[n]) for n in sorted(of_t, reverse=True)]


def to_csv(rows: Sequence[Row]) -> str:
    """Return one line for each method, network and metric. Fractions are in [0, 1], and missing
    values are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["method", "network", "role", "model", "metric", "seeds", "mean", "std", "mean_low",
         "mean_high", "difference", "difference_low", "difference_high", "paired_seeds",
         "p_t_holm", "p_wilcoxon_holm", "train_seconds"]
    )  # fmt: skip
    for row in rows:
        for key, cell in row.cells.items():
            t = cell.test
            writer.writerow(
                [row.method, row.network, row.role, row.model, key, len(cell.values), cell.mean,
                 cell.std, *(cell.interval or (None, None)),
                 *((t.mean, t.low, t.high, t.n) if t else (None,) * 4), cell.p_t,
                 cell.p_wilcoxon, round(row.train_seconds, 3)]
            )  # fmt: skip
    return file.getvalue()


def to_markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with the first column left-aligned and the others right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in (header, rule, *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def show_p(p: float | None) -> str:
    """Return a p-value as text for a table."""
    if p is None:
        return "–"
    return "<0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.001 else f"{p:.3f}"
