"""The training objectives by name."""

from collections.abc import Mapping

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.objectives import (  # noqa: F401
    bdkd,
    dkd,
    dml,
    independent,
    kd,
    kdcl,
    lskd,
    switokd,
)
from bdkd.objectives.base import Objective, ObjectiveOutput, register_objective
from bdkd.objectives.check import check_objective
from bdkd.registry import OBJECTIVES

__all__ = [
    "Objective",
    "ObjectiveOutput",
    "check_objective",
    "create_objective",
    "register_objective",
]


def create_objective(config: ObjectiveConfig, networks: Mapping[str, NetworkConfig]) -> Objective:
    """Create the objective that a configuration names.

    Args:
        networks: the networks of the recipe, by name.

    Raises:
        UsageError: the objective does not exist, or it does not support these networks.
    """
    return OBJECTIVES.find(config.name).build(config, networks)
