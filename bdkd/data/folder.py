"""Images in folders, ``ROOT/train/<class>/*`` and ``ROOT/test/<class>/*`` (or ``val``).

All images are resized to one size and kept in memory.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bdkd.data.base import SourceContext, register_source
from bdkd.data.decode import read_images
from bdkd.data.digest import Digest, digest_names
from bdkd.data.fetch import required_root
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.data.listing import IMAGE_SUFFIXES, class_folders, image_files
from bdkd.data.splits import in_memory_source
from bdkd.errors import RunError
from bdkd.text import unicode_hint, unicode_hint_of_path


@register_source("folder", InMemoryConfig)
def load(config: InMemoryConfig, context: SourceContext) -> InMemory:
    """Load every image as RGB, resized to ``data.image_size`` (by default 32).

    Raises:
        UsageError: ``data.root`` is not set, or an option does not apply.
        RunError: a folder is missing or holds too few images, or the classes of both folders
            differ.
    """
    root = required_root(config)
    size = config.image_size or 32
    train, held_out = _folder(root, "train"), _folder(root, "test", "val")
    classes = _classes(train)
    if unlike := set(classes).symmetric_difference(_classes(held_out)):
        hint = unicode_hint(unlike, unlike)
        raise RunError(f"{train} and {held_out} must hold the same classes: {sorted(unlike)}{hint}")
    (training, train_digest), (test, test_digest) = (
        read_labelled(root, _labelled(folder, classes), classes, size)
        for folder in (train, held_out)
    )
    return in_memory_source(
        training, test, classes, config, context,
        digests={"train": train_digest, "test": test_digest},
    )  # fmt: skip


def read_labelled(
    root: Path, labelled: list[tuple[Path, int]], classes: Sequence[str], size: int
) -> tuple[Images, Digest]:
    """Read the images at (path, label), and return them with the digest of their names."""
    paths, labels = zip(*labelled, strict=True)
    images = Images(read_images(paths, size), torch.tensor(labels))
    names = [os.fsencode(path.relative_to(root)) for path in paths]
    container = np.zeros(len(names), np.int64)
    return images, digest_names(classes, images.labels.numpy(), [""], container, names)


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    if not root.is_dir():
        hint = unicode_hint_of_path(root)
        raise RunError(f"no data set at {root}: data.root must name an existing folder{hint}")
    expected = " or ".join(str(root / name) for name in names)
    raise RunError(f"no folder {expected}: images belong in {root / names[0]}/<class>/")


def _classes(folder: Path) -> tuple[str, ...]:
    classes = class_folders(folder)
    if len(classes) < 2:
        raise RunError(f"{folder} must hold a folder for each of at least 2 classes, got {classes}")
    return classes


def _labelled(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    labelled: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        found = image_files(folder / name)
        if len(found) < 2:
            raise RunError(
                f"the class folder {folder / name} holds {len(found)} images: it needs at least 2 "
                f"({', '.join(IMAGE_SUFFIXES)}), or remove it"
            )
        labelled += [(folder / name / file, label) for file in found]
    return labelled
