"""Build the source of images that are decoded batch by batch from the index of each split."""

from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from bdkd.data.base import SourceContext, Split
from bdkd.data.imagenet.dali import Dali
from bdkd.data.imagenet.index import Index, read_exclusions, spellings
from bdkd.data.imagenet.loader import processors
from bdkd.data.imagenet.options import DecodedImagesConfig
from bdkd.data.imagenet.pillow import Pillow
from bdkd.data.imagenet.source import ImageNet
from bdkd.data.notes import note
from bdkd.data.splits import split_training
from bdkd.errors import UsageError
from bdkd.text import expand_user, unicode_hint

SHOWN = 3  # lines of data.exclude in a message


class IndexedSplits(NamedTuple):
    """The images of a data set."""

    classes: tuple[str, ...]
    train: Index
    test: Index
    val: Index | None = None
    """The data set's own validation images. None: they are held out of ``train``."""

    @property
    def training(self) -> Index:
        """All images that are not test images: those of ``train``, followed by those of ``val``."""
        return self.train if self.val is None else self.train.join(self.val)


def decoded_source(
    splits: IndexedSplits, config: DecodedImagesConfig, context: SourceContext
) -> ImageNet:
    """Return the source of a data set, with ``data.train_images`` and ``data.label_noise`` applied.

    If the data set has no validation images, ``data.validation`` of ``train`` is held out.
    """
    kind = config.loader
    if kind == "auto":  # other packages also install a module "nvidia"
        kind = "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "pillow"
    workers = processors() if config.workers is None else config.workers
    make_loader = partial(Dali if kind == "dali" else Pillow, workers)
    classes, training, test = splits.classes, splits.training, splits.test
    own = None if splits.val is None else np.arange(len(splits.train), len(training))
    inner, labels, validation = split_training(training.labels, config, own)
    train = training.take(inner, labels.numpy())
    indices: dict[Split, Index] = {"train": train, "val": training.take(validation), "test": test}
    return ImageNet(
        indices, classes, config, context, make_loader,
        digests={"train": training.digest(classes), "test": test.digest(classes)},
    )  # fmt: skip


def without_excluded(listed: str, splits: IndexedSplits) -> IndexedSplits:
    """Remove the images that a list names, and print how many lines match no image.

    Raises:
        UsageError: the list matches no image.
    """
    lines = read_exclusions(expand_user(listed, "data.exclude"))
    wanted = {spelling for line in lines for spelling in spellings(line)}
    if not wanted:
        return splits
    indices = {split: index for split in ("train", "test", "val")
               if (index := getattr(splits, split)) is not None}  # fmt: skip
    root, matched = splits.train.root, set[str]()
    for split, index in indices.items():
        excluded = index.find(wanted)
        matched |= {index.identity(i) for i in np.flatnonzero(excluded).tolist()}
        splits = splits._replace(**{split: index.take(np.flatnonzero(~excluded))})
    unknown = [line for line in lines if matched.isdisjoint(spellings(line))]
    odd = any(not line.isascii() for line in unknown)
    names = (index.identity(i) for index in indices.values() for i in range(len(index)))
    hint = unicode_hint(unknown, names) if odd else ""
    if not matched:
        raise UsageError(
            f"data.exclude, {listed}, names no image of {root}: pass the list that bdkd data check "
            f"wrote for this data set{hint}"
        )
    if unknown:
        note(
            f"{len(unknown):,} of {len(lines):,} lines of data.exclude, {listed}, name no image of "
            f"{root}: {', '.join(line[:200] for line in unknown[:SHOWN])}"
            + (" ..." if len(unknown) > SHOWN else "")
            + hint
        )
    return splits
