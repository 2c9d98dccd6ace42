"""Mixup, CutMix and random erasing of a whole batch on the device.

Each image is mixed with its neighbour in the global batch: the first with the second, the third
with the fourth, and so on. The order of an epoch is random, so neighbours are random pairs. Each
rank has an even number of images, so both images of a pair are on one rank, and the result does not
depend on the number of ranks.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdkd.data.base import mix_seed
from bdkd.data.imagenet.options import DecodedImagesConfig
from bdkd.errors import UsageError

AREA = (0.02, 1 / 3)  # of the erased rectangle, as a fraction of the image
ASPECT = (0.3, 1 / 0.3)
NUM_ERASING_DRAWS = 5


class Mix(NamedTuple):
    """How each image of a batch is mixed with its neighbour."""

    share: np.ndarray  # (B,) float32, weight of the image; the neighbour has 1 - share
    cut: np.ndarray  # (B,) bool: True for CutMix, False for mixup
    box: np.ndarray  # (B, 4) int64, pasted by CutMix: top, left, bottom, right


def check_neighbours(batch_size: int, mine: slice) -> None:
    """Raise ``UsageError`` if an image and its neighbour are on different ranks."""
    if mine.start % 2 or (mine.stop % 2 and mine.stop != batch_size):
        raise UsageError(
            f"train.batch_size is {batch_size}, and this rank has its images {mine.start} to "
            f"{mine.stop}: with data.mixup or data.cutmix, each rank needs an even number of "
            "images; change train.batch_size"
        )


def draw_mix(
    config: DecodedImagesConfig, seed: int, epoch: int, position: int, batch_size: int, side: int
) -> Mix:
    """Draw the mixing of the global batch at ``position``.

    Each image has a separate share from Beta(alpha, alpha) (mixup: Zhang et al., 2018, arXiv
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


def mix_images(images: Tensor, share: Tensor, cut: Tensor, box: Tensor) -> Tensor:
    """Return the images ``(B, C, H, W)``, each mixed with its neighbour as :class:`Mix` says."""
    weight = share.view(-1, 1, 1, 1).to(images.dtype)
    outside = (~_inside(images, box)).to(images.dtype)[:, None]  # (B, 1, H, W)
    weight = torch.where(cut.view(-1, 1, 1, 1), outside, weight)
    return torch.lerp(neighbours(images), images, weight.expand_as(images))


def mix_labels(labels: Tensor, share: Tensor, classes: int) -> Tensor:
    """Return soft labels ``(B, classes)`` float32, given labels and shares ``(B,)``."""
    one_hot = F.one_hot(labels, classes).float()
    return torch.lerp(neighbours(one_hot), one_hot, share[:, None].expand_as(one_hot))


def neighbours(batch: Tensor) -> Tensor:
    """Return the batch ``(B, ...)`` with the two rows of each pair swapped; the last row of an odd
    batch stays in place."""
    order = torch.arange(len(batch), device=batch.device) ^ 1
    return batch[order.clamp_max_(len(batch) - 1)]


def erasing_boxes(probability: float, drawn: np.ndarray, side: int) -> np.ndarray:
    """Return the rectangle to erase in each image, ``(B, 4)`` int64: top, left, bottom, right.

    The rectangle is empty for images that are not erased. The method is that of Zhong et al., 2020
    (arXiv 1708.04896), except that sides which do not fit are clipped instead of drawn again.

    Args:
        drawn: ``(B, NUM_ERASING_DRAWS)`` uniform numbers.
    """
    chance, share, ratio, down, right = drawn.T
    area = (AREA[0] + share * (AREA[1] - AREA[0])) * side**2
    aspect = np.exp(np.log(ASPECT[0]) + ratio * np.log(ASPECT[1] / ASPECT[0]))
    height = np.sqrt(area * aspect).round().clip(1, side) * (chance < probability)
    width = np.sqrt(area / aspect).round().clip(1, side)
    top = (down * (side - height + 1)).astype(int)
    left = (right * (side - width + 1)).astype(int)
    return np.stack((top, left, top + height, left + width), 1).astype(np.int64)


def erase(images: Tensor, box: Tensor) -> Tensor:
    """Set the box (B, 4) of each image (B, C, H, W) to 0, the mean."""
    return images.masked_fill(_inside(images, box)[:, None], 0.0)


def _inside(images: Tensor, box: Tensor) -> Tensor:
    """Return a mask ``(B, H, W)`` of the pixels inside each image's box."""
    _, _, height, width = images.shape
    top, left, bottom, right = box[:, :, None].unbind(1)  # (B, 1) each
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return down[:, :, None] & across[:, None]
