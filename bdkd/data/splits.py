"""Divide a data set's training and test images into ``train``, ``val`` and ``test``.

Nothing here depends on the run's seed: the held-out images, the training subset, the wrong labels
and the pixel noise belong to the data set. Runs with different seeds and objectives therefore see
the same images with the same labels, so their differences can be paired, and the deviation over
seeds is that of training (weights, order, augmentation) alone.
"""

import numpy as np
import torch
from torch import Tensor

from bdkd.config import DataConfig
from bdkd.data.base import Split, stratified_split, stratified_subset
from bdkd.data.in_memory import Images
from bdkd.errors import UsageError

SPLIT_SEED = 0


def split_training(labels: np.ndarray, config: DataConfig) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Return the indices and labels (with label noise) of ``train``, and the indices of ``val``.

    Args:
        labels: ``(N,)`` int64, of all training images.

    Raises:
        UsageError: ``data.train_images`` is more than there are, or fewer than the classes.
    """
    inner, validation = stratified_split(labels, config.validation, SPLIT_SEED)
    classes = int(labels.max()) + 1
    if config.train_images is not None:
        if not classes <= config.train_images <= len(inner):
            raise UsageError(
                f"data.train_images must be between {classes} (the classes) and {len(inner)} (the "
                f"training images without data.validation), got {config.train_images}"
            )
        inner = inner[stratified_subset(labels[inner], config.train_images, SPLIT_SEED)]
    noisy = with_label_noise(torch.from_numpy(labels[inner]), config.label_noise, classes)
    return inner, noisy, validation


def make_splits(
    config: DataConfig, training: Images, test: Images, largest_pixel: int
) -> dict[Split, Images]:
    """Return the three splits of a data set in memory.

    ``data.validation``, ``train_images``, ``label_noise`` and ``pixel_noise`` are applied. The
    labels of ``val`` and ``test`` are never changed.

    Raises:
        UsageError: ``data.train_images`` is more than there are, or fewer than the classes.
    """
    inner, labels, validation = split_training(training.labels.numpy(), config)
    splits: dict[Split, Images] = {
        "train": Images(training.pixels[inner], labels),
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
    """Replace ``round(share * N)`` of the labels ``(N,)`` by other classes, uniformly at random."""
    count = round(share * len(labels))
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    wrong = torch.randperm(len(labels), generator=generator)[:count]
    noisy = labels.clone()
    noisy[wrong] += torch.randint(1, classes, (count,), generator=generator)
    return noisy % classes


def with_pixel_noise(pixels: Tensor, deviation: float, largest: int, salt: int) -> Tensor:
    """Add Gaussian noise to pixels ``(N, C, H, W)`` uint8, clipped to [0, ``largest``]."""
    rng = np.random.default_rng([SPLIT_SEED, salt])
    noisy = torch.empty_like(pixels)
    for place, part in zip(noisy.split(1000), pixels.split(1000), strict=True):  # float32 in parts
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        place.copy_((part + deviation * torch.from_numpy(noise)).round().clamp(0, largest))
    return noisy


def refuse_image_size(config: DataConfig, source: str, side: int) -> None:
    """Raise ``UsageError`` if ``data.image_size`` differs from the fixed size of a source."""
    if config.image_size not in (None, side):
        raise UsageError(
            f"data.image_size does not apply to the source {source!r}: its images are "
            f"{side}x{side}, got {config.image_size}"
        )
