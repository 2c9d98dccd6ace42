"""Data sources by name."""

import torch

from bdkd.config import DataConfig, nearest
from bdkd.data import cifar, digits, folder, synthetic, tiny_imagenet
from bdkd.data.base import WHOLE, Batch, DataInfo, DataSource, Shard, Split
from bdkd.errors import UsageError

__all__ = ["WHOLE", "Batch", "DataInfo", "DataSource", "Shard", "Split", "create_source"]

SOURCES = {
    "digits": digits.load,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "tiny-imagenet": tiny_imagenet.load,
    "folder": folder.load,
    "synthetic": synthetic.load,
}


def create_source(
    config: DataConfig, seed: int, device: torch.device, memory_format: torch.memory_format
) -> DataSource:
    """The data source that the configuration names.

    Raises:
        UsageError: no such source, or it lacks an option.
        RunError: its data is missing or cannot be read.
    """
    if config.source not in SOURCES:
        raise UsageError(
            f"unknown data source {config.source!r}: {nearest(config.source, list(SOURCES))}"
        )
    return SOURCES[config.source](config, seed, device, memory_format)
