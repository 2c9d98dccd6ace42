"""Recipes: their options, bounds and files."""

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec", "tomli-w")):
    raise ImportError(message)

from bdkd.config.check import check_recipe
from bdkd.config.load import (
    differing_keys,
    load_recipe,
    nearest,
    parse_recipe,
    shipped_recipes,
    to_toml,
)
from bdkd.config.options import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SyntheticConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig", "DataConfig", "DistributedConfig", "NetworkConfig",
    "ObjectiveConfig", "OptimizerConfig", "Recipe", "ScheduleConfig", "SyntheticConfig",
    "TrainConfig", "check_recipe", "differing_keys", "load_recipe", "nearest", "parse_recipe",
    "shipped_recipes", "to_toml",
]  # fmt: skip
