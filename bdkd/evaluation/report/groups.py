"""Runs that differ in their seed alone stand together: one line of their mean, one band."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .charts import Line
from .runs import Run

POINTS = 160  # of a line: more than a screen can tell apart
# What makes no difference to the science of a run.
_IGNORED = {"seed", "run_dir", "device", "threads", "log", "log_every", "max_steps"}


@dataclass
class Group:
    """Runs of one configuration."""

    label: str
    runs: list[Run]

    @property
    def networks(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.networks))

    def judged(self, role: str) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.judged(role)))

    def results(self, network: str, metric: str) -> np.ndarray:
        """Of each finished run, ``(S,)``."""
        values = np.array([run.result(network, metric) for run in self.runs])
        return values[np.isfinite(values)]

    def line(
        self, label: str, network: str, split: str, metric: str, epochs: bool, style: int
    ) -> Line:
        """A metric over the steps (or epochs): the mean of the seeds that came that far, and the
        band from the least of them to the greatest."""
        return average(
            label, [_points(run, network, split, metric, epochs) for run in self.runs], style,
            thin=split == "train",
        )  # fmt: skip

    def mean_line(
        self, label: str, role: str, split: str, metric: str, epochs: bool, style: int
    ) -> Line:
        """The same of the mean over the networks of a role."""
        return average(
            label,
            [role_points(run, role, split, metric, epochs) for run in self.runs],
            style,
            thin=split == "train",
        )


Points = tuple[np.ndarray, np.ndarray]


def _points(run: Run, network: str, split: str, metric: str, epochs: bool) -> Points:
    series = run.series.get((network, split, metric))
    if series is None:
        return np.empty(0), np.empty(0)
    x = np.array(series.steps)
    return (x / run.steps_per_epoch if epochs and run.steps_per_epoch else x), np.array(
        series.values
    )


def role_points(run: Run, role: str, split: str, metric: str, epochs: bool) -> Points:
    """The mean over the networks of a role, where it has some, else over all of a run."""
    names = run.judged(role) or run.networks
    found = [_points(run, name, split, metric, epochs) for name in names]
    found = [points for points in found if len(points[0])]
    if not found:
        return np.empty(0), np.empty(0)
    return _mean(found)[:2]


def gap_line(group: Group, label: str, metric: str, epochs: bool, style: int) -> Line:
    """Teachers less students, in validation."""
    differences: list[Points] = []
    for run in group.runs:
        if not (run.judged("teacher") and run.judged("student")):
            continue
        teacher = role_points(run, "teacher", "val", metric, epochs)
        student = role_points(run, "student", "val", metric, epochs)
        x, of_teacher, of_student = np.intersect1d(teacher[0], student[0], return_indices=True)
        differences.append((x, teacher[1][of_teacher] - student[1][of_student]))
    return average(label, differences, style)


def average(label: str, points: Sequence[Points], style: int, thin: bool = False) -> Line:
    """One line of several seeds."""
    given = [p for p in points if len(p[0])]
    if not given:
        return Line(label, np.empty(0), np.empty(0), style, thin)
    x, mean, low, high = (_thinned(a, how) for a, how in zip(
        _mean(given), (np.nanmean, np.nanmean, np.nanmin, np.nanmax), strict=True))  # fmt: skip
    if len(given) == 1:
        return Line(label, x, mean, style, thin)
    return Line(label, x, mean, style, thin, low, high)


def _mean(points: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, least and greatest of the finite values at each x; NaN where there is none."""
    x, where = np.unique(np.concatenate([p[0] for p in points]), return_inverse=True)
    y = np.concatenate([p[1] for p in points])
    known = np.isfinite(y)
    where, y = where[known], y[known]
    count = np.bincount(where, minlength=len(x))
    total = np.bincount(where, weights=y, minlength=len(x))
    low, high = np.full(len(x), np.inf), np.full(len(x), -np.inf)
    np.minimum.at(low, where, y)
    np.maximum.at(high, where, y)
    nothing = count == 0
    for values in (low, high):
        values[nothing] = math.nan
    return x, np.where(nothing, math.nan, total / np.maximum(count, 1)), low, high


def _thinned(values: np.ndarray, how: Any) -> np.ndarray:
    """At most ``POINTS``, each of a run of neighbours; the last of a line stays the last."""
    if len(values) <= POINTS:
        return values
    edges = np.linspace(0, len(values), POINTS).astype(int)
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    means = [float(how(part)) if np.isfinite(part).any() else math.nan for part in parts]
    return np.array([*means, values[-1]])


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, under names that tell them apart."""
    members: dict[object, list[Run]] = {}
    for run in runs:
        flat = _flat(run.config)
        key = frozenset((k, repr(v)) for k, v in flat.items()) if flat else run.path
        members.setdefault(key, []).append(run)
    groups = [Group(found[0].method, found) for found in members.values()]
    recipes = {str(g.runs[0].config.get("name", "")) for g in groups}
    if len(recipes) > 1:
        for group in groups:
            recipe = group.runs[0].config.get("name")
            group.label = f"{recipe}: {group.label}" if recipe else group.label
    for label in [g.label for g in groups]:
        alike = [g for g in groups if g.label == label]
        if len(alike) > 1:
            _tell_apart(alike)
    return groups


def differing(groups: Sequence[Group]) -> dict[str, list[object]]:
    """Keys of the configuration that differ, with each group's value (None: absent)."""
    flats = [_flat(group.runs[0].config) for group in groups]
    keys = sorted({key for flat in flats for key in flat})
    values = {key: [flat.get(key) for flat in flats] for key in keys}
    return {key: of for key, of in values.items() if any(repr(v) != repr(of[0]) for v in of)}


def _tell_apart(groups: Sequence[Group]) -> None:
    keys = differing(groups)
    for index, group in enumerate(groups):
        told = [
            f"{_brief(key)} = {_plain(of[index])}"
            for key, of in keys.items()
            if of[index] is not None
        ]
        shown = told if len(told) <= 3 else [*told[:3], "…"]
        if shown:
            group.label += f" ({', '.join(shown)[:80]})"
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.label] = seen.get(group.label, 0) + 1
    for group in groups:
        if seen[group.label] > 1:
            group.label += f" [{group.runs[0].name}]"


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _brief(key: str) -> str:
    return key.removeprefix("networks.") if key.startswith("networks.") else key.split(".")[-1]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if prefix == "" and (key in _IGNORED or key == "checkpoint"):
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "weights":  # each seed may start from a teacher of its own
            flat[prefix + key] = value
    return flat
