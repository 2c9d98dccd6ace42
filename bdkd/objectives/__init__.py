"""The training objectives by name."""

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
    "OBJECTIVES", "Objective", "ObjectiveOutput", "create_objective", "resolve_options",
    "switch_objective",
]  # fmt: skip

OBJECTIVES: dict[str, type[Objective]] = {
    "bdkd": BDKD, "dml": DML, "independent": Independent, "kd": KD, "kdcl": KDCL,
    "switokd": SwitOKD,
}  # fmt: skip


def resolve_options(config: ObjectiveConfig) -> ObjectiveConfig:
    """Return the configuration with the objective's default for every option that is None. Raise
    ``UsageError`` if the objective does not exist, or does not read an option that is set."""
    if config.name not in OBJECTIVES:
        hint = nearest(config.name, list(OBJECTIVES))
        raise UsageError(f"unknown objective {config.name!r}: {hint}")
    options = OBJECTIVES[config.name].options
    given = {key: value for key, value in vars(config).items() if value is not None}
    for key in given:
        if key not in options and key != "name":
            raise UsageError(
                f"objective.{key} is not an option of the objective {config.name!r}: leave it out "
                f"(it reads {', '.join(sorted(options))})"
            )
    return ObjectiveConfig(**{**options, **given})


def switch_objective(config: ObjectiveConfig, name: str) -> ObjectiveConfig:
    """Return another objective with its defaults. Only the options that have the same meaning for
    every objective keep their values: ``label_smoothing`` and ``backend``."""
    options = OBJECTIVES[name].options if name in OBJECTIVES else ()
    shared = {key: getattr(config, key) for key in ("label_smoothing", "backend") if key in options}
    return ObjectiveConfig(name, **shared)


def create_objective(config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> Objective:
    """Create the objective that a configuration names. Raise ``UsageError`` if the networks do not
    fit it, or for the reasons of :func:`resolve_options`."""
    config = resolve_options(config)
    return OBJECTIVES[config.name](config, networks)
