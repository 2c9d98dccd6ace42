"""Plan the runs of ``bdkd compare``: objectives, seeds, recipes and teachers."""

import dataclasses
import itertools
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from bdkd.config import (
    ObjectiveConfig,
    Recipe,
    differing_keys,
    nearest,
    parse_recipe,
    select,
    to_toml,
)
from bdkd.config.convert import needed_for
from bdkd.config.toml import parse_toml
from bdkd.errors import RunError, UsageError, shown
from bdkd.registry import OBJECTIVES

MAX_SEEDS = 10_000
LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary files add a suffix
SECTIONS = ("optimizer", "schedule", "train")  # sections whose keys a method may set

TEACHERS = "independent"  # the objective that trains the teachers of kd


@dataclass(frozen=True)
class PlannedRun:
    """One objective with one seed."""

    method: str  # the objective as the user wrote it, such as "kd:temperature=2"
    seed: int
    recipe: Recipe  # resolved, except for the weights of ``teachers``
    frozen: frozenset[str]  # networks that the objective does not train
    teachers: tuple[str, ...]  # networks that start from the independent run of the same seed

    @property
    def name(self) -> str:
        return run_name(self.method, self.seed)

    @property
    def path(self) -> Path:
        assert self.recipe.run_dir is not None
        return Path(self.recipe.run_dir)


def run_name(method: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return re.sub(r"[^\w.=+-]", "-", f"{method}-seed{seed}")


def chosen_methods(given: Sequence[str]) -> list[str]:
    """Return the objectives to compare, by default all of them."""
    methods = list(given) or [TEACHERS, *(name for name in OBJECTIVES if name != TEACHERS)]
    if doubled := [method for method in methods if methods.count(method) > 1]:
        raise UsageError(f"--methods has {shown(doubled[0])} more than once")
    return methods


def refuse_equal(recipes: Mapping[str, Recipe]) -> None:
    """Raise ``UsageError`` if two methods are the same, or their runs would have the same
    folder."""
    labels = list(recipes)
    for label, other in itertools.combinations(labels, 2):
        if recipes[label] == recipes[other]:
            raise UsageError(f"--methods {shown(label)} and {shown(other)} are the same method")
        if run_name(label, 0) == run_name(other, 0):
            raise UsageError(
                f"--methods {shown(label)} and {shown(other)} would have the same folder: "
                "write the values in another way"
            )
    for label in labels:
        if len(os.fsencode(run_name(label, 0))) > LONGEST_NAME:
            raise UsageError(
                f"--methods {shown(label)} is too long for the name of a folder: put the options "
                "into a recipe"
            )


def chosen_seeds(given: Sequence[int]) -> list[int]:
    """Return the seeds: N seeds for one number N, else the numbers."""
    if not given or min(given) < 0:
        raise UsageError(f"--seeds must be a number of seeds or several seeds, got {list(given)}")
    if len(given) == 1 and given[0] > MAX_SEEDS:
        raise UsageError(f"--seeds must be at most {MAX_SEEDS:,} seeds, got {shown(given[0])}")
    seeds = list(range(max(1, given[0]))) if len(given) == 1 else list(given)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds must be different seeds, got {' '.join(map(str, seeds))}")
    return seeds


def recipe_of_method(label: str, recipe: Recipe) -> Recipe:
    """Return the recipe of a method like ``kd:temperature=2,optimizer.learning_rate=0.05``.

    An option without a dot is an option of the objective.

    Raises:
        UsageError: the objective or an option does not exist, or a value does not fit.
    """
    name, given = split_label(label)
    own = {key: value for key, value in given.items() if "." not in key}
    others = {key: value for key, value in given.items() if "." in key}
    selected = select(recipe, "objective", name)
    objective = _with_options(selected.objective, label, own)
    try:
        changed = dataclasses.replace(selected, objective=objective)
    except UsageError as error:
        raise UsageError(f"--methods {shown(label)}: {error}") from error
    return _with_keys(changed, label, others) if others else changed


def split_label(label: str) -> tuple[str, dict[str, str]]:
    """Return the objective's name, and the options of a label as strings."""
    name, _, text = label.partition(":")
    options: dict[str, str] = {}
    for option in filter(None, re.split(r",(?![^\[]*\])", text)):  # not within an array
        key, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"--methods {shown(label)}: {key!r} needs a value: write {key}=1")
        if key in options:
            raise UsageError(f"--methods {shown(label)} has {key!r} more than once")
        options[key] = value
    return name, options


def _with_options(
    config: ObjectiveConfig, label: str, options: Mapping[str, str]
) -> ObjectiveConfig:
    """Return an objective with options that are given as strings."""
    name, values = config.name, dataclasses.asdict(config)
    known = sorted(values.keys() - {"name"})
    for key in options:
        if key not in known:
            hint = nearest(key, known)
            raise UsageError(f"--methods {label}: {name} has no option {key!r}: {hint}")
    try:
        given = msgspec.convert({**values, **options}, type(config), strict=False)
    except msgspec.ValidationError as error:
        # One option does not fit its type: convert() names it and the value.
        for key, value in options.items():
            hint = typing.get_type_hints(type(config), include_extras=True)[key]
            try:
                msgspec.convert(value, hint, strict=False)
            except msgspec.ValidationError:
                needed = needed_for(hint)
                raise UsageError(
                    f"--methods {name}: {key} must be {needed}, got {shown(value)}"
                ) from error
        raise UsageError(f"--methods {shown(label)} has a value that does not fit") from error
    return dataclasses.replace(config, **{key: getattr(given, key) for key in options})


def _with_keys(recipe: Recipe, label: str, options: Mapping[str, str]) -> Recipe:
    """Return a recipe with dotted keys set to values that are given as strings."""
    tables = parse_toml(to_toml(recipe))
    for key, value in options.items():
        section, _, option = key.partition(".")
        if section not in SECTIONS:
            raise UsageError(
                f"--methods {shown(label)}: {key!r} must be an option of the objective, or a key "
                f"of {', '.join(SECTIONS)}"
            )
        tables[section][option] = _toml_value(value)
    return parse_recipe(tomli_w.dumps(tables), f"--methods {shown(label)}")


def _toml_value(text: str) -> object:
    """Return the TOML value of a text, or the text itself if it is not TOML, so that ``name=step``
    needs no quotes."""
    if "#" in text or "\n" in text:  # TOML would ignore a comment
        return text
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def plan_runs(
    recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], folder: Path
) -> list[PlannedRun]:
    """Return all runs, including those that only train teachers. The runs are ordered by seed, so
    that a stopped comparison has the same seeds for every objective.

    Raises:
        UsageError: an objective, option or value is invalid, or the networks do not fit.
        RunError: a folder contains a run with other options.
    """
    from bdkd.engine.image_size import with_image_size_of
    from bdkd.engine.networks import with_model_options
    from bdkd.objectives import create_objective
    from bdkd.runs.folder import RunFolder

    recipes = {method: recipe_of_method(method, recipe) for method in methods}
    refuse_equal(recipes)
    filled = {
        name: dataclasses.replace(network, weights=network.weights or "to be trained")
        for name, network in recipe.networks.items()
    }
    frozen = {m: create_objective(own.objective, filled).frozen for m, own in recipes.items()}
    trained = {
        name
        for name, network in recipe.networks.items()
        if network.frozen or network.weights or network.options.get("pretrained")
    }
    teachers = {method: tuple(names - trained) for method, names in frozen.items()}
    if any(teachers.values()) and TEACHERS not in methods:
        recipes = {TEACHERS: recipe_of_method(TEACHERS, recipe), **recipes}
        frozen[TEACHERS], teachers[TEACHERS] = frozenset(), ()
    runs = []
    for seed in seeds:
        for method, own in recipes.items():
            run_dir = str(folder / run_name(method, seed))
            resolved = dataclasses.replace(own, seed=seed, run_dir=run_dir)
            runs.append(PlannedRun(method, seed, resolved, frozen[method], teachers[method]))
    for planned in runs:
        # A run that failed before its first step may be repeated with other options.
        if (stored := RunFolder(planned.path)).config.exists() and stored.has_begun():
            before = with_model_options(stored.read_config())
            now = with_image_size_of(with_model_options(planned.recipe), before)
            taught = {
                f"networks.{name}.weights"
                for name in planned.teachers
                if _is_of_run(before.networks[name].weights, run_name(TEACHERS, planned.seed))
            }
            changed = set(differing_keys(before, now))
            if changed := changed - taught - {"run_dir"}:
                found = f"{planned.path} contains a run with other {', '.join(sorted(changed))}"
                raise RunError(f"{found}: choose another --folder, or remove the run")
    return runs


def warmup_warnings(planned: Sequence[PlannedRun]) -> list[str]:
    """Return a line for each method whose warm-up is longer than its runs, so that its divergences
    never reach their full weights."""
    found = {}
    for run in planned:
        warmup = getattr(run.recipe.objective, "warmup", 0.0)
        if warmup > (epochs := run.recipe.train.epochs):
            found[run.method] = (
                f"{run.method}: the warm-up of {warmup:g} epochs is longer than the {epochs} "
                "epochs of the runs: set warmup in proportion to your epochs"
            )
    return list(found.values())


def _is_of_run(weights: str | None, name: str) -> bool:
    """Return whether a path is a checkpoint of the run ``name``. The folder may have moved."""
    return weights is not None and Path(weights).parent.parent.name == name


def room_for(recipe: Recipe) -> int:
    """Return the number of runs that can train concurrently without sharing cores or a GPU."""
    import torch

    if recipe.device.startswith("cuda") or (recipe.device == "auto" and torch.cuda.is_available()):
        return 1
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // (recipe.threads or torch.get_num_threads()))


def read_summary(run: PlannedRun) -> dict[str, Any]:
    """Return the content of a run's ``summary.json``. Raise ``RunError`` if it is invalid."""
    from bdkd.runs.folder import RunFolder

    remedy = "remove it and run the same command again to rewrite it"
    return RunFolder(run.path).read_summary(remedy)
