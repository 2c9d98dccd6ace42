"""A user's own images, decoded batch by batch like those of the source ``imagenet``.

``formats`` detects what ``data.root`` holds, ``hub`` opens Hugging Face data sets, and ``rows``
finds the bytes of each image in their Arrow files.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdkd.data.base import SourceContext, register_source
from bdkd.data.decode import require_pillow
from bdkd.data.folder_splits import missing_images
from bdkd.data.imagenet.assemble import decoded_source, without_excluded
from bdkd.data.imagenet.options import DecodedImagesConfig
from bdkd.data.imagenet.source import ImageNet
from bdkd.data.images.formats import detect_format, find_images
from bdkd.data.images.hub import missing_datasets
from bdkd.data.own_splits import OwnSplitsConfig, typical_side
from bdkd.errors import RunError, UsageError


@dataclass(frozen=True)
class OwnImagesConfig(DecodedImagesConfig, OwnSplitsConfig):
    """Options of the source images."""

    format: Literal["auto", "folder", "webdataset", "tfrecord", "hf"] = "auto"
    """Format of the data set. folder: image files in CLASS or train/CLASS. webdataset: tar shards.
    tfrecord: TFRecords. hf: a Hugging Face data set or Parquet files. auto: detect it from
    data.root."""
    image_column: str | None = None
    """Column of the images, if the format is hf. Default: the only column with images."""
    label_column: str | None = None
    """Column of the labels, if the format is hf. Default: the only column of the type ClassLabel,
    or else a column with a name such as label or class."""


def _missing(root: Path) -> str:
    try:
        format = detect_format(root)
    except RunError:  # there is no such folder
        format = "folder"
    if format == "hf":
        return missing_datasets()
    return missing_images(root) if format == "folder" else ""


@register_source(
    "images", OwnImagesConfig, needs_root=True, missing=_missing,
    reads="your images in <class>/* or train/<class>/*, tar shards or TFRecords",
)  # fmt: skip
def load(config: OwnImagesConfig, context: SourceContext) -> ImageNet:
    """Load the data set at ``data.root``: a folder, Parquet files, or ``hf:NAME``.

    Raises:
        UsageError: ``data.root`` is not set, or an option does not apply.
        RunError: the data set is missing, cannot be read, or holds too few images.
    """
    if not config.root:
        raise UsageError(
            "data.root must name the data set 'images': a folder of images, a .parquet file, or "
            "hf:NAME for a Hugging Face data set"
        )
    require_pillow()
    found = find_images(config.root, config.format, config.image_column, config.label_column)
    splits = found.splits(config)
    if config.exclude is not None:
        splits = without_excluded(config.exclude, splits)
    found.check(splits, config)
    side = config.image_size or typical_side(splits.train)
    return decoded_source(splits, dataclasses.replace(config, image_size=side), context)
