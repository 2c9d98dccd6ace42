"""Data sources by name."""

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec", "numpy", "tomli-w", "tqdm")):
    raise ImportError(message)

import torch

from bdkd.config import DataConfig
from bdkd.data import (  # noqa: F401
    cifar,
    digits,
    fashion_mnist,
    folder,
    glyphs,
    imagenet,
    images,
    synthetic,
    tiny_imagenet,
)
from bdkd.data.base import (
    WHOLE,
    Batch,
    DataInfo,
    DataSource,
    Shard,
    SourceContext,
    Split,
    register_source,
)
from bdkd.data.data_option import data_options
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.data.splits import in_memory_source
from bdkd.errors import UsageError
from bdkd.registry import SOURCES

__all__ = [
    "WHOLE", "Batch", "DataInfo", "DataSource", "Images", "InMemory", "InMemoryConfig", "Shard",
    "SourceContext", "Split", "create_source", "data_options", "in_memory_source",
    "register_source",
]  # fmt: skip


def create_source(
    config: DataConfig, seed: int, device: torch.device, memory_format: torch.memory_format,
    dtype: torch.dtype = torch.float32,
) -> DataSource:  # fmt: skip
    """Create the data source that the configuration names. The arguments are those of
    :class:`SourceContext`.

    Raises:
        UsageError: the source is unknown, a required option is missing, or an option does not
            apply.
        RunError: the data is missing or cannot be read.
    """
    context = SourceContext(seed, device, memory_format, dtype)
    source = SOURCES.find(config.source).build(config, context)
    if not isinstance(getattr(source, "info", None), DataInfo):
        raise UsageError(
            f"the data source {config.source!r} must return a DataSource, whose info is a "
            f"DataInfo, got {type(source).__name__}"
        )
    return source
