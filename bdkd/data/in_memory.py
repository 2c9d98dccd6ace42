"""Data sets that fit into device memory. They need no loader process.

A batch is cropped, flipped and cut out as a whole. Each rank draws the random numbers of the global
batch and keeps its part, so the augmentation of an image does not depend on the number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bdkd.config import NotNegative, Share
from bdkd.data import base
from bdkd.data.base import (
    WHOLE,
    Batch,
    DataInfo,
    ImagesConfig,
    Normalisation,
    Shard,
    SourceContext,
    Split,
)
from bdkd.data.digest import Digests
from bdkd.errors import UsageError


@dataclass(frozen=True)
class InMemoryConfig(ImagesConfig):
    """Options of the data sources that keep all images in memory."""

    pixel_noise: Share = 0.0
    """Standard deviation of Gaussian noise on all images (train, val and test), as a share of the
    largest pixel value. The noise does not depend on the seed."""
    crop: NotNegative[int] = 0
    """Augmentation: pad each training image by this number of pixels, then take a random crop of
    the original size, as torchvision's RandomCrop with this padding does. 0: off."""
    crop_padding: Literal["zero", "reflect", "edge"] = "zero"
    """Content of the padding: zeros, the mirrored image, or the repeated border."""
    cutout: NotNegative[int] = 0
    """Augmentation: side in pixels of a random square that is set to the mean colour. 0: off."""


class Images(NamedTuple):
    """The images of a split."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64


class Draws(NamedTuple):
    """The random numbers of a batch's augmentation."""

    down: Tensor  # (B,) offset of the crop in pixels
    right: Tensor  # (B,)
    mirrored: Tensor  # (B,) bool
    hole_top: Tensor  # (B,) first row of the cutout, may be outside the image
    hole_left: Tensor  # (B,)

    def part(self, mine: slice) -> "Draws":
        return Draws(*(draw[mine] for draw in self))


def draw(
    config: InMemoryConfig, count: int, height: int, width: int, generator: torch.Generator
) -> Draws:
    """Draw the numbers for ``count`` images; disabled augmentations draw no numbers."""
    device = generator.device
    none = torch.zeros(2, count, dtype=torch.int64, device=device)
    offsets, mirrored, holes = none, none[0].bool(), none
    if config.crop:
        limits = (-config.crop, config.crop + 1)
        offsets = torch.randint(*limits, (2, count), generator=generator, device=device)
    if config.flip:
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
    if config.cutout:  # the centre is any pixel, so the border may clip the hole
        y, x = torch.rand(2, count, generator=generator, device=device)
        holes = torch.stack((y * height, x * width)).long() - config.cutout // 2
    return Draws(offsets[0], offsets[1], mirrored, holes[0], holes[1])


def crop_and_flip(pixels: Tensor, chosen: Tensor, draws: Draws, padding: str) -> Tensor:
    """Gather the chosen images, cropped and flipped, ``(B, H, W, C)``.

    Args:
        pixels: ``(N, H, W, C)``, all images of the split.
        chosen: ``(B,)``, indices of images.
    """
    count, height, width, channels = pixels.shape
    rows = torch.arange(height, device=pixels.device) + draws.down[:, None]  # (B, H)
    columns = torch.arange(width, device=pixels.device) + draws.right[:, None]  # (B, W)
    columns = torch.where(draws.mirrored[:, None], columns.flip(1), columns)
    # Zero padding reads any valid pixel and multiplies it by 0 below.
    into = _reflected if padding == "reflect" else _nearest
    # On a CPU, index_select takes a fifth of the time of indexing by three tensors.
    lines = chosen[:, None] * height + into(rows, height)  # (B, H)
    places = lines[:, :, None] * width + into(columns, width)[:, None]  # (B, H, W)
    flat = pixels.reshape(count * height * width, channels)
    cropped = flat.index_select(0, places.flatten()).view(*places.shape, channels)
    if padding == "zero":
        inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None]
        cropped = cropped * inside[..., None]
    return cropped


def cut_out(images: Tensor, draws: Draws, size: int) -> Tensor:
    """Set a square of each image (B, C, H, W) to 0, the mean of normalised images (DeVries and
    Taylor, 2017, arXiv 1708.04552)."""
    _, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - draws.hole_top[:, None]  # (B, H)
    columns = torch.arange(width, device=images.device) - draws.hole_left[:, None]  # (B, W)
    hole = _within(rows, size)[:, :, None] & _within(columns, size)[:, None]  # (B, H, W)
    return images.masked_fill(hole[:, None], 0.0)


def _within(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _nearest(index: Tensor, size: int) -> Tensor:
    return index.clamp(0, size - 1)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Map -1 to 1 and ``size`` to ``size - 2``: the border pixel is not repeated."""
    last = size - 1
    return last - (last - index.abs()).abs()


class InMemory:
    """Keeps uint8 images on the device and gathers, augments and normalises each batch there.

    Args:
        splits: ``train``, ``val`` and ``test``.
        classes: names in the order of the labels.
        scale: the largest pixel value.
        digests: digests of the data set before it was split.

    Raises:
        UsageError: the crop or cutout is too large for the images.
    """

    def __init__(
        self, splits: dict[Split, Images], classes: tuple[str, ...], config: InMemoryConfig,
        context: SourceContext, *, scale: int = 255, digests: Digests | None = None,
    ) -> None:  # fmt: skip
        self.config, self.seed, self.device, self.memory_format, _ = config, *context
        _, channels, height, width = splits["train"].pixels.shape
        if config.crop >= min(height, width) or config.cutout > 2 * min(height, width):
            raise UsageError(
                f"data.crop is {config.crop} and data.cutout is {config.cutout}: for images of "
                f"{height}x{width} pixels, crop must be less than the shorter side, and cutout at "
                "most twice the shorter side"
            )
        counts: dict[Split, int] = {split: len(images.labels) for split, images in splits.items()}
        self.splits: dict[Split, Images] = {}
        for split, (pixels, labels) in splits.items():
            pixels = pixels.contiguous(memory_format=torch.channels_last).to(self.device)
            self.splits[split] = Images(pixels, labels.to(self.device))
        mean, std = pixel_statistics(splits["train"].pixels)
        std = std.clamp_min(scale / 255)
        self.mean, self.std = (x.float().to(self.device) for x in (mean, std))  # (1, C, 1, 1)
        means, deviations = (tuple(each.flatten().tolist()) for each in (mean, std))
        known = dict(digests or {})
        self.info = DataInfo(
            config.source, classes, channels, (height, width), counts,
            Normalisation(means, deviations, float(scale)),
            digests={split: digest.sha256 for split, digest in known.items()},
            files={split: digest.images for split, digest in known.items()},
        )  # fmt: skip

    def train_batches(
        self, epoch: int, start: int, batch_size: int, views: int, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        images = self.splits["train"]
        pixels = images.pixels.permute(0, 2, 3, 1)  # (N, H, W, C), no copy
        order = base.epoch_order(self.seed, epoch, len(images.labels)).to(self.device)
        mine = shard.of_batch(batch_size)
        for position in range(start, len(order) - batch_size + 1, batch_size):
            chosen = order[position : position + batch_size][mine]
            # Each batch has a new generator, so that a resumed run draws the same numbers.
            seed = base.mix_seed(self.seed, epoch, 1, position)
            generator = torch.Generator(self.device).manual_seed(seed)
            augmented = [
                self._augmented(pixels, chosen, batch_size, mine, generator) for _ in range(views)
            ]
            yield Batch(tuple(augmented), images.labels[chosen])

    def eval_batches(self, split: Split, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        mine = shard.of_split(len(self.splits[split].labels))
        images, classes = (part[mine] for part in self.splits[split])
        if not len(classes):
            return
        for pixels, labels in zip(images.split(batch_size), classes.split(batch_size), strict=True):
            yield Batch((self._normalise(pixels),), labels)

    def _augmented(
        self, pixels: Tensor, chosen: Tensor, batch_size: int, mine: slice,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """Return a view (B, C, H, W) of the images ``chosen`` (B,) from ``pixels`` (N, H, W, C)."""
        height, width = self.info.image_size
        draws = draw(self.config, batch_size, height, width, generator).part(mine)
        moves = self.config.crop or self.config.flip
        padding = self.config.crop_padding
        gathered = crop_and_flip(pixels, chosen, draws, padding) if moves else pixels[chosen]
        images = self._normalise(gathered.permute(0, 3, 1, 2))
        if not self.config.cutout:
            return images
        # masked_fill does not keep the memory format of its input.
        blanked = cut_out(images, draws, self.config.cutout)
        return blanked.contiguous(memory_format=self.memory_format)

    def _normalise(self, pixels: Tensor) -> Tensor:
        images = pixels.float().sub_(self.mean).div_(self.std)
        return images.contiguous(memory_format=self.memory_format)


def pixel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel, ``(1, C, 1, 1)`` float64.

    A histogram of the 256 values is exact and avoids a float copy of the data set.
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.zeros(pixels.shape[1], 256, dtype=torch.float64)
    for part in pixels.split(1000):  # bincount copies its input to int64
        for row, channel in zip(counts, part.unbind(1), strict=True):
            row += torch.bincount(channel.flatten(), minlength=256)
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    deviation = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)
