"""Mixup, CutMix and random erasing of a whole batch at once, on the device.

An image is mixed with its neighbour in the global batch: the first with the second, the third with
the fourth. The order of an epoch is random, so that is as random a partner as any; and both are on
one rank, where each rank has an even number of images, so that what is mixed does not depend on the
number of ranks.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.config import DataConfig
from bdkd.data.base import mix_seed
from bdkd.errors import UsageError

AREA = (0.02, 1 / 3)  # of what is erased, as a share of the image
ASPECT = (0.3, 1 / 0.3)
ERASING_DRAWS = 5


class Mix(NamedTuple):
    """How each image of a batch is mixed with its neighbour."""

    share: np.ndarray  # (B,) float32, of the image itself; the rest is the neighbour's
    cut: np.ndarray  # (B,) bool: CutMix, or else mixup
    box: np.ndarray  # (B, 4) int64, CutMix: top, left, bottom, right of the neighbour's part


def check_neighbours(batch_size: int, mine: slice) -> None:
    """Raise ``UsageError`` where a rank's images would have their neighbours on another one."""
    if mine.start % 2 or (mine.stop % 2 and mine.stop != batch_size):
        raise UsageError(
            "train.batch_size must give each rank an even number of images with data.mixup or "
            f"data.cutmix, which mix neighbours: got {batch_size}, of which this rank has "
            f"{mine.start} to {mine.stop}"
        )


def draw_mix(
    config: DataConfig, seed: int, epoch: int, position: int, batch_size: int, side: int
) -> Mix:
    """Draw for the batch at ``position``: all of it, of which a rank keeps its part.

    The shares follow Beta(alpha, alpha), image by image (mixup: Zhang et al., 2018, arXiv
    1710.09412; CutMix: Yun et al., 2019, arXiv 1905.04899).
    """
    rng = np.random.default_rng(mix_seed(seed, epoch, 4, position))
    cut = np.full(batch_size, config.cutmix > 0)
    if config.mixup and config.cutmix:
        cut = rng.random(batch_size) < 0.5
    alpha = np.where(cut, config.cutmix, config.mixup)
    share = rng.beta(alpha, alpha)
    size = np.round(side * np.sqrt(1 - share))[:, None]  # (B, 1)
    centre = rng.random((batch_size, 2)) * side
    box = np.hstack((centre - size / 2, centre + size / 2)).round().clip(0, side).astype(np.int64)
    pasted = np.prod(box[:, 2:] - box[:, :2], axis=1) / side**2
    return Mix(np.where(cut, 1 - pasted, share).astype(np.float32), cut, box)


def mix_images(
    images: Tensor,  # (B, C, H, W)
    share: Tensor,  # (B,) float32
    cut: Tensor,  # (B,) bool
    box: Tensor,  # (B, 4)
) -> Tensor:
    """Each image with its neighbour's part."""
    own = share.view(-1, 1, 1, 1).to(images.dtype)
    outside = (~_inside(images, box)).to(images.dtype)[:, None]  # (B, 1, H, W)
    own = torch.where(cut.view(-1, 1, 1, 1), outside, own)
    return torch.lerp(neighbours(images), images, own.expand_as(images))


def mix_labels(
    labels: Tensor,  # (B,)
    share: Tensor,  # (B,)
    classes: int,
) -> Tensor:
    """Soft labels ``(B, classes)`` float32."""
    own = F.one_hot(labels, classes).float()
    return torch.lerp(neighbours(own), own, share[:, None].expand_as(own))


def neighbours(batch: Tensor) -> Tensor:
    """The batch ``(B, ...)`` with first and second, third and fourth, ... exchanged; a last one
    without a neighbour is its own."""
    count = len(batch)
    order = torch.arange(count, device=batch.device) ^ 1
    return batch[order.clamp_max_(count - 1)]


def erasing_boxes(
    probability: float,
    drawn: np.ndarray,  # (B, ERASING_DRAWS) uniform numbers
    side: int,
) -> np.ndarray:
    """The rectangle to erase of each image, ``(B, 4)`` int64: top, left, bottom, right; an empty
    one where none is. (Zhong et al., 2020, arXiv 1708.04896; a side that would not fit is cut to
    the image's, where theirs is drawn again.)"""
    chance, share, ratio, down, right = drawn.T
    area = (AREA[0] + share * (AREA[1] - AREA[0])) * side**2
    aspect = np.exp(np.log(ASPECT[0]) + ratio * np.log(ASPECT[1] / ASPECT[0]))
    height = np.sqrt(area * aspect).round().clip(1, side) * (chance < probability)
    width = np.sqrt(area / aspect).round().clip(1, side)
    top, left = (down * (side - height + 1)).astype(int), (right * (side - width + 1)).astype(int)
    return np.stack((top, left, top + height, left + width), 1).astype(np.int64)


def erase(
    images: Tensor,  # (B, C, H, W), their mean 0
    box: Tensor,  # (B, 4)
) -> Tensor:
    """The images with a rectangle of each set to the mean."""
    return images.masked_fill(_inside(images, box)[:, None], 0.0)


def _inside(images: Tensor, box: Tensor) -> Tensor:
    """Which pixels ``(B, H, W)`` lie in each image's box."""
    _, _, height, width = images.shape
    top, left, bottom, right = box[:, :, None].unbind(1)  # (B, 1) each
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return down[:, :, None] & across[:, None]
