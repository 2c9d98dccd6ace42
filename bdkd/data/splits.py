"""From a set's own training and test images to ``train``, ``val`` and ``test``.

Nothing here depends on the run's seed: which images are held out, which few are kept for training,
which labels are wrong and what noise lies on the pixels belong to the data set. So runs of several
seeds and methods see the same images with the same labels, their differences can be paired, and
the deviation over seeds is that of training (weights, order, augmentation) alone.
"""

import numpy as np
import torch
from torch import Tensor

from bdkd.config import DataConfig
from bdkd.data.base import Split, stratified_split, stratified_subset
from bdkd.data.in_memory import Images
from bdkd.errors import UsageError

SPLIT_SEED = 0


def make_splits(
    config: DataConfig, training: Images, test: Images, largest_pixel: int
) -> dict[Split, Images]:
    """The three splits, as ``validation``, ``train_images``, ``label_noise`` and ``pixel_noise``
    ask. The labels of ``val`` and ``test`` are never changed.

    Raises:
        UsageError: ``data.train_images`` is more than there are, or too few for the classes.
    """
    labels = training.labels.numpy()
    inner, validation = stratified_split(labels, config.validation, SPLIT_SEED)
    classes = int(labels.max()) + 1
    if config.train_images is not None:
        if not classes <= config.train_images <= len(inner):
            raise UsageError(
                f"data.train_images must be between {classes} (the classes) and {len(inner)} (the "
                f"training images without data.validation), got {config.train_images}"
            )
        inner = inner[stratified_subset(labels[inner], config.train_images, SPLIT_SEED)]
    splits: dict[Split, Images] = {
        "train": Images(
            training.pixels[inner],
            with_label_noise(training.labels[inner], config.label_noise, classes),
        ),
        "val": Images(training.pixels[validation], training.labels[validation]),
        "test": test,
    }
    if not config.pixel_noise:
        return splits
    deviation = config.pixel_noise * largest_pixel
    return {
        split: Images(
            with_pixel_noise(images.pixels, deviation, largest_pixel, salt), images.labels
        )
        for salt, (split, images) in enumerate(splits.items())
    }


def with_label_noise(labels: Tensor, share: float, classes: int) -> Tensor:
    """Labels ``(N,)`` of which ``round(share * N)`` are another class, any with equal chance."""
    count = round(share * len(labels))
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    wrong = torch.randperm(len(labels), generator=generator)[:count]
    noisy = labels.clone()
    noisy[wrong] += torch.randint(1, classes, (count,), generator=generator)
    return noisy % classes


def with_pixel_noise(pixels: Tensor, deviation: float, largest: int, salt: int) -> Tensor:
    """Pixels ``(N, C, H, W)`` uint8 with Gaussian noise, rounded and cut to [0, ``largest``]."""
    rng = np.random.default_rng([SPLIT_SEED, salt])
    noisy = torch.empty_like(pixels)
    for place, part in zip(noisy.split(1000), pixels.split(1000), strict=True):  # float32 in parts
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        place.copy_((part + deviation * torch.from_numpy(noise)).round().clamp(0, largest))
    return noisy


def refuse_image_size(config: DataConfig, source: str, side: int) -> None:
    """Raise ``UsageError`` where ``data.image_size`` asks another size of a source that has one."""
    if config.image_size not in (None, side):
        raise UsageError(
            f"data.image_size does not apply to the source {source!r}: its images are "
            f"{side}x{side}, got {config.image_size}"
        )
