"""A data set small enough to lie on the device whole: no loader process at all."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bdkd.config import DataConfig
from bdkd.data.base import (
    WHOLE,
    Batch,
    DataInfo,
    Normalisation,
    Shard,
    Split,
    epoch_order,
    mix_seed,
)


class Images(NamedTuple):
    """The images of a split."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64


class InMemory:
    """Images kept as bytes on the device; gathered, augmented and normalised there, by batch.

    Args:
        splits: ``train``, ``val`` and ``test``.
        config: its ``shift`` and ``flip`` say how training images are augmented.
        scale: the largest pixel value.
    """

    def __init__(
        self,
        source: str,
        splits: dict[Split, Images],
        classes: tuple[str, ...],
        config: DataConfig,
        *,
        scale: int,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        _, channels, height, width = splits["train"].pixels.shape
        counts: dict[Split, int] = {split: len(images.labels) for split, images in splits.items()}
        self.splits = {
            split: Images(images.pixels.to(device), images.labels.to(device))
            for split, images in splits.items()
        }
        mean, std = pixel_statistics(splits["train"].pixels)
        std = std.clamp_min(scale / 255)
        self.mean = mean.float().to(device)  # (1, C, 1, 1)
        self.std = std.float().to(device)
        normalisation = Normalisation(
            tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()), float(scale)
        )
        self.info = DataInfo(source, classes, channels, (height, width), counts, normalisation)
        self.shift, self.flip, self.seed = config.shift, config.flip, seed
        self.device, self.memory_format = device, memory_format

    def train_batches(
        self, epoch: int, start: int, batch_size: int, views: int, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        images = self.splits["train"]
        order = epoch_order(self.seed, epoch, len(images.labels)).to(self.device)
        for position in range(start, len(order) - batch_size + 1, batch_size):
            chosen = order[position : position + batch_size]
            # A generator of its own for every batch: a resumed run draws what it would have drawn.
            generator = torch.Generator(self.device).manual_seed(
                mix_seed(self.seed, epoch, 1, position)
            )
            mine = shard.of_batch(batch_size)
            pixels = self._normalise(images.pixels[chosen])
            yield Batch(
                # Augmented as a whole and then cut: the draws do not depend on the shard.
                tuple(self._augment(pixels, generator)[mine] for _ in range(views)),
                images.labels[chosen][mine],
            )

    def eval_batches(self, split: Split, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        mine = shard.of_split(len(self.splits[split].labels))
        images, classes = (part[mine] for part in self.splits[split])
        if not len(classes):
            return
        for pixels, labels in zip(images.split(batch_size), classes.split(batch_size), strict=True):
            yield Batch((self._normalise(pixels),), labels)

    def _normalise(self, pixels: Tensor) -> Tensor:
        images = (pixels.float() - self.mean) / self.std
        return images.contiguous(memory_format=self.memory_format)

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.shift:
            images = random_shift(images, self.shift, generator)
        if self.flip:
            images = random_flip(images, generator)
        return images.contiguous(memory_format=self.memory_format)


def pixel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, ``(1, C, 1, 1)`` float64, in pixel values.

    From counts of the 256 values: exact, and no wide copy of a whole data set.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in pixels.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = (counts * values).sum() / counts.sum()
        means.append(mean)
        deviations.append(((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt())
    shape = (1, -1, 1, 1)
    return torch.stack(means).view(shape), torch.stack(deviations).view(shape)


def random_shift(
    images: Tensor,  # (B, C, H, W)
    pixels: int,
    generator: torch.Generator,
) -> Tensor:
    """Each image moved by up to ``pixels`` each way, its border repeated."""
    batch, _, height, width = images.shape
    dy, dx = torch.randint(
        -pixels, pixels + 1, (2, batch, 1, 1), generator=generator, device=images.device
    )
    rows = (torch.arange(height, device=images.device)[:, None] + dy).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + dx).clamp(0, width - 1)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[sample, rows, columns]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def random_flip(
    images: Tensor,  # (B, C, H, W)
    generator: torch.Generator,
) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
