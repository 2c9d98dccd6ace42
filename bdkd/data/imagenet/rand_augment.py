"""RandAugment of a whole batch on the device.

Source: Cubuk et al., 2020, arXiv 1909.13719. Each image gets a fixed number of operations, drawn
uniformly from fourteen, all with the same magnitude. The operations are those of Pillow's ImageOps
and ImageEnhance, in floating point. The draws depend only on the image's position in the epoch.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 128.0  # fill value outside of a transformed image
LUMA = (0.299, 0.587, 0.114)

Operation = Callable[[Tensor, float, Tensor], Tensor]
"""Maps pixels (B, 3, H, W) in [0, 255], a magnitude in [0, 1] and its sign (B,) to pixels."""


def draw_operations(drawn: np.ndarray, count: int) -> np.ndarray:
    """Return the operation and the sign of its magnitude for each image, ``(B, count, 2)`` int64.

    Args:
        drawn: ``(B, 2 * count)`` uniform numbers.
    """
    choice = (drawn[:, :count] * len(OPERATIONS)).astype(np.int64)
    sign = np.where(drawn[:, count:] < 0.5, -1, 1)
    return np.stack((choice, sign), -1)


def rand_augment(pixels: Tensor, operations: np.ndarray, magnitude: float) -> Tensor:
    """Apply operations from :func:`draw_operations` in order, with a magnitude in [0, 10], to
    pixels ``(B, 3, H, W)`` float32 in [0, 255], and return new pixels."""
    pixels = pixels.clone()
    for choice, sign in operations.transpose(1, 2, 0):
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = np.flatnonzero(choice == number)
            if len(chosen):
                # The draws are on the host, so the host does not wait for the device.
                index = torch.from_numpy(chosen).to(pixels.device, non_blocking=True)
                signs = torch.from_numpy(sign[chosen]).to(pixels, non_blocking=True)
                pixels[index] = operation(pixels[index], magnitude / 10, signs).clamp(0, 255)
    return pixels


def _blend(other: Tensor, pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Blend as ImageEnhance does, with factor 1 + 0.9 * strength * sign."""
    factor = (1 + 0.9 * strength * sign).view(-1, 1, 1, 1)
    return other + factor * (pixels - other)


def _grey(pixels: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, device=pixels.device).view(1, 3, 1, 1)
    return (pixels * weights).sum(1, keepdim=True)


def _smooth(pixels: Tensor) -> Tensor:
    """Apply ImageFilter.SMOOTH, which leaves the border unchanged."""
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
    """Equalize the histogram of each channel, as ImageOps.equalize does."""
    count, channels, height, width = pixels.shape
    values = pixels.round().long().flatten(2).flatten(0, 1)  # (B C, H W)
    histogram = torch.zeros(len(values), 256, device=pixels.device)
    histogram.scatter_add_(1, values, torch.ones_like(values, dtype=torch.float32))
    last = 255 - (histogram.flip(1) > 0).float().argmax(1, keepdim=True)  # largest value present
    step = (height * width - histogram.gather(1, last)).div(255).floor()
    before = histogram.cumsum(1) - histogram
    table = ((before + (step / 2).floor()) / step.clamp_min(1)).floor().clamp(0, 255)
    equal = torch.where(step > 0, table.gather(1, values), values.float())
    return equal.view(count, channels, height, width)


def _posterize(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    step = 2.0 ** round(4 * strength)  # 8 bits down to 4
    return (pixels / step).floor() * step


def _affine(pixels: Tensor, sign: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """Transform by the identity matrix ``(B, 2, 3)`` on [-1, 1], with some entries replaced."""
    matrix = torch.eye(2, 3, device=sign.device).repeat(len(sign), 1, 1)
    for (row, column), value in entries.items():
        matrix[:, row, column] = value
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - GREY, grid, align_corners=False) + GREY


def _rotate(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    angle = sign * (strength * torch.pi / 6)  # up to 30 degrees
    cos, sin = angle.cos(), angle.sin()
    return _affine(pixels, sign, {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos})


# The operations take pixels, strength and sign. Random numbers are indices into this table, so a
# change of its order changes the augmentation of every run.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda x, strength, sign: x,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": lambda x, strength, sign: torch.where(x >= 256 * (1 - strength), 255 - x, x),
    "color": lambda x, strength, sign: _blend(_grey(x), x, strength, sign),
    "posterize": _posterize,
    "contrast": lambda x, strength, sign: _blend(
        _grey(x).mean((2, 3), keepdim=True), x, strength, sign
    ),
    "brightness": lambda x, strength, sign: _blend(torch.zeros_like(x), x, strength, sign),
    "sharpness": lambda x, strength, sign: _blend(_smooth(x), x, strength, sign),
    "shear_x": lambda x, strength, sign: _affine(x, sign, {(0, 1): sign * 0.3 * strength}),
    "shear_y": lambda x, strength, sign: _affine(x, sign, {(1, 0): sign * 0.3 * strength}),
    # Translate by up to 0.45 of a side.
    "translate_x": lambda x, strength, sign: _affine(x, sign, {(0, 2): sign * 0.9 * strength}),
    "translate_y": lambda x, strength, sign: _affine(x, sign, {(1, 2): sign * 0.9 * strength}),
}
