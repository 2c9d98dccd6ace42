"""Divide a data set's training and test images into ``train``, ``val`` and ``test``.

The held-out images, the training subset, the wrong labels and the pixel noise belong to the data
set: they do not depend on the seed of a run. Runs with different seeds and objectives therefore
train on the same images with the same labels. Their differences can be paired, and the deviation
over seeds comes from training alone (weights, order, augmentation).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bdkd.data.base import (
    ImagesConfig,
    SourceContext,
    Split,
    stratified_split,
    stratified_subset,
)
from bdkd.data.digest import Digests, digest_pixels
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.errors import UsageError

SPLIT_SEED = 0


def split_training(
    labels: np.ndarray, config: ImagesConfig, own_validation: np.ndarray | None = None
) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Return the indices and labels (with label noise) of ``train``, and the indices of ``val``.

    Args:
        labels: ``(N,)`` int64, of all training images.
        own_validation: ``(M,)`` indices of the data set's own validation images. None: hold out
            ``data.validation`` of each class.

    Raises:
        UsageError: ``data.train_images`` is larger than the number of training images, or smaller
            than the number of classes.
    """
    if own_validation is None:
        inner, validation = stratified_split(labels, config.validation, SPLIT_SEED)
    else:
        inner, validation = np.delete(np.arange(len(labels)), own_validation), own_validation
    classes = int(labels.max()) + 1
    if config.train_images is not None:
        if not classes <= config.train_images <= len(inner):
            raise UsageError(
                f"data.train_images must be between {classes} (one image per class) and "
                f"{len(inner)} (all images but those for validation), got {config.train_images}"
            )
        inner = inner[stratified_subset(labels[inner], config.train_images, SPLIT_SEED)]
    noisy = with_label_noise(torch.from_numpy(labels[inner]), config.label_noise, classes)
    return inner, noisy, validation


def make_splits(
    config: InMemoryConfig, training: Images, test: Images, largest_pixel: int = 255,
    own_validation: np.ndarray | None = None,
) -> dict[Split, Images]:  # fmt: skip
    """Return the three splits of a data set in memory.

    ``data.validation``, ``train_images``, ``label_noise`` and ``pixel_noise`` are applied. The
    labels of ``val`` and ``test`` are never changed.

    Raises:
        UsageError: ``data.train_images`` is larger than the number of training images, or smaller
            than the number of classes.
    """
    inner, labels, validation = split_training(training.labels.numpy(), config, own_validation)
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
    # In parts, because float32 takes four times the memory.
    for place, part in zip(noisy.split(1000), pixels.split(1000), strict=True):
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        place.copy_((part + deviation * torch.from_numpy(noise)).round().clamp(0, largest))
    return noisy


def in_memory_source(
    training: Images, test: Images, classes: Sequence[str], config: InMemoryConfig,
    context: SourceContext, *, largest_pixel: int = 255, digests: Digests | None = None,
    own_validation: np.ndarray | None = None,
) -> InMemory:  # fmt: skip
    """Return the source of a data set in memory, with all options of :class:`InMemoryConfig`.

    Args:
        training: training images, from which the validation images are held out.
        test: the test images.
        classes: names in the order of the labels.
        digests: digests of the data set. Default: those of its pixels and labels.
        own_validation: ``(M,)`` indices of validation images in ``training``. Default: hold out
            ``data.validation`` of each class.

    Raises:
        UsageError: ``data.image_size`` is not the size of the images; or pixels or labels do not
            have the types and shapes of :class:`Images`. See also :func:`split_training` and
            :class:`InMemory`.
    """
    for split, images in (("training", training), ("test", test)):
        if problem := _problem(images, len(classes)):
            raise UsageError(f"the {split} images of the source {config.source!r} {problem}")
    if training.pixels.shape[1:] != test.pixels.shape[1:]:
        shapes = " and ".join(str(tuple(images.pixels.shape[1:])) for images in (training, test))
        raise UsageError(
            f"the training and test images of the source {config.source!r} must have one shape "
            f"(C, H, W), got {shapes}"
        )
    height, width = training.pixels.shape[2:]
    if config.image_size is not None and (height, width) != (config.image_size,) * 2:
        raise UsageError(
            f"data.image_size does not apply to the source {config.source!r}: its images are "
            f"{height}x{width}, got {config.image_size}"
        )
    if digests is None:
        digests = {"train": digest_pixels(*training), "test": digest_pixels(*test)}
    splits = make_splits(config, training, test, largest_pixel, own_validation)
    return InMemory(splits, tuple(classes), config, context, scale=largest_pixel, digests=digests)


def _problem(images: Images, classes: int) -> str:
    """Return what is wrong with images and labels, or an empty text."""
    pixels, labels = images
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        found = f"{pixels.dtype} {tuple(pixels.shape)}"
        return f"must be pixels (N, C, H, W) of uint8, got {found}"
    if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
        found = f"{labels.dtype} {tuple(labels.shape)}"
        return f"need a label of int64 for each of the {len(pixels)} images, got {found}"
    if not len(labels):
        return "must be at least one, got none"
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        found = f"{int(labels.min())} to {int(labels.max())}"
        return f"must have labels from 0 to {classes - 1}, one for each class, got {found}"
    return ""
