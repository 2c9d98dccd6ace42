"""ImageNet from folders, webdataset shards or TFRecords, decoded by DALI or by Pillow.

``source`` is what the trainer sees. It asks a loader (``dali``, ``pillow``) for batches; ``index``
tells where an image's bytes are, ``windows`` and ``draws`` which part of it is cut.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from bdkd.config import DataConfig
from bdkd.data.base import Split, stratified_split, stratified_subset
from bdkd.data.fetch import required_root
from bdkd.data.imagenet.dali import Dali
from bdkd.data.imagenet.index import Index, read_exclusions
from bdkd.data.imagenet.layout import find
from bdkd.data.imagenet.loader import processors
from bdkd.data.imagenet.pillow import Pillow
from bdkd.data.imagenet.source import ImageNet
from bdkd.data.splits import SPLIT_SEED, with_label_noise
from bdkd.errors import RunError, UsageError

ELSEWHERE = {"crop": 0, "crop_padding": "zero", "cutout": 0, "pixel_noise": 0.0}


def load(
    config: DataConfig,
    seed: int,
    device: torch.device,
    memory_format: torch.memory_format,
    dtype: torch.dtype = torch.float32,
) -> ImageNet:
    """``data.root`` as ``data.format`` has it; ``val`` is the test split.

    Raises:
        UsageError: an option that does not apply here.
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
        raise RunError(f"{root / 'val'} holds no images: they are what is tested on")

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
    excluded = read_exclusions(Path(listed).expanduser())
    left = training.without(excluded), test.without(excluded)
    if excluded and len(left[0]) + len(left[1]) == len(training) + len(test):
        raise UsageError(
            f"data.exclude, {listed}, names no image of {training.root}: it needs the lines that "
            "bdkd data check wrote for this data set"
        )
    return left


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
