"""The training methods by name."""

from collections.abc import Mapping
from dataclasses import fields

from bdkd.config import NetworkConfig, ObjectiveConfig, nearest
from bdkd.errors import UsageError
from bdkd.objectives.base import Objective, ObjectiveOutput
from bdkd.objectives.bdkd import BDKD
from bdkd.objectives.independent import Independent

__all__ = ["Objective", "ObjectiveOutput", "create_objective"]

OBJECTIVES: dict[str, type[BDKD] | type[Independent]] = {
    "bdkd": BDKD,
    "independent": Independent,
}


def create_objective(config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> Objective:
    """The method that the configuration names.

    Raises:
        UsageError: no such method, networks that do not suit it, or an option it does not read.
    """
    if config.name not in OBJECTIVES:
        raise UsageError(
            f"unknown method {config.name!r}: {nearest(config.name, list(OBJECTIVES))}"
        )
    kind = OBJECTIVES[config.name]
    default = ObjectiveConfig()
    for option in fields(ObjectiveConfig):
        changed = getattr(config, option.name) != getattr(default, option.name)
        if changed and option.name not in kind.options | {"name"}:
            raise UsageError(
                f"objective.{option.name} is not an option of the method {config.name!r}: "
                f"leave it out (it reads {', '.join(sorted(kind.options))})"
            )
    return kind(config, networks)
