"""Recipes: their options, bounds and files."""

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec", "tomli-w")):
    raise ImportError(message)

from bdkd.bounds import (
    Bounds,
    Count,
    NotNegative,
    Positive,
    Rate,
    Share,
    Side,
)
from bdkd.config.load import (
    differing_keys,
    load_recipe,
    parse_recipe,
    recipe_text,
    refuse_foreign,
    replace_unchecked,
    select,
    select_unchecked,
    shipped_recipes,
    to_toml,
)
from bdkd.config.options import (
    PRETRAINED,
    RANDOM,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Options,
    Recipe,
    ScheduleConfig,
    TrainConfig,
)
from bdkd.registry import nearest

__all__ = [
    "PRETRAINED", "RANDOM", "Bounds", "CheckpointConfig", "Count", "DataConfig",
    "DistributedConfig", "NetworkConfig", "NotNegative", "ObjectiveConfig", "OptimizerConfig",
    "Options", "Positive", "Rate", "Recipe", "ScheduleConfig", "Share", "Side", "TrainConfig",
    "differing_keys", "load_recipe", "nearest", "parse_recipe", "recipe_text", "refuse_foreign",
    "replace_unchecked", "select", "select_unchecked", "shipped_recipes", "to_toml",
]  # fmt: skip
