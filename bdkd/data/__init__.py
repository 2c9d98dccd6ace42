"""Data sources by name."""

from collections.abc import Callable

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec", "numpy", "tomli-w", "tqdm")):
    raise ImportError(message)

import torch

from bdkd.config import DataConfig, nearest
from bdkd.data import cifar, digits, folder, imagenet, synthetic, tiny_imagenet
from bdkd.data.base import WHOLE, Batch, DataInfo, DataSource, Shard, Split
from bdkd.errors import UsageError

__all__ = ["WHOLE", "Batch", "DataInfo", "DataSource", "Shard", "Split", "create_source"]

SOURCES: dict[str, Callable[..., DataSource]] = {
    "digits": digits.load, "cifar10": cifar.load, "cifar100": cifar.load,
    "tiny-imagenet": tiny_imagenet.load, "folder": folder.load, "imagenet": imagenet.load,
    "synthetic": synthetic.load,
}  # fmt: skip

# Options of the source imagenet only.
IMAGENET_OPTIONS = (
    "format", "loader", "workers", "exclude", "smallest_crop", "progressive", "rand_augment",
    "erasing", "mixup", "cutmix",
)  # fmt: skip


def create_source(
    config: DataConfig, seed: int, device: torch.device, memory_format: torch.memory_format,
    dtype: torch.dtype = torch.float32,
) -> DataSource:  # fmt: skip
    """Create the data source that the configuration names.

    Args:
        dtype: of ImageNet's training images. All other images are float32.

    Raises:
        UsageError: the source is unknown, a required option is missing, or an option does not
            apply.
        RunError: the data is missing or cannot be read.
    """
    if config.source not in SOURCES:
        raise UsageError(
            f"unknown data source {config.source!r}: {nearest(config.source, list(SOURCES))}"
        )
    if config.source == "imagenet":
        return imagenet.load(config, seed, device, memory_format, dtype)
    for key in IMAGENET_OPTIONS:
        if getattr(config, key) != getattr(DataConfig(), key):
            raise UsageError(
                f"data.{key} is an option of the source imagenet, got {getattr(config, key)}: "
                f"remove it for the source {config.source!r}"
            )
    return SOURCES[config.source](config, seed, device, memory_format)
