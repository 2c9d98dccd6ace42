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
    "digits": digits.load,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "tiny-imagenet": tiny_imagenet.load,
    "folder": folder.load,
    "imagenet": imagenet.load,
    "synthetic": synthetic.load,
}


# What only images too large for the memory have.
IMAGENET_ALONE = (
    "format", "loader", "workers", "exclude", "smallest_crop", "progressive", "rand_augment",
    "erasing", "mixup", "cutmix",
)  # fmt: skip


def create_source(
    config: DataConfig,
    seed: int,
    device: torch.device,
    memory_format: torch.memory_format,
    dtype: torch.dtype = torch.float32,
) -> DataSource:
    """The data source that the configuration names.

    Args:
        dtype: of training images, from sources that decode on the way; otherwise, and in
            evaluation, they are float32.

    Raises:
        UsageError: no such source, it lacks an option, or has one that is not its own.
        RunError: its data is missing or cannot be read.
    """
    if config.source not in SOURCES:
        raise UsageError(
            f"unknown data source {config.source!r}: {nearest(config.source, list(SOURCES))}"
        )
    if config.source == "imagenet":
        return imagenet.load(config, seed, device, memory_format, dtype)
    for key in IMAGENET_ALONE:
        if getattr(config, key) != getattr(DataConfig(), key):
            raise UsageError(
                f"data.{key} is an option of the source imagenet and does not apply to the source "
                f"{config.source!r}: got {getattr(config, key)}"
            )
    return SOURCES[config.source](config, seed, device, memory_format)
