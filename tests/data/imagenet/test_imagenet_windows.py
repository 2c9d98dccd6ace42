"""The evaluation crop is torchvision's, to the pixel."""

import numpy as np
import pytest
from PIL import Image

from bdkd.data.imagenet.pillow import _cut
from bdkd.data.imagenet.windows import LONG, central_window


def torchvision_window(height, width, resize, side):
    """Size after ``Resize(resize)``, and the top left corner of ``CenterCrop(side)``.

    From _compute_resized_output_size and center_crop of torchvision/transforms/functional.py.
    """
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = resize, int(resize * long / short)
    new_w, new_h = (new_short, new_long) if width <= height else (new_long, new_short)
    top = int(round((new_h - side) / 2.0))  # noqa: RUF046
    left = int(round((new_w - side) / 2.0))  # noqa: RUF046
    return new_h, new_w, top, left


# 224: the field's. 160 and 288: FixRes. 32 and 64: small sets. 7: the resized side is odd too.
@pytest.mark.parametrize(("side", "resize"), [
    (224, 256), (160, 183), (288, 329), (64, 73), (32, 37), (7, 8), (1, 1),
])  # fmt: skip
def test_the_crop_is_torchvisions_at_every_size(side, resize):
    sizes = [(h, w) for h in range(1, 600, 7) for w in range(1, 600)]
    sizes += [(w, h) for h, w in sizes] + [(500, n) for n in range(1, 2000)]
    for height, width in sizes:
        if max(height, width) > LONG * min(height, width):
            continue
        window = central_window(height, width, side)
        assert window[:4] == (0, 0, height, width)
        assert window[4:8] == torchvision_window(height, width, resize, side), (height, width)


def test_pillows_pixels_are_those_of_resize_and_center_crop():
    rng = np.random.default_rng(0)
    sizes = [(375, 500), (500, 375), (257, 300), (1, 60), (60, 1), (400, 9), (31, 900), (224, 224)]
    sizes += rng.integers(1, 400, (20, 2)).tolist()
    for height, width in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for side, resize in ((64, 73), (33, 38)):
            if max(height, width) > LONG * min(height, width):
                continue
            new_h, new_w, top, left = torchvision_window(height, width, resize, side)
            expected = image.resize((new_w, new_h), Image.Resampling.BILINEAR)
            expected = expected.crop((left, top, left + side, top + side))
            found = _cut(image, central_window(height, width, side), side)
            assert np.array_equal(found, np.asarray(expected)), (height, width)


@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1), (3, 10_000), (1, 65)])
def test_a_long_image_does_not_fill_the_memory(size):
    window = central_window(*size, 224)
    assert window.to_height * window.to_width <= LONG * 256 * 256
    assert min(window.to_height - window.square_top, window.to_width - window.square_left) >= 224
