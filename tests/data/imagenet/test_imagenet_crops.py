"""Evaluation crops equal torchvision's to the pixel. Training crops have the same distribution."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare, kstest

from bdkd.data.imagenet.crops import (
    MAX_ASPECT,
    NUM_DRAWS,
    random_resized_crop,
    resize_and_center_crop,
)
from bdkd.data.imagenet.pillow import _cut


def torchvision_window(height, width, resize, side):
    """Return the size after ``Resize(resize)``, and the top left corner of ``CenterCrop(side)``.

    Source: _compute_resized_output_size and center_crop of torchvision/transforms/functional.py.
    """
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = resize, int(resize * long / short)
    new_w, new_h = (new_short, new_long) if width <= height else (new_long, new_short)
    top = int(round((new_h - side) / 2.0))  # noqa: RUF046
    left = int(round((new_w - side) / 2.0))  # noqa: RUF046
    return new_h, new_w, top, left


# 224: the usual side. 160 and 288: FixRes. 32 and 64: small images. 7 and 1: edge cases.
@pytest.mark.parametrize(("side", "resize"), [
    (224, 256), (160, 183), (288, 329), (64, 73), (32, 37), (7, 8), (1, 1),
])  # fmt: skip
def test_evaluation_crops_equal_torchvision_at_every_size(side, resize):
    sizes = [(h, w) for h in range(1, 600, 37) for w in range(1, 600)]
    sizes += [(w, h) for h, w in sizes] + [(500, n) for n in range(1, 2000)]
    for height, width in sizes:
        if max(height, width) > MAX_ASPECT * min(height, width):
            continue
        window = resize_and_center_crop(height, width, side)
        assert window[:4] == (0, 0, height, width)
        assert window[4:8] == torchvision_window(height, width, resize, side), (height, width)


def test_pillows_pixels_are_those_of_resize_and_center_crop():
    rng = np.random.default_rng(0)
    sizes = [(375, 500), (500, 375), (257, 300), (1, 60), (60, 1), (400, 9), (31, 900), (224, 224)]
    sizes += rng.integers(1, 400, (20, 2)).tolist()
    for height, width in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for side, resize in ((64, 73), (33, 38)):
            if max(height, width) > MAX_ASPECT * min(height, width):
                continue
            new_h, new_w, top, left = torchvision_window(height, width, resize, side)
            expected = image.resize((new_w, new_h), Image.Resampling.BILINEAR)
            expected = expected.crop((left, top, left + side, top + side))
            found = _cut(image, resize_and_center_crop(height, width, side), side)
            assert np.array_equal(found, np.asarray(expected)), (height, width)


@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1), (3, 10_000), (1, 65)])
def test_a_long_image_does_not_fill_the_memory(size):
    window = resize_and_center_crop(*size, 224)
    assert window.to_height * window.to_width <= MAX_ASPECT * 256 * 256
    assert min(window.to_height - window.square_top, window.to_width - window.square_left) >= 224


def training_windows(height, width, smallest=0.08, flip=True, count=4000):
    """Return the columns top, left, height, width and mirrored of ``count`` random crops."""
    drawn = np.random.default_rng(0).random((count, NUM_DRAWS))
    found = [random_resized_crop(height, width, 32, one, smallest, flip) for one in drawn]
    assert {window[4:8] for window in found} == {(32, 32, 0, 0)}  # resized to the square
    return np.array([(*window[:4], window.mirrored) for window in found]).T


def test_area_and_aspect_of_the_random_crop_are_those_of_random_resized_crop():
    """The area is uniform in [0.08, 1], and the logarithm of width / height is uniform in
    [log(3/4), log(4/3)]. Crops of up to 3/4 of the area fit with every aspect ratio, so none of
    them is drawn again. With sides of 3,000 pixels, rounding is negligible."""
    side = 3000
    _, _, h, w, _ = training_windows(side, side)
    area, ratio = h * w / side**2, np.log(w / h)
    some = area < 0.75
    assert kstest(area[some], "uniform", (0.08, 0.67)).pvalue > 1e-3
    assert kstest(ratio[some], "uniform", (-math.log(4 / 3), 2 * math.log(4 / 3))).pvalue > 1e-3
    assert abs(np.corrcoef(area[some], ratio[some])[0, 1]) < 0.06
    assert np.abs(ratio).max() < math.log(4 / 3) + 1e-3
    # Up to ten crops are tried, so the central crop is never needed here.
    assert not ((h == side) & (w == side)).any()
    assert 0.93 < area.max() < 1
    assert area.min() > 0.0799
    wider = training_windows(side, side, smallest=0.5)
    assert (wider[2] * wider[3] / side**2).min() > 0.4999


def test_as_many_random_crops_are_tried_as_torchvision_tries():
    assert NUM_DRAWS == 2 * 10 + 3  # area and ratio of each attempt, position, flip


def test_the_random_crop_is_at_every_position_and_mirrored_half_of_the_time():
    """The image has 9 x 7 pixels. Every size of a crop is tested."""
    top, left, h, w, mirrored = training_windows(9, 7, count=20_000)
    for first, length, whole in ((top, h, 9), (left, w, 7)):
        tried = 0
        for size in range(2, whole + 1):
            counts = np.bincount(first[length == size], minlength=whole - size + 1)
            assert len(counts) == whole - size + 1  # no crop exceeds the image
            if counts.sum() > 500 and len(counts) > 1:
                assert counts.min() > 0
                assert chisquare(counts).pvalue > 1e-3, (size, counts)
                tried += 1
        assert tried >= 4
    down, right = top / np.maximum(9 - h, 1), left / np.maximum(7 - w, 1)
    assert np.abs(np.corrcoef((down, right, mirrored)) - np.eye(3)).max() < 0.03
    assert 0.48 < mirrored.mean() < 0.52
    assert not training_windows(9, 7, flip=False)[4].any()


@pytest.mark.parametrize("size", [(10, 300), (300, 10), (400, 301), (5, 5)])
def test_the_fallback_is_the_central_crop_of_torchvision(size):
    """The expected crop is that of get_params of RandomResizedCrop in
    torchvision/transforms/transforms.py. All draws request the whole area, so no crop fits."""
    height, width = size
    ratio = width / height
    if ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif ratio > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    drawn = np.full(NUM_DRAWS, 0.999999)
    if ratio > 1.3:
        drawn[1:20:2] = 0.0  # aspect 3/4
    window = random_resized_crop(height, width, 32, drawn, 1.0, False)
    assert window[:4] == ((height - h) // 2, (width - w) // 2, h, w)


def test_a_window_as_high_or_as_wide_as_the_image_fits():
    """The crop has half of the area of 30 x 60 pixels. The fallback would have 30 x 40 pixels."""
    drawn = np.full(NUM_DRAWS, 0.5)
    assert random_resized_crop(30, 60, 32, drawn, 0.0, True)[:4] == (0, 15, 30, 30)
    assert random_resized_crop(60, 30, 32, drawn, 0.0, True)[:4] == (15, 0, 30, 30)
