"""Crop boxes for training and evaluation.

Random numbers are drawn beforehand and every decoder receives the box as numbers, so all decoders
cut the same crop.
"""

import math
from typing import NamedTuple

import numpy as np

RESIZE, CROP = 256, 224  # evaluation resizes the shorter side to 256/224 of the crop
LOG_MAX_RATIO = math.log(4 / 3)  # random crops have aspect ratios from 3/4 to 4/3
ATTEMPTS = 10
NUM_DRAWS = 2 * ATTEMPTS + 3
# Longer side divided by shorter side. Longer images are cut before they are resized, to bound the
# memory: at side 224 an image of 65,500x1 pixels needs 13 GB, with this bound 13 MB.
MAX_ASPECT = 64


class Crop(NamedTuple):
    """Cut (top, left, height, width) out of the image, resize that to (to_height, to_width), cut
    the square that starts at (square_top, square_left), and flip it if ``mirrored``."""

    top: int
    left: int
    height: int
    width: int
    to_height: int
    to_width: int
    square_top: int
    square_left: int
    mirrored: bool


def random_resized_crop(
    height: int, width: int, side: int, drawn: np.ndarray, smallest: float, flip: bool
) -> Crop:
    """Return Inception's random resized crop (Szegedy et al., 2015, arXiv 1409.4842).

    The crop has ``smallest`` to 1 of the area and an aspect ratio from 3/4 to 4/3. If none of
    ``ATTEMPTS`` crops fits into the image, the crop is central.

    Args:
        drawn: ``(NUM_DRAWS,)`` uniform numbers.
    """
    *attempts, down, right, mirror = drawn.tolist()
    area = height * width
    for share, ratio in zip(attempts[::2], attempts[1::2], strict=True):
        target = area * (smallest + share * (1 - smallest))
        aspect = math.exp(LOG_MAX_RATIO * (2 * ratio - 1))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    return Crop(top, left, h, w, side, side, 0, 0, flip and mirror < 0.5)


def resize_and_center_crop(height: int, width: int, side: int) -> Crop:
    """Return the crop of torchvision's ``Resize(round(side * 256 / 224))`` and
    ``CenterCrop(side)``, exact to the pixel.

    torchvision's recipe has 256 for side 224. For other sides timm rounds ``side / 0.875`` down,
    which differs by one pixel at some of them. Images whose aspect ratio is above ``MAX_ASPECT``
    are cut to this ratio first, which torchvision does not do.

    Source: ``_compute_resized_output_size`` and ``center_crop`` in
    torchvision/transforms/functional.py.
    """
    h, w = min(height, MAX_ASPECT * width), min(width, MAX_ASPECT * height)
    shorter = round(side * RESIZE / CROP)
    to_h = shorter if h <= w else int(shorter * h / w)
    to_w = shorter if w <= h else int(shorter * w / h)
    # Python rounds halves to even numbers, and so does torchvision.
    square = round((to_h - side) / 2), round((to_w - side) / 2)
    return Crop((height - h) // 2, (width - w) // 2, h, w, to_h, to_w, *square, False)
