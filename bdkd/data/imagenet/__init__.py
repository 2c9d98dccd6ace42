"""ImageNet from folders, webdataset shards or TFRecords, decoded by DALI or by Pillow.

``source`` implements the data source and requests batches from a loader (``dali`` or ``pillow``).
``index`` holds the position of each image's bytes; ``crops`` and ``counter_rng`` define its crop.
"""

import os
import sys
from functools import partial
from importlib.util import find_spec

import numpy as np

from bdkd.data.base import SourceContext, Split, register_source
from bdkd.data.fetch import required_root
from bdkd.data.imagenet.dali import Dali
from bdkd.data.imagenet.index import Index, read_exclusions, spellings
from bdkd.data.imagenet.layout import find
from bdkd.data.imagenet.loader import processors
from bdkd.data.imagenet.options import ImageNetConfig
from bdkd.data.imagenet.pillow import Pillow
from bdkd.data.imagenet.source import ImageNet
from bdkd.data.splits import split_training
from bdkd.errors import RunError, UsageError
from bdkd.text import expand_user, unicode_hint

SHOWN = 3  # lines of data.exclude in a message


@register_source("imagenet", ImageNetConfig)
def load(config: ImageNetConfig, context: SourceContext) -> ImageNet:
    """Load the data set at ``data.root`` in ``data.format``. ``val`` is the test split.

    Raises:
        UsageError: ``data.root`` is not set, or ``data.exclude`` matches no image.
        RunError: the data set is missing or incomplete.
    """
    root = required_root(config)
    found = find(root, config.format)
    found.require_images()
    training, test = found.train, found.val
    if config.exclude is not None:
        training, test = _without_excluded(config.exclude, training, test)
        found._replace(train=training).require_images()
    if not len(test):
        raise RunError(f"{root / 'val'} holds no images: the test split needs some; fetch it again")

    kind = config.loader
    if kind == "auto":  # other packages also install a module "nvidia"
        kind = "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "pillow"
    workers = processors() if config.workers is None else config.workers
    make_loader = partial(Dali if kind == "dali" else Pillow, workers)
    inner, labels, validation = split_training(training.labels, config)
    train = training.take(inner, labels.numpy())
    splits: dict[Split, Index] = {"train": train, "val": training.take(validation), "test": test}
    return ImageNet(
        splits, found.classes, config, context, make_loader,
        digests={"train": training.digest(found.classes), "test": test.digest(found.classes)},
    )  # fmt: skip


def _without_excluded(listed: str, training: Index, test: Index) -> tuple[Index, Index]:
    """Remove the images that a list names, and print how many lines match no image."""
    lines = read_exclusions(expand_user(listed, "data.exclude"))
    wanted = {spelling for line in lines for spelling in spellings(line)}
    if not wanted:
        return training, test
    remaining, matched = [], set()
    for index in (training, test):
        excluded = index.find(wanted)
        matched |= {index.identity(i) for i in np.flatnonzero(excluded).tolist()}
        remaining.append(index.take(np.flatnonzero(~excluded)))
    unknown = [line for line in lines if matched.isdisjoint(spellings(line))]
    odd = any(not line.isascii() for line in unknown)
    names = (index.identity(i) for index in (training, test) for i in range(len(index)))
    hint = unicode_hint(unknown, names) if odd else ""
    if not matched:
        raise UsageError(
            f"data.exclude, {listed}, names no image of {training.root}: pass the list that "
            f"bdkd data check wrote for this data set{hint}"
        )
    if unknown and os.environ.get("RANK", "0") == "0":
        print(
            f"bdkd: {len(unknown):,} of {len(lines):,} lines of data.exclude, {listed}, name no "
            f"image of {training.root}: {', '.join(line[:200] for line in unknown[:SHOWN])}"
            + (" ..." if len(unknown) > SHOWN else "")
            + hint,
            file=sys.stderr,
        )
    return remaining[0], remaining[1]
