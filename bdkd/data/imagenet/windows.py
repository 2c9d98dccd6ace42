"""What of an image a network sees: the window cut out of it, its scale, its mirror image.

What is random is drawn before, and the window handed to the decoders as numbers: so all of them cut
alike.
"""

import math
from typing import NamedTuple

import numpy as np

RESIZE, CROP = 256, 224  # evaluation: the shorter side becomes 256/224 of the window
RATIO = math.log(4 / 3)  # of the random window's sides, either way
ATTEMPTS = 10
DRAWS = 2 * ATTEMPTS + 3
LONG = 4  # an image with longer sides than this, in shorter ones, is cut before it is enlarged


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
        w = max(1, min(width, round(height * 4 / 3)))
        h = max(1, min(height, round(width * 4 / 3)))
        top, left = (height - h) // 2, (width - w) // 2
    return Window(top, left, h, w, side, side, 0, 0, flip and mirror < 0.5)


def central_window(height: int, width: int, side: int) -> Window:
    """The field's evaluation: the shorter side resized to 256/224 of ``side``, its centre cut."""
    h, w = min(height, LONG * width), min(width, LONG * height)
    shorter = round(side * RESIZE / CROP)
    to_h = shorter if h <= w else int(shorter * h / w)
    to_w = shorter if w <= h else int(shorter * w / h)
    top, left = (height - h) // 2, (width - w) // 2
    return Window(
        top, left, h, w, to_h, to_w, (to_h - side + 1) // 2, (to_w - side + 1) // 2, False
    )
