"""A folder of images, in the layouts of the source ``images``, resized to one size and kept in
memory."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bdkd.data.base import SourceContext, register_source
from bdkd.data.decode import read_images, require_pillow
from bdkd.data.digest import Digest, digest_names
from bdkd.data.fetch import required_root
from bdkd.data.folder_splits import find_folders, missing_images
from bdkd.data.imagenet.index import Index
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.data.own_splits import OwnSplitsConfig, typical_side
from bdkd.data.splits import in_memory_source


@dataclass(frozen=True)
class FolderConfig(InMemoryConfig, OwnSplitsConfig):
    """Options of the source folder."""


@register_source(
    "folder", FolderConfig, needs_root=True, missing=missing_images,
    reads="your images in <class>/* or train/<class>/*, kept in memory",
)  # fmt: skip
def load(config: FolderConfig, context: SourceContext) -> InMemory:
    """Load every image as RGB, resized to ``data.image_size``.

    Raises:
        UsageError: ``data.root`` is not set, or an option does not apply.
        RunError: a folder is missing or holds too few images, or its layout is not supported.
    """
    root = required_root(config)
    require_pillow()
    found = find_folders(root)
    splits = found.splits(config)
    found.check(splits, config)
    side = config.image_size or typical_side(splits.train)
    (training, train_digest), (test, test_digest) = (
        read_labelled(root, _labelled(index), splits.classes, side)
        for index in (splits.training, splits.test)
    )
    own = None if splits.val is None else np.arange(len(splits.train), len(training.labels))
    return in_memory_source(
        training, test, splits.classes, dataclasses.replace(config, image_size=side), context,
        digests={"train": train_digest, "test": test_digest}, own_validation=own,
    )  # fmt: skip


def _labelled(index: Index) -> list[tuple[Path, int]]:
    labels = index.labels.tolist()
    return [(Path(index.item(i).path), label) for i, label in enumerate(labels)]


def read_labelled(
    root: Path, labelled: list[tuple[Path, int]], classes: Sequence[str], size: int
) -> tuple[Images, Digest]:
    """Read the images at (path, label), and return them with the digest of their names."""
    paths, labels = zip(*labelled, strict=True)
    images = Images(read_images(paths, size), torch.tensor(labels))
    names = [os.fsencode(path.relative_to(root)) for path in paths]
    container = np.zeros(len(names), np.int64)
    return images, digest_names(classes, images.labels.numpy(), [""], container, names)
