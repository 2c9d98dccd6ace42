"""The part of an image that a network sees: the window, its scale, its mirror image.

Random numbers are drawn beforehand and every decoder gets the window as numbers, so all decoders
cut the same window.
"""

import math
from typing import NamedTuple

import numpy as np

RESIZE, CROP = 256, 224  # evaluation: the shorter side becomes 256/224 of the window
RATIO = math.log(4 / 3)  # of the random window's sides, either way
ATTEMPTS = 10
DRAWS = 2 * ATTEMPTS + 3
# Longer side divided by shorter side. Longer images are cut before they are resized, to bound the
# memory: at side 224 an image of 65,500x1 pixels needs 13 GB, with this bound 13 MB.
LONG = 64


class Window(NamedTuple):
    """Cut (top, left, height, width) out of the image, resize that to (to_height, to_width), cut
    the square from (square_top, square_left) out of this, mirror it."""

    top: int
    left: int
    height: int
    width: int
    to_height: int
    to_width: int
    square_top: int
    square_left: int
    mirrored: bool


def training_window(
    height: int, width: int, side: int, drawn: np.ndarray, smallest: float, flip: bool
) -> Window:
    """Inception's random resized crop (Szegedy et al., 2015, arXiv 1409.4842): a window of
    ``smallest`` to all of the area and of aspect 3/4 to 4/3; a central one where none fits.

    Args:
        drawn: ``(DRAWS,)`` uniform numbers.
    """
    *attempts, down, right, mirror = drawn.tolist()
    area = height * width
    for share, ratio in zip(attempts[::2], attempts[1::2], strict=True):
        target = area * (smallest + share * (1 - smallest))
        aspect = math.exp(RATIO * (2 * ratio - 1))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    return Window(top, left, h, w, side, side, 0, 0, flip and mirror < 0.5)


def central_window(height: int, width: int, side: int) -> Window:
    """Return the window of evaluation: torchvision's ``Resize(round(side * 256 / 224))`` and
    ``CenterCrop(side)``, to the pixel.

    torchvision's recipe has 256 for side 224. For other sides timm rounds ``side / 0.875`` down,
    which is one pixel less at some of them. Images whose longer side is more than ``LONG`` times
    the shorter are cut to this ratio first, which torchvision does not do.

    Source: ``_compute_resized_output_size`` and ``center_crop`` in
    torchvision/transforms/functional.py.
    """
    h, w = min(height, LONG * width), min(width, LONG * height)
    shorter = round(side * RESIZE / CROP)
    to_h = shorter if h <= w else int(shorter * h / w)
    to_w = shorter if w <= h else int(shorter * w / h)
    # Python rounds halves to even numbers, and torchvision uses it.
    square = round((to_h - side) / 2), round((to_w - side) / 2)
    return Window((height - h) // 2, (width - w) // 2, h, w, to_h, to_w, *square, False)
