"""RandAugment on the device, over a whole batch.

Source: Cubuk et al., 2020, arXiv 1909.13719: a number of operations, each one of fourteen with
equal chance, all of one magnitude. The operations are those of Pillow's ImageOps and ImageEnhance,
in floating point; what an image gets is drawn beforehand, from its place in the epoch alone.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 128.0  # what lies outside of a moved image
LUMA = (0.299, 0.587, 0.114)

Operation = Callable[[Tensor, float, Tensor], Tensor]
"""From pixels (B, 3, H, W) in [0, 255], a magnitude in [0, 1], and a sign (B,) of it."""


def draw_operations(drawn: np.ndarray, count: int) -> np.ndarray:
    """Which operation each image gets, and the sign of its magnitude, ``(B, count, 2)`` int64, from
    uniform numbers ``(B, 2 * count)``."""
    choice = (drawn[:, :count] * len(OPERATIONS)).astype(np.int64)
    sign = np.where(drawn[:, count:] < 0.5, -1, 1)
    return np.stack((choice, sign), -1)


def rand_augment(
    pixels: Tensor,  # (B, 3, H, W) float32 in [0, 255]
    operations: np.ndarray,  # (B, count, 2), as draw_operations has it; on the host
    magnitude: float,  # in [0, 10]
) -> Tensor:
    """The images after their operations, in [0, 255]; a tensor of its own."""
    pixels = pixels.clone()
    for choice, sign in operations.transpose(1, 2, 0):
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = np.flatnonzero(choice == number)
            if len(chosen):
                # Known on the host: nothing waits for the device.
                index = torch.from_numpy(chosen).to(pixels.device, non_blocking=True)
                signs = torch.from_numpy(sign[chosen]).to(pixels, non_blocking=True)
                varied = operation(pixels[index], magnitude / 10, signs)
                pixels[index] = varied.clamp(0, 255)
    return pixels


def _blend(other: Tensor, pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Towards ``other`` or away from it; ImageEnhance's factor is 1 + 0.9 of the magnitude, or 1
    less that."""
    factor = (1 + 0.9 * strength * sign).view(-1, 1, 1, 1)
    return other + factor * (pixels - other)


def _grey(pixels: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, device=pixels.device).view(1, 3, 1, 1)
    return (pixels * weights).sum(1, keepdim=True)


def _smooth(pixels: Tensor) -> Tensor:
    """ImageFilter.SMOOTH; the border stays as it is."""
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(pixels, kernel / 13, groups=3)
    return smooth


def _autocontrast(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    stretched = (pixels - low) * (255 / (high - low).clamp_min(1e-6))
    return torch.where(high > low, stretched, pixels)


def _equalize(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Each channel's values by their rank, as ImageOps.equalize has it."""
    count, channels, height, width = pixels.shape
    values = pixels.round().long().flatten(2).flatten(0, 1)  # (B C, H W)
    histogram = torch.zeros(len(values), 256, device=pixels.device)
    histogram.scatter_add_(1, values, torch.ones_like(values, dtype=torch.float32))
    last = 255 - (histogram.flip(1) > 0).float().argmax(1, keepdim=True)  # the largest value there
    step = (height * width - histogram.gather(1, last)).div(255).floor()
    before = histogram.cumsum(1) - histogram
    table = ((before + (step / 2).floor()) / step.clamp_min(1)).floor().clamp(0, 255)
    equal = torch.where(step > 0, table.gather(1, values), values.float())
    return equal.view(count, channels, height, width)


def _posterize(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    step = 2.0 ** round(4 * strength)  # 8 bits down to 4
    return (pixels / step).floor() * step


def _solarize(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return torch.where(pixels >= 256 * (1 - strength), 255 - pixels, pixels)


def _color(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(_grey(pixels), pixels, strength, sign)


def _contrast(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(_grey(pixels).mean((2, 3), keepdim=True), pixels, strength, sign)


def _brightness(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(torch.zeros_like(pixels), pixels, strength, sign)


def _sharpness(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(_smooth(pixels), pixels, strength, sign)


def _identity(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return pixels


def _moved(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Pixels fetched from where the matrix ``(B, 2, 3)`` sends the square [-1, 1]."""
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - GREY, grid, align_corners=False) + GREY


def _matrix(sign: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    matrix = torch.eye(2, 3, device=sign.device).repeat(len(sign), 1, 1)
    for (row, column), value in entries.items():
        matrix[:, row, column] = value
    return matrix


def _rotate(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    angle = sign * (strength * torch.pi / 6)  # up to 30 degrees
    cos, sin = angle.cos(), angle.sin()
    return _moved(pixels, _matrix(sign, {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos}))


def _shear_x(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _moved(pixels, _matrix(sign, {(0, 1): sign * 0.3 * strength}))


def _shear_y(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _moved(pixels, _matrix(sign, {(1, 0): sign * 0.3 * strength}))


def _translate_x(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _moved(pixels, _matrix(sign, {(0, 2): sign * 0.9 * strength}))  # up to 0.45 of a side


def _translate_y(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _moved(pixels, _matrix(sign, {(1, 2): sign * 0.9 * strength}))


OPERATIONS: dict[str, Operation] = {
    "identity": _identity, "autocontrast": _autocontrast, "equalize": _equalize,
    "rotate": _rotate, "solarize": _solarize, "color": _color, "posterize": _posterize,
    "contrast": _contrast, "brightness": _brightness, "sharpness": _sharpness,
    "shear_x": _shear_x, "shear_y": _shear_y, "translate_x": _translate_x,
    "translate_y": _translate_y,
}  # fmt: skip
