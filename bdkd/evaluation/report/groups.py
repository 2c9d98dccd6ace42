"""Group runs that differ only in their seed, and average their curves."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .charts import Line
from .runs import Run

POINTS = 160  # maximum number of points of a line
# Options that do not change the experiment
_IGNORED = {
    "seed", "run_dir", "device", "threads", "log", "log_every", "max_steps", "checkpoint",
}  # fmt: skip
Points = tuple[np.ndarray, np.ndarray]  # x (P,) and y (P,)


@dataclass
class Group:
    """Runs of one configuration."""

    label: str
    runs: list[Run]

    @property
    def networks(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.networks))

    def networks_with_role(self, role: str) -> list[str]:
        return list(dict.fromkeys(n for run in self.runs for n in run.networks_with_role(role)))

    def results(self, network: str, metric: str) -> np.ndarray:
        """Return the finite results of the runs, (S,)."""
        values = np.array([run.result(network, metric) for run in self.runs])
        return values[np.isfinite(values)]

    def mean(self, network: str, metric: str) -> float:
        values = self.results(network, metric)
        return float(values.mean()) if len(values) else math.nan


def network_points(run: Run, network: str, split: str, metric: str, epochs: bool) -> Points:
    """Return a metric of a network, or of the training step if ``network`` is ``""``."""
    series = run.series.get((network, split, metric))
    if series is None:
        return np.empty(0), np.empty(0)
    scale = run.steps_per_epoch if epochs and run.steps_per_epoch else 1
    return np.array(series.steps) / scale, np.array(series.values)


def step_points(run: Run, metric: str, epochs: bool) -> Points:
    """Return a metric of the training step."""
    return network_points(run, "", "train", metric, epochs)


def role_points(run: Run, role: str, metric: str, epochs: bool) -> Points:
    """Return the mean of a validation metric over the networks with a role, or over all networks if
    there are none."""
    names = run.networks_with_role(role) or run.networks
    found = [network_points(run, name, "val", metric, epochs) for name in names]
    found = [points for points in found if len(points[0])]
    return _mean(found)[:2] if found else (np.empty(0), np.empty(0))


def student_points(run: Run, metric: str, epochs: bool) -> Points:
    return role_points(run, "student", metric, epochs)


def gap_points(run: Run, metric: str, epochs: bool) -> Points:
    """Return the teachers' mean of a validation metric minus the students' mean."""
    if not (run.networks_with_role("teacher") and run.networks_with_role("student")):
        return np.empty(0), np.empty(0)
    teacher_x, teacher = role_points(run, "teacher", metric, epochs)
    student_x, student = role_points(run, "student", metric, epochs)
    x, i, j = np.intersect1d(teacher_x, student_x, return_indices=True)
    return x, teacher[i] - student[j]


def average(label: str, points: Sequence[Points], style: int, thin: bool = False) -> Line:
    """Return a line with the mean over seeds, and a band from their minimum to their maximum."""
    given = [p for p in points if len(p[0])]
    if not given:
        return Line(label, np.empty(0), np.empty(0), style, thin)
    reductions: tuple[Any, ...] = (np.nanmean, np.nanmean, np.nanmin, np.nanmax)
    x, mean, *band = map(_thinned, _mean(given), reductions)
    return Line(label, x, mean, style, thin, *(band if len(given) > 1 else ()))


def _mean(points: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return each x with the mean, minimum and maximum of its finite values. They are NaN if no
    value is finite."""
    x, where = np.unique(np.concatenate([p[0] for p in points]), return_inverse=True)
    y = np.concatenate([p[1] for p in points])
    where, y = where[np.isfinite(y)], y[np.isfinite(y)]
    count = np.bincount(where, minlength=len(x))
    total = np.bincount(where, weights=y, minlength=len(x))
    mean, low, high = np.full((3, len(x)), math.nan)
    np.divide(total, count, out=mean, where=count > 0)
    np.fmin.at(low, where, y)
    np.fmax.at(high, where, y)
    return x, mean, low, high


def _thinned(values: np.ndarray, reduce: Any) -> np.ndarray:
    """Reduce groups of neighboring values to at most ``POINTS`` values, and keep the last value."""
    if len(values) <= POINTS:
        return values
    edges = np.linspace(0, len(values), POINTS).astype(int)
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    reduced = [float(reduce(part)) if np.isfinite(part).any() else math.nan for part in parts]
    return np.array([*reduced, values[-1]])


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Return groups with unique labels, in the order of their first runs."""
    members: dict[object, list[Run]] = {}
    for run in runs:
        flat = _flat(run.config)
        key = frozenset((k, repr(v)) for k, v in flat.items()) if flat else run.path
        members.setdefault(key, []).append(run)
    groups = [Group(found[0].method, found) for found in members.values()]
    recipes = [str(g.runs[0].config.get("name") or "") for g in groups]
    if len(set(recipes)) > 1:
        for group, recipe in zip(groups, recipes, strict=True):
            group.label = f"{recipe}: {group.label}" if recipe else group.label
    for label, count in Counter(g.label for g in groups).items():
        if count > 1:
            _make_unique([g for g in groups if g.label == label])
    return groups


def differing(groups: Sequence[Group]) -> dict[str, list[object]]:
    """Return the configuration keys that differ, with the value of each group (None: absent)."""
    flats = [_flat(group.runs[0].config) for group in groups]
    keys = sorted({key for flat in flats for key in flat})
    values = {key: [flat.get(key) for flat in flats] for key in keys}
    return {key: of for key, of in values.items() if len(set(map(repr, of))) > 1}


def _make_unique(groups: Sequence[Group]) -> None:
    """Append to each label the keys that differ. Append the name of the run if labels are still
    equal."""
    keys = differing(groups)
    for index, group in enumerate(groups):
        parts = []
        for key, values in keys.items():
            short = key.removeprefix("networks.")
            short = short if short != key else key.split(".")[-1]
            value = values[index]
            if value is not None:
                parts.append(f"{short} = {f'{value:g}' if isinstance(value, float) else value}")
        shown = parts if len(parts) <= 3 else [*parts[:3], "…"]
        if shown:
            group.label += f" ({', '.join(shown)[:80]})"
    counts = Counter(group.label for group in groups)
    for group in groups:
        if counts[group.label] > 1:
            group.label += f" [{group.runs[0].name}]"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration with dotted keys, without the keys that do not change the
    experiment."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if prefix == "" and key in _IGNORED:
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "weights":  # each seed may load the weights of another teacher
            flat[prefix + key] = value
    return flat
