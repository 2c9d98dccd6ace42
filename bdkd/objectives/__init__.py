"""The training methods by name."""

import dataclasses
from collections.abc import Mapping

from bdkd.config import NetworkConfig, ObjectiveConfig, nearest
from bdkd.errors import UsageError
from bdkd.objectives.base import Objective, ObjectiveOutput
from bdkd.objectives.bdkd import BDKD
from bdkd.objectives.dml import DML
from bdkd.objectives.independent import Independent
from bdkd.objectives.kd import KD
from bdkd.objectives.kdcl import KDCL
from bdkd.objectives.switokd import SwitOKD

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveOutput",
    "create_objective",
    "resolve_options",
    "switch_method",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "bdkd": BDKD,
    "dml": DML,
    "independent": Independent,
    "kd": KD,
    "kdcl": KDCL,
    "switokd": SwitOKD,
}


def resolve_options(config: ObjectiveConfig) -> ObjectiveConfig:
    """The configuration with the method's own default for every option that was left open.

    Raises:
        UsageError: no such method, or an option that it does not read.
    """
    if config.name not in OBJECTIVES:
        raise UsageError(
            f"unknown method {config.name!r}: {nearest(config.name, list(OBJECTIVES))}"
        )
    options = OBJECTIVES[config.name].options
    resolved = {}
    for option in dataclasses.fields(ObjectiveConfig):
        given = getattr(config, option.name)
        if option.name == "name" or (given is None and option.name not in options):
            continue
        if option.name not in options:
            raise UsageError(
                f"objective.{option.name} is not an option of the method {config.name!r}: "
                f"leave it out (it reads {', '.join(sorted(options))})"
            )
        resolved[option.name] = options[option.name] if given is None else given
    return dataclasses.replace(config, **resolved)  # type: ignore[arg-type]


def switch_method(config: ObjectiveConfig, name: str) -> ObjectiveConfig:
    """Where another method than a recipe's begins: from its own defaults, and from what the recipe
    says of all methods alike (the labels, and the code that computes)."""
    options = OBJECTIVES[name].options if name in OBJECTIVES else ()
    shared = {key: getattr(config, key) for key in ("label_smoothing", "backend") if key in options}
    return ObjectiveConfig(name, **shared)


def create_objective(config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> Objective:
    """The method that the configuration names.

    Raises:
        UsageError: no such method, networks that do not suit it, or an option it does not read.
    """
    config = resolve_options(config)
    return OBJECTIVES[config.name](config, networks)
