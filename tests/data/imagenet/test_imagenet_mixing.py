"""Random numbers by place, mixing and erasing, RandAugment against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from bdkd.config import DataConfig
from bdkd.data.imagenet.draws import draws
from bdkd.data.imagenet.mixing import draw_mix, erase, erasing_boxes, mix_images, mix_labels
from bdkd.data.imagenet.rand_augment import OPERATIONS, draw_operations, rand_augment
from bdkd.data.imagenet.windows import DRAWS, central_window, training_window


def test_draws_are_uniform_and_known_by_their_place():
    whole = draws(0, 1, (0, 0), np.arange(20_000), 5)
    assert whole.min() >= 0
    assert whole.max() < 1
    histogram, _ = np.histogram(whole, 50, (0, 1))
    assert ((histogram - 2000) ** 2 / 2000).sum() < 49 + 5 * np.sqrt(98)  # chi-squared
    assert np.abs(np.corrcoef(whole.T) - np.eye(5)).max() < 0.03
    assert np.abs(np.corrcoef(whole[1:, 0], whole[:-1, 0])[0, 1]) < 0.03
    some = np.array([7, 19_999, 0])
    assert np.array_equal(draws(0, 1, (0, 0), some, 5), whole[some])
    for other in ((1, 1, (0, 0)), (0, 2, (0, 0)), (0, 1, (0, 1)), (0, 1, (1, 0))):
        assert not np.intersect1d(draws(*other, np.arange(1000), 5), whole).size


@pytest.mark.parametrize("size", [(375, 500), (1, 1), (1, 900), (900, 1), (224, 224), (3, 2)])
def test_windows_lie_in_the_image(size):
    height, width = size
    shares = []
    for drawn in draws(0, 0, (0, 0), np.arange(500), DRAWS):
        w = training_window(height, width, 64, drawn, 0.08, True)
        assert 0 <= w.top <= w.top + w.height <= height
        assert 0 <= w.left <= w.left + w.width <= width
        assert min(w.height, w.width) >= 1
        shares.append(w.height * w.width / (height * width))
    if size == (375, 500):  # of areas uniform in [0.08, 1], those that do not fit drawn again
        assert 0.07 < min(shares) < 0.12
        assert max(shares) > 0.9
        assert 0.42 < np.mean(shares) < 0.54
    w = central_window(height, width, 64)
    assert 0 <= w.top <= w.top + w.height <= height
    assert 0 <= w.square_top <= w.to_height - 64
    assert 0 <= w.square_left <= w.to_width - 64
    assert w.to_height * w.to_width <= 64 * 73 * 73  # no long image fills the memory


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("count", [8, 7])
def test_mixing_takes_of_the_neighbour_what_the_label_says(mixup, cutmix, count):
    """Each image is constant, its number: the mean pixel is the mean label."""
    config = DataConfig(mixup=mixup, cutmix=cutmix)
    drawn = draw_mix(config, 0, 3, 80, count, 32)
    share, cut, box = (torch.from_numpy(part) for part in drawn)
    numbers = torch.arange(count, dtype=torch.float32)
    images = numbers.view(-1, 1, 1, 1).expand(count, 3, 32, 32)
    mixed = mix_images(images, share, cut, box)
    labels = mix_labels(numbers.long(), share, count)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), labels @ numbers, rtol=1e-5, atol=1e-5)
    assert (labels > 0).sum(1).le(2).all()
    if cutmix and not mixup:
        values = mixed.unique()
        assert torch.equal(values, values.round())  # pasted, not blended
    if count % 2:
        assert labels[-1, -1] == 1
    again = draw_mix(config, 0, 3, 80, count, 32)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not np.array_equal(draw_mix(config, 0, 3, 88, count, 32).share, drawn.share)


def test_erasing_blanks_as_often_and_as_much_as_asked():
    drawn = draws(0, 0, (2, 0), np.arange(4000), 5)
    box = erasing_boxes(0.25, drawn, 64)
    assert box.min() >= 0
    assert box.max() <= 64
    area = np.prod(box[:, 2:] - box[:, :2], axis=1) / 64**2
    assert (area > 0).mean() == pytest.approx(0.25, abs=0.03)
    assert 0.14 < area[area > 0].mean() < 0.19  # between 0.02 and 1/3
    blank = (erase(torch.ones(50, 3, 64, 64), torch.from_numpy(box[:50])) == 0).float()
    torch.testing.assert_close(blank.mean((1, 2, 3)).double(), torch.from_numpy(area[:50]))
    none = erasing_boxes(0.0, drawn, 64)
    assert (none[:, 0] == none[:, 2]).all()


def pillow(name: str, image: Image.Image, strength: float, sign: int) -> Image.Image:
    """The operation by Pillow, where it has the same one."""
    factor = 1 + 0.9 * strength * sign
    return {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "solarize": lambda: ImageOps.solarize(image, round(256 * (1 - strength))),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * strength)),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "rotate": lambda: image.rotate(
            30 * strength * sign, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
        ),
        "translate_x": lambda: image.transform(
            image.size, Image.Transform.AFFINE,
            (1, 0, 0.45 * strength * sign * image.width, 0, 1, 0),
            Image.Resampling.BILINEAR, fillcolor=(128, 128, 128),
        ),
        "translate_y": lambda: image.transform(
            image.size, Image.Transform.AFFINE,
            (1, 0, 0, 0, 1, 0.45 * strength * sign * image.height),
            Image.Resampling.BILINEAR, fillcolor=(128, 128, 128),
        ),
        "shear_x": lambda: image.transform(
            image.size, Image.Transform.AFFINE,
            (1, 0.3 * strength * sign, -0.15 * strength * sign * image.height, 0, 1, 0),
            Image.Resampling.BILINEAR, fillcolor=(128, 128, 128),
        ),
        "shear_y": lambda: image.transform(
            image.size, Image.Transform.AFFINE,
            (1, 0, 0, 0.3 * strength * sign, 1, -0.15 * strength * sign * image.width),
            Image.Resampling.BILINEAR, fillcolor=(128, 128, 128),
        ),
    }[name]()  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_an_operation_is_pillows(name, sign):
    image = Image.fromarray(load_sample_images().images[0][100:228, 300:428])
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
    number = list(OPERATIONS).index(name)
    operations = np.array([[[number, sign]], [[0, 1]]])  # the second image stays as it is
    before = torch.stack((pixels, pixels))
    varied = rand_augment(before, operations, 5.0)
    assert torch.equal(varied[1], pixels)
    assert torch.equal(before[0], pixels)
    expected = torch.from_numpy(np.asarray(pillow(name, image, 0.5, sign)).copy())
    difference = (varied[0].permute(1, 2, 0) - expected).abs()
    # Pillow rounds; moved images differ along their border
    assert difference.mean() < 1.5, difference.mean()
    if name != "identity":
        assert (varied[0] - pixels).abs().mean() > 0.2


def test_every_operation_is_drawn_alike():
    operations = draw_operations(draws(0, 0, (1, 0), np.arange(5000), 4), 2)
    counts = np.bincount(operations[..., 0].ravel(), minlength=len(OPERATIONS))
    assert counts.min() > 600
    assert counts.max() < 830
    assert abs(operations[..., 1].mean()) < 0.05
