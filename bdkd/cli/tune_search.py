"""The search of ``bdkd tune``: candidates, their runs and their validation results."""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdkd.cli.compare_plan import (
    PlannedRun,
    plan_runs,
    read_summary,
    recipe_of_method,
    split_label,
)
from bdkd.config import Recipe
from bdkd.errors import RunError, UsageError, shown
from bdkd.evaluation.metric_lines import as_number
from bdkd.identity import refuse_other_data
from bdkd.metrics import METRICS


@dataclass(frozen=True)
class Search:
    """One method and the values to try of its options."""

    label: str  # as the user wrote it
    objective: str
    options: Mapping[str, tuple[str, ...]]

    def candidates(self, chosen: Mapping[str, str], stage: int) -> list[dict[str, str]]:
        """Return the options to try at a stage, given the choices of the earlier stages."""
        fixed = {key: values[0] for key, values in self.options.items() if len(values) == 1}
        searched = [key for key in self.options if key not in fixed]
        if stage >= len(searched):
            return []
        key = searched[stage]
        return [{**fixed, **chosen, key: value} for value in self.options[key]]

    @property
    def stages(self) -> int:
        return sum(len(values) > 1 for values in self.options.values())


@dataclass(frozen=True)
class Result:
    """The validation metrics of one candidate, as means over the seeds and the students."""

    method: str
    top1: float
    nll: float
    ece: float
    seeds: int


@dataclass
class Found:
    """What a search has tried, and the candidate that it has chosen so far."""

    search: Search
    results: list[Result] = field(default_factory=list)
    best: Result | None = None
    options: dict[str, str] = field(default_factory=dict)  # of the best candidate

    def add(self, result: Result, options: dict[str, str]) -> None:
        """Add a candidate, and choose it if its accuracy is higher than that of the chosen one. If
        the accuracies are equal, choose the one with the lower NLL."""
        if result.method not in {known.method for known in self.results}:
            self.results.append(result)
        rank = (result.top1, -result.nll)
        if result.seeds and (self.best is None or rank > (self.best.top1, -self.best.nll)):
            self.best, self.options = result, options


def parse_searches(labels: Sequence[str], recipe: Recipe) -> list[Search]:
    """Return the searches of ``--methods``. Raise ``UsageError`` if a value does not fit."""
    searches = []
    for label in labels:
        objective, options = split_label(label)
        values = {key: tuple(text.split("/")) for key, text in options.items()}
        search = Search(label, objective, values)
        if not search.stages:
            raise UsageError(
                f"--methods {shown(label)} has nothing to choose: give an option several values, "
                f"as in {objective}:optimizer.learning_rate=0.05/0.1/0.2"
            )
        _check_values(search, recipe)
        searches.append(search)
    if not searches:
        raise UsageError(
            "--methods is missing: name objectives and values to try, as in "
            "kd:optimizer.learning_rate=0.05/0.1/0.2"
        )
    if len({search.label for search in searches}) < len(searches):
        raise UsageError("--methods has a method more than once")
    if not recipe.data.has_validation():
        raise UsageError(
            "bdkd tune needs validation images, and data.validation is 0: pass --data.validation "
            "0.1"
        )
    return searches


def _check_values(search: Search, recipe: Recipe) -> None:
    """Raise ``UsageError`` if a value does not fit, or two values of an option are equal. The other
    options have their first values."""
    first = {key: values[0] for key, values in search.options.items()}
    for key, values in search.options.items():
        recipes: list[Recipe] = []
        for value in values:
            resolved = recipe_of_method(
                join_label(search.objective, {**first, key: value}), recipe
            )  # fmt: skip
            if resolved in recipes:
                found = f"{key} has the value {shown(value)} more than once"
                raise UsageError(f"--methods {shown(search.label)}: {found}")
            recipes.append(resolved)


def join_label(objective: str, options: Mapping[str, str]) -> str:
    text = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{objective}:{text}" if text else objective


def shortest_label(objective: str, options: Mapping[str, str], recipe: Recipe) -> str:
    """Return a label without the options that have their defaults, so that equal runs have one
    name."""
    kept = dict(options)
    resolved = recipe_of_method(join_label(objective, kept), recipe)
    for key in options:
        fewer = {other: value for other, value in kept.items() if other != key}
        if recipe_of_method(join_label(objective, fewer), recipe) == resolved:
            kept = fewer
    return join_label(objective, kept)


class Trainer:
    """Train candidates, and read their validation results."""

    def __init__(
        self, recipe: Recipe, seeds: list[int], folder: Path, jobs: int, command: str, quiet: bool
    ) -> None:
        self.recipe, self.seeds, self.folder, self.jobs = recipe, seeds, folder, jobs
        self.command, self.stream = command, sys.stderr if quiet else None
        self.runs: dict[str, list[PlannedRun]] = {}
        self.failed: dict[str, str] = {}

    def train(self, labels: Sequence[str]) -> None:
        """Train the runs of candidates.

        Raises:
            RunError: the runs of the search were trained on different data sets.
        """
        from bdkd.cli.compare_train import train_all

        methods = [label for label in dict.fromkeys(labels) if label not in self.runs]
        if not methods:
            return
        runs = plan_runs(self.recipe, methods, self.seeds, self.folder)
        outcomes = train_all(
            runs, self.jobs, self.folder, self.command, self.stream, _validation_line
        )
        self.failed |= {name: bad.message for name, bad in outcomes.items() if bad.code}
        for method in methods:
            self.runs[method] = [run for run in runs if run.method == method]
        finished = [r for of in self.runs.values() for r in of if r.name not in self.failed]
        refuse_other_data([(str(r.path), read_summary(r).get("data")) for r in finished])

    def result(self, label: str) -> Result:
        """Return the result of a candidate. If a run failed or a metric is not finite, the number
        of seeds is 0."""
        runs = self.runs[label]
        if not any(run.name in self.failed for run in runs):
            found = [validation_of(run) for run in runs]
            means = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
            if all(map(math.isfinite, means.values())):
                return Result(label, means["top1"], means["nll"], means["ece"], len(runs))
        return Result(label, -math.inf, math.inf, math.inf, 0)


def validation_of(run: PlannedRun) -> dict[str, float]:
    """Return top-1, NLL and ECE of a finished run's selected weights on the validation images, as
    means over the students, or over their moving averages if the run has them."""
    from bdkd.engine.state import EMA_SUFFIX
    from bdkd.runs.folder import RunFolder

    step = read_summary(run)["selected_step"]
    lines = [
        line
        for line in RunFolder(run.path).read_metrics()
        if line.get("split") == "val" and line.get("step") == step
    ]
    if not lines:
        raise RunError(
            f"{run.path / 'metrics.jsonl'} has no validation results of step {step}: remove the "
            "run and run the same command again"
        )
    students = [name for name, net in run.recipe.networks.items() if net.role == "student"]
    found: list[Mapping[str, Any]] = [
        lines[-1].get(name + EMA_SUFFIX) or lines[-1][name] for name in students
    ]
    return {
        key: statistics.fmean(as_number(network[key]) for network in found)
        for key in ("top1", "nll", "ece")
    }


def _validation_line(run: PlannedRun) -> str:
    """Return the validation results of a run in one line. Results on the test images are not shown
    while values are chosen."""
    found = validation_of(run)
    return "validation " + "  ".join(
        f"{METRICS[key].label} {METRICS[key].show(value)}" for key, value in found.items()
    )


def search_all(searches: Sequence[Search], trainer: Trainer) -> list[Found]:
    """Run every search, stage by stage. The candidates of all searches in a stage train
    together."""
    found = [Found(search) for search in searches]
    for stage in range(max(search.stages for search in searches)):
        asked = [
            [
                (options, shortest_label(one.search.objective, options, trainer.recipe))
                for options in one.search.candidates(one.options, stage)
            ]
            for one in found
        ]
        trainer.train([label for pairs in asked for _, label in pairs])
        for one, pairs in zip(found, asked, strict=True):
            for options, label in pairs:
                one.add(trainer.result(label), options)
    return found
