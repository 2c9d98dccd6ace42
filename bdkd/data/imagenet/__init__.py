"""ImageNet from folders, webdataset shards or TFRecords, decoded by DALI or by Pillow.

``source`` implements the data source and requests batches from a loader (``dali`` or ``pillow``).
``assemble`` builds it from the index of each split, also for the source ``images``. ``index`` holds
the position of each image's bytes; ``crops`` and ``counter_rng`` define its crop.
"""

from pathlib import Path

from bdkd.data.base import SourceContext, register_source
from bdkd.data.fetch import required_root
from bdkd.data.imagenet.assemble import IndexedSplits, decoded_source, without_excluded
from bdkd.data.imagenet.layout import find
from bdkd.data.imagenet.options import ImageNetConfig
from bdkd.data.imagenet.source import ImageNet
from bdkd.errors import RunError


def _missing(root: Path) -> str:
    found = any((root / name).is_dir() for name in ("train", "val"))
    return "" if found else f"no train and val in {root}: pass the folder of ImageNet"


@register_source(
    "imagenet", ImageNetConfig, needs_root=True, missing=_missing,
    reads="ImageNet: train/<wnid> and val/<wnid>, tar shards or TFRecords",
)  # fmt: skip
def load(config: ImageNetConfig, context: SourceContext) -> ImageNet:
    """Load the data set at ``data.root`` in ``data.format``. ``val`` is the test split.

    Raises:
        UsageError: ``data.root`` is not set, or ``data.exclude`` matches no image.
        RunError: the data set is missing or incomplete.
    """
    root = required_root(config)
    found = find(root, config.format)
    found.require_images()
    splits = IndexedSplits(found.classes, found.train, found.val)
    if config.exclude is not None:
        splits = without_excluded(config.exclude, splits)
        found._replace(train=splits.train).require_images()
    if not len(splits.test):
        raise RunError(f"{root / 'val'} holds no images: the test split needs some; fetch it again")
    return decoded_source(splits, config, context)
