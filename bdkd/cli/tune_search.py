"""The search of ``bdkd tune``: candidates, their runs and their validation results."""

import itertools
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


@dataclass(frozen=True)
class Search:
    """One method and the values to try of its options."""

    label: str  # as the user wrote it
    objective: str
    options: Mapping[str, tuple[str, ...]]

    def candidates(self, chosen: Mapping[str, str], stage: int) -> list[dict[str, str]]:
        """Return the options to try at a stage, given the choices of the stages before."""
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
    """What a search has tried, and the options that it has chosen so far."""

    label: str
    results: list[Result] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)


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
        for key, tried in values.items():
            if len(set(tried)) < len(tried):
                raise UsageError(f"--methods {shown(label)}: {key} has a value more than once")
        for given in itertools.product(*values.values()):
            recipe_of_method(join_label(objective, dict(zip(values, given, strict=True))), recipe)
        searches.append(search)
    if not searches:
        raise UsageError(
            "--methods is missing: name objectives and values to try, as in "
            "kd:optimizer.learning_rate=0.05/0.1/0.2"
        )
    if len({search.label for search in searches}) < len(searches):
        raise UsageError("--methods has a method more than once")
    if recipe.data.validation == 0 and not getattr(recipe.data, "use_val_split", False):
        raise UsageError(
            "bdkd tune needs validation images, and data.validation is 0: pass --data.validation "
            "0.1"
        )
    return searches


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
        from bdkd.cli.compare_train import train_all

        methods = [label for label in dict.fromkeys(labels) if label not in self.runs]
        if not methods:
            return
        runs = plan_runs(self.recipe, methods, self.seeds, self.folder)
        outcomes = train_all(runs, self.jobs, self.folder, self.command, self.stream)
        self.failed |= {name: bad.message for name, bad in outcomes.items() if bad.code}
        for method in methods:
            self.runs[method] = [run for run in runs if run.method == method]

    def result(self, label: str) -> Result:
        """Return the result of a candidate. One with a failed run is worse than any other."""
        runs = self.runs[label]
        if any(run.name in self.failed for run in runs):
            return Result(label, -math.inf, math.inf, math.inf, 0)
        found = [validation_of(run) for run in runs]
        means = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
        return Result(label, means["top1"], means["nll"], means["ece"], len(runs))


def validation_of(run: PlannedRun) -> dict[str, float]:
    """Return top-1, NLL and ECE of a finished run's selected weights on the validation images, as
    means over the students."""
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
    students: list[dict[str, Any]] = [
        lines[-1][name] for name, net in run.recipe.networks.items() if net.role == "student"
    ]
    return {key: statistics.fmean(s[key] for s in students) for key in ("top1", "nll", "ece")}


def search_all(searches: Sequence[Search], trainer: Trainer) -> list[Found]:
    """Run every search, stage by stage. Candidates of a stage train together."""
    found = [Found(shortest_label(s.objective, {}, trainer.recipe)) for s in searches]
    for stage in range(max(search.stages for search in searches)):
        asked = [
            [
                (options, shortest_label(search.objective, options, trainer.recipe))
                for options in search.candidates(so_far.options, stage)
            ]
            for search, so_far in zip(searches, found, strict=True)
        ]
        trainer.train([label for pairs in asked for _, label in pairs])
        for so_far, pairs in zip(found, asked, strict=True):
            for _, label in pairs:
                if label not in {result.method for result in so_far.results}:
                    so_far.results.append(trainer.result(label))
            if pairs:
                so_far.options, so_far.label = max(
                    pairs, key=lambda pair: _rank(trainer.result(pair[1]))
                )
    return found


def _rank(result: Result) -> tuple[float, float]:
    """Of equal accuracies, the lower NLL is better; of equal candidates, the first."""
    return result.top1, -result.nll
