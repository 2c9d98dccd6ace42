"""The plan of ``bdkd compare``: which methods and seeds, with which recipes and teachers."""

import dataclasses
import json
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bdkd.config import (
    NetworkConfig,
    ObjectiveConfig,
    Recipe,
    check_recipe,
    differing_keys,
    nearest,
)
from bdkd.errors import RunError, UsageError

TEACHERS = "independent"  # the method that trains teachers for methods that need trained ones


@dataclass(frozen=True)
class PlannedRun:
    """One method with one seed."""

    method: str  # as the user wrote it
    seed: int
    recipe: Recipe  # resolved but for the weights of ``teachers``
    frozen: frozenset[str]  # networks that the method does not train
    teachers: tuple[str, ...]  # those that start from the independent run of the same seed

    @property
    def name(self) -> str:
        return run_name(self.method, self.seed)

    @property
    def path(self) -> Path:
        assert self.recipe.run_dir is not None
        return Path(self.recipe.run_dir)


def run_name(method: str, seed: int) -> str:
    return f"{method.replace(':', '-').replace(',', '-')}-seed{seed}"


def chosen_methods(given: Sequence[str]) -> list[str]:
    from bdkd.objectives import OBJECTIVES

    methods = list(given) or [TEACHERS, *(name for name in OBJECTIVES if name != TEACHERS)]
    doubled = [method for method in methods if methods.count(method) > 1]
    if doubled:
        raise UsageError(f"--methods has {doubled[0]!r} more than once")
    return methods


def chosen_seeds(given: Sequence[int]) -> list[int]:
    """One number is how many, several are which."""
    if not given or min(given) < 0:
        raise UsageError(f"--seeds must be a number of seeds or several seeds, got {list(given)}")
    seeds = list(range(max(1, given[0]))) if len(given) == 1 else list(given)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds must be different seeds, got {' '.join(map(str, seeds))}")
    return seeds


def parse_method(label: str, recipe: Recipe) -> ObjectiveConfig:
    """``kd:temperature=2`` as an objective, with every option set."""
    from bdkd.objectives import OBJECTIVES, resolve_options, switch_objective

    name, _, text = label.partition(":")
    if name not in OBJECTIVES:
        raise UsageError(f"unknown objective {name!r}: {nearest(name, list(OBJECTIVES))}")
    config = recipe.objective
    if name != config.name:
        config = switch_objective(config, name)
    types = typing.get_type_hints(ObjectiveConfig)
    options: dict[str, Any] = {}
    for option in filter(None, text.split(",")):
        key, equals, value = option.partition("=")
        if key not in OBJECTIVES[name].options:
            known = sorted(OBJECTIVES[name].options)
            raise UsageError(f"--methods {label}: {name} has no option {key!r}: "
                             f"{nearest(key, known)}")  # fmt: skip
        if not equals:
            raise UsageError(f"--methods {label}: {key!r} needs a value, as in {key}=1")
        try:
            options[key] = msgspec.convert(value, types[key], strict=False)
        except msgspec.ValidationError as error:
            raise UsageError(f"--methods {label}: {key}: {error}") from error
    return resolve_options(dataclasses.replace(config, **options))


def plan_runs(
    recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], folder: Path
) -> list[PlannedRun]:
    """Every run, seed by seed, so that a comparison that is stopped is an even one; runs that only
    make teachers are among them.

    Raises:
        UsageError: a method, option or value that does not fit.
        RunError: a folder holds a run that was made otherwise.
    """
    from bdkd.runs.folder import RunFolder

    objectives = {method: parse_method(method, recipe) for method in methods}
    frozen = {method: frozen_networks(recipe, own) for method, own in objectives.items()}
    teachers = {
        method: tuple(name for name in names if not _has_weights(recipe.networks[name]))
        for method, names in frozen.items()
    }
    if any(teachers.values()) and TEACHERS not in methods:
        objectives = {TEACHERS: parse_method(TEACHERS, recipe), **objectives}
        frozen[TEACHERS], teachers[TEACHERS] = frozenset(), ()
    runs = []
    for seed in seeds:
        for method, objective in objectives.items():
            resolved = dataclasses.replace(
                recipe, objective=objective, seed=seed,
                run_dir=str(folder / run_name(method, seed)),
            )  # fmt: skip
            check_recipe(resolved)
            runs.append(PlannedRun(method, seed, resolved, frozen[method], teachers[method]))
    for planned in runs:
        if (stored := RunFolder(planned.path)).config.exists():
            weights = {f"networks.{name}.weights" for name in planned.teachers}
            changed = set(differing_keys(stored.read_config(), planned.recipe))
            if changed := changed - weights - {"run_dir"}:
                raise RunError(
                    f"{planned.path} holds a run with other {', '.join(sorted(changed))}: choose "
                    "another --folder, or remove it"
                )
    return runs


def frozen_networks(recipe: Recipe, objective: ObjectiveConfig) -> frozenset[str]:
    """Networks that the method does not train.

    Raises:
        UsageError: the networks do not suit the method.
    """
    from bdkd.objectives import create_objective

    filled = {
        name: dataclasses.replace(network, weights=network.weights or "to be trained")
        for name, network in recipe.networks.items()
    }
    return create_objective(objective, filled).frozen


def _has_weights(network: NetworkConfig) -> bool:
    return bool(network.frozen or network.weights or network.options.get("pretrained"))


def room_for(recipe: Recipe) -> int:
    """Runs at a time that do not get into each other's way."""
    import torch

    if recipe.device.startswith("cuda") or (recipe.device == "auto" and torch.cuda.is_available()):
        return 1
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // (recipe.threads or torch.get_num_threads()))


def read_summary(run: PlannedRun) -> dict[str, Any]:
    """``RunError`` names a ``summary.json`` that is none."""
    path = run.path / "summary.json"
    try:
        summary = json.loads(path.read_text("utf-8"))
        if summary["networks"].keys() and summary["wall_seconds"] >= 0:
            return summary
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot read {path}: remove it, and the same command writes it anew"
                       ) from error  # fmt: skip
    raise RunError(f"{path} holds no networks: remove it, and the same command writes it anew")
