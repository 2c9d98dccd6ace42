"""ImageNet from folders, webdataset shards or TFRecords, decoded by DALI or by Pillow.

``source`` is what the trainer sees. It asks a loader (``dali``, ``pillow``) for batches; ``index``
tells where an image's bytes are, ``windows`` and ``draws`` which part of it is cut.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from bdkd.config import DataConfig
from bdkd.data.base import Split, stratified_split, stratified_subset
from bdkd.data.fetch import required_root
from bdkd.data.imagenet.dali import Dali
from bdkd.data.imagenet.index import Index, read_exclusions, spellings
from bdkd.data.imagenet.layout import find
from bdkd.data.imagenet.loader import processors
from bdkd.data.imagenet.pillow import Pillow
from bdkd.data.imagenet.source import ImageNet
from bdkd.data.splits import SPLIT_SEED, with_label_noise
from bdkd.errors import RunError, UsageError

NAMED = 3  # lines of data.exclude that a message shows
ELSEWHERE = {"crop": 0, "crop_padding": "zero", "cutout": 0, "pixel_noise": 0.0}


def load(
    config: DataConfig,
    seed: int,
    device: torch.device,
    memory_format: torch.memory_format,
    dtype: torch.dtype = torch.float32,
) -> ImageNet:
    """Load the data set at ``data.root`` in ``data.format``. ``val`` is the test split.

    Raises:
        UsageError: an option does not apply to this source, or ``data.exclude`` names no image.
        RunError: the data set is missing or incomplete.
    """
    for key, off in ELSEWHERE.items():
        if getattr(config, key) != off:
            raise UsageError(
                f"data.{key} does not apply to the source 'imagenet', which cuts as "
                f"data.smallest_crop has it and erases as data.erasing: got {getattr(config, key)}"
            )
    root = required_root(config, "imagenet")
    found = find(root, config.format)
    found.require_images()
    training, test = found.train, found.val
    if config.exclude is not None:
        training, test = _without_excluded(config.exclude, training, test)
        found._replace(train=training).require_images()
    if not len(test):
        raise RunError(f"{root / 'val'} holds no images: the test split needs some")

    def make_loader(
        device: torch.device, dtype: torch.dtype, mean: torch.Tensor, std: torch.Tensor
    ) -> Dali | Pillow:
        workers = processors() if config.workers is None else config.workers
        kind = config.loader
        if kind == "auto":
            # Another package's "nvidia" may be there without this one.
            there = find_spec("nvidia") and find_spec("nvidia.dali")
            kind = "dali" if there else "pillow"
        make = Dali if kind == "dali" else Pillow
        return make(workers, device, dtype, mean, std)

    return ImageNet(
        _splits(config, training, test), found.classes, config, make_loader,
        seed=seed, device=device, memory_format=memory_format, dtype=dtype,
        digests={"train": training.digest(found.classes), "test": test.digest(found.classes)},
    )  # fmt: skip


def _without_excluded(listed: str, training: Index, test: Index) -> tuple[Index, Index]:
    """Leave out the images that a list names. Lines that name no image are told on standard error.

    Raises:
        UsageError: no line names an image.
    """
    lines = read_exclusions(Path(listed).expanduser())
    wanted = {spelling for line in lines for spelling in spellings(line)}
    if not wanted:
        return training, test
    left, matched = [], set()
    for index in (training, test):
        excluded = index.find(wanted)
        matched |= {index.identity(i) for i in np.flatnonzero(excluded).tolist()}
        left.append(index.take(np.flatnonzero(~excluded)))
    if not matched:
        raise UsageError(
            f"data.exclude, {listed}, names no image of {training.root}: it needs the lines that "
            "bdkd data check wrote for this data set"
        )
    unknown = [line for line in lines if matched.isdisjoint(spellings(line))]
    if unknown and os.environ.get("RANK", "0") == "0":
        print(
            f"bdkd: {len(unknown):,} of {len(lines):,} lines of data.exclude, {listed}, name no "
            f"image of {training.root}: {', '.join(unknown[:NAMED])}"
            + (" ..." if len(unknown) > NAMED else ""),
            file=sys.stderr,
        )
    return left[0], left[1]


def _splits(config: DataConfig, training: Index, test: Index) -> dict[Split, Index]:
    """As ``bdkd.data.splits`` has them for sets in memory."""
    inner, validation = stratified_split(training.labels, config.validation, SPLIT_SEED)
    classes = int(training.labels.max()) + 1
    if config.train_images is not None:
        if not classes <= config.train_images <= len(inner):
            raise UsageError(
                f"data.train_images must be between {classes} (the classes) and {len(inner)} (the "
                f"training images without data.validation), got {config.train_images}"
            )
        inner = inner[stratified_subset(training.labels[inner], config.train_images, SPLIT_SEED)]
    labels = with_label_noise(torch.from_numpy(training.labels[inner]), config.label_noise, classes)
    return {
        "train": training.take(inner, np.asarray(labels)),
        "val": training.take(validation),
        "test": test,
    }
